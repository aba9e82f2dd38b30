"""SVDD, selection at every step (Li et al., arXiv 2408.08252)."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run
from ._common import best_noises, best_of_each, evaluations_of_chain, require_budget, require_noise, require_positive
from .gradient import Guide, guide_price


@dataclass(frozen=True)
class SVDD:
    """At every transition draws children of each chain's state and keeps the one of best look-ahead reward.

    The chains are independent; the best finished one is returned. It is SVDD with temperature 0: the original draws the
    child in proportion to exp(reward/temperature).

    Attributes:
        chains: states kept.
        init: initial noises of each chain, of which the best by look-ahead reward is kept.
        copies: children of a state at each transition; None divides what the budget leaves equally among transitions.
        guide: steers each chain's state, once for all its children, by the gradient of the look-ahead reward.
    """

    chains: int = 2
    init: int = 1
    copies: int | None = None
    guide: Guide | None = None

    def __post_init__(self) -> None:
        require_positive(self, "chains", "init", "copies")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for a child at every transition, or if children coincide."""
        require_noise(problem)
        each = evaluations_of_chain(problem, self.init, self.copies or 1) + guide_price(self.guide, problem)
        what = f"{self.chains} chain(s) with a child at every transition"
        require_budget(problem, max_nfe, self.chains * each, what)

    def start(self, run: Run) -> Particles:
        """The best of the initial noises of every chain."""
        return run.evaluate(best_noises(run, self.chains, self.init))

    def advance(self, p: Particles, run: Run) -> Particles:
        """The best child of each."""
        ahead = run.problem.evaluations_ahead(p.t)
        if ahead == 0:
            return run.propose(p)
        p = run.evaluate(p)
        p = self.guide(p, run) if self.guide else p
        s = run.next_time(p.t)
        reserved = run.problem.evaluations_kept(s) + guide_price(self.guide, run.problem, s)
        each = run.evaluations_left // self.chains - reserved
        copies = self.copies or each // (ahead * run.problem.look_ahead.price)  # the remainder is for later transitions
        return best_of_each(run.score(run.propose(p, copies)), self.chains)
