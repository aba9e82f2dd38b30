"""Best-of-N: the baseline every search must beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run
from ._common import best_noises, require_budget, require_positive


@dataclass(frozen=True)
class BestOfN:
    """Draws n samples without selecting on the way, and keeps the one of highest reward.

    All n rows advance in one batch: a velocity that cannot hold n rows in memory must chunk them itself.

    Attributes:
        n: number of samples; None for as many as the budget pays for, less than one being left.
        init: initial noises of each sample, of which the best by look-ahead reward is kept; 1 does not look ahead.

    Raises:
        ValueError: a field is below 1.
    """

    n: int | None = None
    init: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "n", "init")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError unless n samples (one, if n is None) can be paid for."""
        each, n = self.init + problem.evaluations_ahead(), self.n or 1
        require_budget(problem, max_nfe, n * each, f"{n} sample(s) of {each} evaluations each")

    def start(self, run: Run) -> Particles:
        """The best of the initial noises of every sample."""
        return best_noises(run, self.n or run.evaluations_left // (self.init + run.evaluations_ahead()), self.init)

    def advance(self, p: Particles, run: Run) -> Particles:
        """One child each."""
        return run.propose(p)
