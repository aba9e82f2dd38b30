"""Rollover Budget Forcing (arXiv 2503.19385)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..search import Particles, Problem, Run
from ._common import best_of_each, require_budget, require_noise, require_positive
from .gradient import Guide, guide_price
from .stopping import BestOfEnough, FirstImprovement, Rule


@dataclass(frozen=True)
class RBF:
    """Splits the budget into equal quotas, one a transition; what a transition does not use rolls over to the next.

    At every transition candidates are drawn from the one accepted state and judged by their look-ahead reward. A rule
    says when to stop. In the paper's, `RBF.published`, the first candidate that beats the record is taken at once. The
    record is the best reward accepted so far. If the quota is spent without such a candidate, the best of the
    transition is taken. The default rule draws enough candidates and takes the best of them.

    Attributes:
        init: initial noises of each chain, of which the best by look-ahead reward is kept.
        rule: when to stop drawing, see `methods.stopping`.
        batch: candidates drawn and evaluated at a time. With FirstImprovement up to batch - 1 of them are speculation.
        chains: searches that share the budget equally; the best finished sample is returned.
        finish: the last transition to pay for spends all that is left and takes the best, whatever the rule.
        guide: steers each accepted state, once for all its candidates, by the gradient of the look-ahead reward.
    """

    init: int = 4
    rule: Rule = field(default_factory=BestOfEnough)
    batch: int = 8
    chains: int = 1
    finish: bool = True
    guide: Guide | None = None

    def __post_init__(self) -> None:
        require_positive(self, "init", "batch", "chains")
        if isinstance(self.rule, type) or not hasattr(self.rule, "take"):
            raise ValueError(f"rule must be a stopping rule such as FirstImprovement(); got {self.rule!r}")

    @classmethod
    def published(cls, init: int = 25, chains: int = 2, batch: int = 1) -> RBF:
        """The settings of the paper's public code: two chains of 25 first noises, first improvement, a finish."""
        return cls(init=init, rule=FirstImprovement(), chains=chains, batch=batch)

    @classmethod
    def few_step(cls, max_nfe: int, cost: int = 1) -> RBF:
        """Settings found on tiny-flux schnell: a quarter of the budget on first noises, then first improvements. To be
        used with the VP-SDE, `sde(vp_diffusion())` on `paper_vp(steps)`. `cost` is the problem's."""
        return cls(init=max(1, max_nfe // cost // 4), rule=FirstImprovement())

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if a chain cannot pay for a candidate at every transition, or if candidates coincide."""
        require_noise(problem)
        ahead = problem.evaluations_ahead()
        each = self._reserved(problem) + ahead * problem.look_ahead.price
        what = f"{self.chains} chain(s) of {self.init} first noises and a candidate at each of {ahead} transitions"
        require_budget(problem, max_nfe, self.chains * each, what)

    def start(self, run: Run) -> Particles:
        """The best of the first noises of every chain; its reward is the first record."""
        spare = run.evaluations_left - self.chains * self._reserved(run.problem)
        share = torch.tensor([(spare + i) // self.chains for i in range(self.chains)])  # sums to what is spare
        p = best_of_each(run.score(run.start(self.chains * self.init)), self.chains)
        share = share.to(p.x.device)
        return replace(run.evaluate(p), carry={"record": p.reward, "share": share, "left": share})

    def advance(self, p: Particles, run: Run) -> Particles:
        """One accepted candidate for every chain."""
        if run.problem.evaluations_ahead(p.t) == 0:  # the step to t = 0 is free
            return run.propose(p)
        p = run.evaluate(p)
        p = self.guide(p, run) if self.guide else p
        accepted = Particles.cat([self._accept(p[i : i + 1], run) for i in range(len(p))])
        return replace(accepted, parent=p.parent)

    def _accept(self, p: Particles, run: Run) -> Particles:
        """The paper's algorithm: one transition of one chain."""
        ahead, price = run.problem.evaluations_ahead(p.t), run.problem.look_ahead.price
        record = float(p.carry["record"])
        share, left = (int(p.carry[name]) for name in ("share", "left"))
        quota = left - share * (ahead - 1) // run.problem.evaluations_ahead()  # an equal share, and what rolled over
        last = self.finish and ahead == 1
        most = self.rule.most(quota // price, left // price, ahead)
        best, drawn, taken = None, 0, None
        while drawn < most and taken is None:
            q = run.score(run.propose(p, min(self.batch, most - drawn)))
            drawn += len(q)
            taken = None if last else self.rule.take(q.reward, record)
            top = q.best() if taken is None else q[taken : taken + 1]
            # Without success it is the best of the transition so far, for the case that the quota is spent.
            if best is None or taken is not None or top.reward > best.reward:
                best = top
        assert best is not None
        carry = {"record": best.reward.clamp_min(record), "left": p.carry["left"] - drawn * price}
        return replace(best, carry=p.carry | carry)

    def _reserved(self, problem: Problem) -> int:
        """Evaluations of one chain that are not for candidates: its first noises, its states kept, its gradients."""
        at_noise = self.init * problem.look_ahead.price
        return at_noise + problem.evaluations_kept() + guide_price(self.guide, problem)
