"""CoDe, blockwise selection (Singh et al., arXiv 2502.00968)."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run
from ._common import best_noises, best_of_each, require_budget, require_noise, require_positive, require_posterior_mean


@dataclass(frozen=True)
class Blockwise:
    """Lets branches of each chain's state run `block` transitions each, and keeps the one of best look-ahead reward.

    A block that reaches t = 0 is judged by the finished samples. With block = 1 it is SVDD. The chains are independent;
    the best finished one is returned.

    Attributes:
        chains: states kept.
        init: initial noises of each chain, of which the best by look-ahead reward is kept.
        block: transitions from one choice to the next; the last block may be shorter.
        copies: branches of a state; None divides what the budget leaves equally among transitions.
    """

    chains: int = 2
    init: int = 1
    block: int = 2
    copies: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "chains", "init", "block", "copies")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for a branch in every block, or if branches coincide."""
        require_noise(problem)
        require_posterior_mean(problem)
        rows = self.chains * (self.init + (self.copies or 1) * problem.evaluations_ahead())
        require_budget(problem, max_nfe, rows, f"{self.chains} chain(s) with a branch in every block")

    def start(self, run: Run) -> Particles:
        """The best of the initial noises of every chain."""
        return run.evaluate(best_noises(run, self.chains, self.init))

    def advance(self, p: Particles, run: Run) -> Particles:
        """The best branch of each, a block later."""
        ahead = run.problem.evaluations_ahead(p.t)
        if ahead == 0:
            return run.propose(p)
        q = run.propose(p, self.copies or run.evaluations_left // (self.chains * ahead))
        for _ in range(self.block - 1):
            q = run.propose(q) if q.t > 0 else q
        return best_of_each(run.score(q), self.chains)
