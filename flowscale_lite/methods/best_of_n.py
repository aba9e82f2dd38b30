"""Best-of-N: the baseline every search must beat."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run


@dataclass(frozen=True)
class BestOfN:
    """Draws n samples without looking ahead, and keeps the one of highest reward.

    All n rows advance in one batch: a velocity that cannot hold n rows in memory must chunk them itself.

    Attributes:
        n: number of samples; None for as many as the budget pays for.

    Raises:
        ValueError: n < 1.
    """

    n: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, or None for as many as the budget allows; got {self.n}")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError unless n samples (one, if n is None) can be paid for."""
        each, n = problem.cost * (1 + problem.paid()), self.n or 1
        if n * each > max_nfe:
            raise ValueError(f"{n} sample(s) of {each} NFE each need max_nfe >= {n * each}; got {max_nfe}")

    def start(self, run: Run) -> Particles:
        """n particles of noise."""
        return run.start(self.n or run.rows_left // (1 + run.paid()))

    def advance(self, p: Particles, run: Run) -> Particles:
        """One child each."""
        return run.propose(p)
