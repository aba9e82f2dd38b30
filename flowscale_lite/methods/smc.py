"""Sequential Monte Carlo on the look-ahead reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..resampling import SCHEMES, ess
from ..search import Particles, Problem, Run
from ._common import require_budget, require_noise, require_positive
from .gradient import Guide, guide_price


@dataclass(frozen=True)
class SMC:
    """Weighted particles that follow the law p(x0) exp(r(x0)/tau): a sampler, where the other methods only search.

    At each time a particle of look-ahead reward v has the potential exp(f), f = lambda(t) v/tau with
    lambda(t) = (1 - t)^tempering. Its weight is multiplied by exp of the gain in f since the time before. The gains of
    every line of descent multiply to exp(r/tau) of its finished sample, so the target is the same whatever the options,
    and only the variance differs: by far where tau is small against the spread of rewards. When the effective sample
    size falls below `threshold`, particles are resampled and their weights made equal. Sources: Wu et al. (arXiv
    2306.17775); for tempering DAS, Kim et al. (arXiv 2501.05803).

    Attributes:
        particles: their number K; None for as many as the budget pays for, less than one being left.
        tau: temperature.
        scheme: of resampling, a name in `resampling.SCHEMES`.
        threshold: fraction of K; 0 never resamples (importance sampling), 1 does so whenever the weights differ.
        tempering: exponent of lambda; 1 lets the strength grow linearly, 0 weighs at full strength from the start and
            so, where tau is small, resamples by look-aheads that say little: a poor estimator (`tests/test_smc.py`).
        init: initial noises for each particle; K of them are drawn by weight, which leaves the target as it is.
        guide: steers the particles by the gradient of the look-ahead reward; weights correct for it, so that the target
            is the same.
    """

    particles: int | None = None
    tau: float = 1.0
    scheme: Literal["multinomial", "stratified", "systematic", "residual"] = "systematic"
    threshold: float = 0.5
    tempering: float = 1.0
    init: int = 1
    guide: Guide | None = None

    def __post_init__(self) -> None:
        require_positive(self, "particles", "init")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be positive; got {self.tau}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {self.scheme!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1]; got {self.threshold}")
        if not 0 <= self.tempering < math.inf:
            raise ValueError(f"tempering must not be negative; got {self.tempering}")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for the particles, or if resampled particles would coincide."""
        if self.threshold > 0 or self.init > 1 or self.guide:
            require_noise(problem)
        k = self.particles or 1
        require_budget(problem, max_nfe, k * self._price(problem), f"{k} particle(s)")

    def start(self, run: Run) -> Particles:
        """K particles of noise, weighted."""
        k = self.particles or run.evaluations_left // self._price(run.problem)
        p = run.score(run.start(k * self.init))
        zero = torch.zeros_like(p.reward)
        p = self._weigh(replace(p, carry={"log_z": zero, "potential": zero}))
        return p if self.init == 1 else self._resample(p, k, run)

    def advance(self, p: Particles, run: Run) -> Particles:
        """The particles, resampled if need be, moved and weighted."""
        if ess(p.logw) < (self.threshold - 1e-9) * len(p):  # equal weights, but for rounding, are not resampled
            p = self._resample(p, len(p), run)
        return self._weigh(run.score(self._move(p, run)))

    def _move(self, p: Particles, run: Run) -> Particles:
        """One child each, its weight corrected if it was steered."""
        if self.guide is None:
            return run.propose(p)
        p = run.evaluate(p)
        mean, std = run.transition(p)
        if std == 0:  # no density to correct by, so no steering
            return run.propose(p)
        p = self.guide(p, run)
        steered, _ = run.transition(p)
        q = run.propose(p)
        log_ratio = ((mean - steered) * (q.x - (mean + steered) / 2)).reshape(len(q), -1).sum(1) / std**2
        return replace(q, logw=q.logw + log_ratio)

    def _price(self, problem: Problem) -> int:
        """Evaluations a particle."""
        judged = (self.init + problem.evaluations_ahead()) * problem.look_ahead.price
        return judged + problem.evaluations_kept() + guide_price(self.guide, problem)

    def _weigh(self, p: Particles) -> Particles:
        """Multiplies the weights by the gains."""
        f = (1 - p.t) ** self.tempering * p.reward / self.tau
        gain = f - p.carry["potential"]
        return replace(p, logw=p.logw + gain, carry={**p.carry, "potential": f})

    def _resample(self, p: Particles, k: int, run: Run) -> Particles:
        """k particles of equal weight; the mean weight goes into the estimate of the normalising constant."""
        q = p[SCHEMES[self.scheme](p.logw, k, run.generator)]
        return replace(q, logw=torch.zeros_like(q.logw), carry={**q.carry, "log_z": torch.full_like(q.logw, log_z(p))})


def log_z(p: Particles) -> float:
    """Log of the estimate of E_p[exp(r/tau)], the normalising constant, from SMC's particles, `Result.particles`.

    The estimate itself, not its logarithm, is unbiased. Raises ValueError: the particles are another method's.
    """
    if "log_z" not in p.carry:
        raise ValueError("only particles of SMC carry an estimate of the normalising constant")
    return float(p.carry["log_z"][0] + p.logw.logsumexp(0)) - math.log(len(p))
