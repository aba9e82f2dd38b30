"""Search over Paths (Ma et al., arXiv 2501.09732)."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import ode, renoise
from ..search import Particles, Problem, Run
from ._common import best_noises, require_budget, require_positive, require_posterior_mean


@dataclass(frozen=True)
class SearchOverPaths:
    """Keeps a few paths: again and again renoises copies of each up, runs the ODE further down, and keeps the best.

    The first leg runs the ODE down `down` intervals of the schedule from noise. Every later one goes up `up` and down
    `down` intervals, and the best of all copies are kept. The problem's kernel is not used.

    Attributes:
        paths: states kept.
        copies: renoised copies of a path in each leg; None divides what the budget leaves equally.
        init: initial noises of each path, of which the best by look-ahead reward is kept.
        up, down: intervals of the schedule, up < down.
    """

    paths: int = 2
    copies: int | None = None
    init: int = 1
    up: int = 1
    down: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "paths", "copies", "init", "up", "down")
        if self.up >= self.down:
            raise ValueError(f"a path must go further down than up; got up = {self.up}, down = {self.down}")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the schedule is over in one leg, or the budget does not pay for a copy in every leg."""
        require_posterior_mean(problem)
        first, *rest = self._legs(problem, problem.times[0])
        if not rest:
            raise ValueError(f"a schedule of {len(problem.times) - 1} intervals is over in one leg of {self.down}")
        rows = self.paths * (self.init + _price([first]) + (self.copies or 1) * _price(rest))
        require_budget(problem, max_nfe, rows, f"{self.paths} path(s) with a copy in every leg")

    def start(self, run: Run) -> Particles:
        """The best of the initial noises of every path."""
        return best_noises(run, self.paths, self.init)

    def advance(self, p: Particles, run: Run) -> Particles:
        """The ends of one leg: all of the first, the best of every other."""
        p = run.evaluate(p)
        leg, *rest = self._legs(run.problem, p.t)
        first = p.t == run.problem.times[0]
        if not first:
            copies = self.copies or run.evaluations_left // (self.paths * _price([leg, *rest]))
            p, leg = run.propose(p, copies, s=leg[0], kernel=renoise), leg[1:]
        for s in leg:
            p = run.propose(p, s=s, kernel=ode)
        return p if first else run.score(p).top(self.paths)

    def _legs(self, problem: Problem, t: float) -> list[tuple[float, ...]]:
        """The times visited in each leg ahead of t."""
        times, i = problem.times, problem.times.index(t)
        legs = [] if i else [times[1 : 1 + self.down]]
        i = i or self.down
        while i < len(times) - 1:
            legs.append(times[i - self.up : i - self.up + self.down + 1])
            i += self.down - self.up
        return legs


def _price(legs: list[tuple[float, ...]]) -> int:
    """Evaluations of one path through these legs; the landing at t = 0 is free."""
    return sum(s > 0 for leg in legs for s in leg)
