"""Guidance by the gradient of the look-ahead reward (DPS, Chung et al., arXiv 2209.14687)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from torch.nn.functional import normalize

from ..search import Particles, Problem, Run


@dataclass(frozen=True)
class Guide:
    """Steers particles uphill: score' = score + strength * gradient of r(x0(x)), at unchanged x.

    With strength 1/tau this approximates the score of p(x0) exp(r(x0)/tau), exactly so where the data are Gaussian and
    the reward linear. In terms of posterior means it moves x0 by strength sigma^2/alpha times the gradient and takes
    the noise that x leaves, eps' = (x - alpha x0')/sigma; velocity, and so every kernel, follow. The last transition,
    to t = 0, is not steered: a step along the gradient would remain in the sample as it is.

    Attributes:
        strength: of the gradient, an inverse temperature; or, if normalised, a length.
        normalised: instead moves x0 by strength sigma in the gradient's direction (root mean square over a sample's
            numbers), however long the gradient is; no floor is needed.
        below: the time from which particles are steered.
        floor: least alpha in the factor 1/alpha. Near the noise a model's errors in the gradient would grow without
            bound; below the floor the strength fades out by alpha/floor instead.
    """

    strength: float = 1.0
    normalised: bool = False
    below: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength must be positive; got {self.strength}")
        if not isinstance(self.normalised, bool):
            raise ValueError(f"normalised must be True or False; got {self.normalised!r}")
        for name, value in (("below", self.below), ("floor", self.floor)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must lie in (0, 1]; got {value}")

    def __call__(self, p: Particles, run: Run) -> Particles:
        """The particles, unscored, with velocity and estimate steered where due, at the price of `Run.gradient`."""
        if p.t > self.below or run.next_time(p.t) == 0:
            return p
        p = run.evaluate(p)
        a, s, da, ds = run.problem.path.at(p.t)
        g = run.gradient(p)
        if self.normalised:
            shift = self.strength * s * math.sqrt(g[0].numel()) * normalize(g.reshape(len(g), -1)).view_as(g)
        else:
            shift = self.strength * s**2 / max(a, self.floor) * g
        # x = a x0 + s eps stays: eps moves by -a/s shift, and v = a' x0 + s' eps accordingly.
        v = p.v - (a * ds - da * s) / s * shift
        return replace(p, v=v, x0=p.x0 + shift, reward=p.reward * math.nan)

    def price(self, problem: Problem, t: float | None = None) -> int:
        """Evaluations that steering one particle from time t (None: from the start) to the end costs.

        Raises ValueError: from the start on, nothing would be steered.
        """
        start = self.below if t is None else min(t, self.below)
        steered = sum(u <= start and s > 0 for u, s in pairwise(problem.times))
        if t is None and steered == 0:
            raise ValueError(f"nothing to steer: no transition but the last starts at below = {self.below:g} or later")
        return steered * problem.gradient_cost * problem.look_ahead.price


def guide_price(guide: Guide | None, problem: Problem, t: float | None = None) -> int:
    """`Guide.price`; 0 without a guide."""
    return 0 if guide is None else guide.price(problem, t)
