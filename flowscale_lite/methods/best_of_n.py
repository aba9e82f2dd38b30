"""Best-of-N: the baseline every search must beat. With a guide its samples are those of DPS."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run
from ._common import best_noises, evaluations_at_noise, require_budget, require_positive
from .gradient import Guide, guide_price


@dataclass(frozen=True)
class BestOfN:
    """Draws n samples without selecting on the way, and keeps the one of highest reward.

    All n rows advance in one batch: a velocity that cannot hold n rows in memory must chunk them itself.

    Attributes:
        n: number of samples; None for as many as the budget pays for, less than one being left.
        init: initial noises of each sample, of which the best by look-ahead reward is kept; 1 does not look ahead.
        guide: steers every sample by the gradient of the look-ahead reward: DPS (Chung et al., arXiv 2209.14687).
    """

    n: int | None = None
    init: int = 1
    guide: Guide | None = None

    def __post_init__(self) -> None:
        require_positive(self, "n", "init")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if n samples (one, if n is None) cannot be paid for, or a guide would steer nothing."""
        each, n = self._price(problem), self.n or 1
        require_budget(problem, max_nfe, n * each, f"{n} sample(s) of {each} evaluations each")

    def start(self, run: Run) -> Particles:
        """The best of the initial noises of every sample."""
        return best_noises(run, self.n or run.evaluations_left // self._price(run.problem), self.init)

    def advance(self, p: Particles, run: Run) -> Particles:
        """One child each."""
        return run.propose(self.guide(p, run) if self.guide else p)

    def _price(self, problem: Problem) -> int:
        """Evaluations a sample."""
        at_noise = evaluations_at_noise(problem, self.init)
        return at_noise + problem.evaluations_ahead() + guide_price(self.guide, problem)
