"""A beam that narrows: from many states to one."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run
from ._common import require_budget, require_noise, require_positive


@dataclass(frozen=True)
class Funnel:
    """Keeps many states while little is known of them, and few when much is, at the same price a transition.

    Draws `init` noises and keeps the best `states` by look-ahead reward. At every transition the evaluations left are
    divided by the transitions left, and shared equally among the states as candidates; of all candidates the best are
    kept, whosever they are, in a number that falls geometrically from `states` to 1. So the look-ahead decides over
    many states early, when it says little and a wrong choice could not be undone, and over many candidates of one state
    late. What does not divide rolls over.

    Attributes:
        init: initial noises, at least `states`.
        states: kept of them.

    Raises:
        ValueError: a field is below 1, or init below states.
    """

    init: int = 16
    states: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "init", "states")
        if self.init < self.states:
            raise ValueError(f"init must be at least states; got {self.init} and {self.states}")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for a candidate of every first state at every transition."""
        rows = self.init + self.states * problem.evaluations_ahead()
        require_budget(problem, max_nfe, rows, f"{self.init} noises and {self.states} states to the end")
        require_noise(problem)

    def start(self, run: Run) -> Particles:
        """The best noises."""
        return _top(run.score(run.start(self.init)), self.states)

    def advance(self, p: Particles, run: Run) -> Particles:
        """The best candidates of all states, fewer than there were."""
        ahead = run.evaluations_ahead(p.t)
        if ahead == 0:
            return run.propose(p)
        q = run.score(run.propose(p, run.evaluations_left // (ahead * len(p))))
        return _top(q, round(self.states ** ((ahead - 1) / run.evaluations_ahead())))


def _top(p: Particles, k: int) -> Particles:
    return p[p.reward.topk(k).indices]
