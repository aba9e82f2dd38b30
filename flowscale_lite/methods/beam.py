"""A beam search on the look-ahead reward: several states compete."""

from __future__ import annotations

from dataclasses import dataclass

from ..search import Particles, Problem, Run
from ._common import best_noises, require_budget, require_noise, require_positive
from .gradient import Guide, guide_price
from .stopping import BestOfEnough


@dataclass(frozen=True)
class Beam:
    """Draws alike from several states and keeps the best candidates, whosever they are.

    A beam forgives an early mistake, so it suits multi-step models, whose look-ahead says little near the noise. Quotas
    roll over as in RBF with `BestOfEnough`, counted for each state.

    Attributes:
        states: states kept.
        init: initial noises of each, of which the best by look-ahead reward is kept.
        enough: candidates of one state that do for a transition far from the end, see `BestOfEnough`.
        select_below: time from which candidates are selected. Above it, where the look-ahead of a multi-step model says
            nothing, one a state is drawn.
        narrow: the number of states kept falls geometrically from `states` to 1.
        guide: steers each state, once for all its candidates, by the gradient of the look-ahead reward.
    """

    states: int = 8
    init: int = 1
    enough: int = 24
    select_below: float = 1.0
    narrow: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        require_positive(self, "states", "init", "enough")
        if not 0 < self.select_below <= 1:
            raise ValueError(f"select_below must lie in (0, 1]; got {self.select_below}")

    @classmethod
    def multi_step(cls, max_nfe: int, steps: int = 10, cost: int = 1) -> Beam:
        """Settings found on tiny-flux dev in 10 steps: a state for about every 32 evaluations (3 a step where steps are
        more), and selection from t = 0.8 on. To be used with `schedules.logit_normal`. `cost` is the problem's."""
        return cls(states=max(2, max_nfe // cost // max(32, 3 * steps)), select_below=0.8)

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget is too small for the states, if no transition selects, or without noise."""
        require_noise(problem)
        price, ahead = problem.look_ahead.price, problem.evaluations_ahead()
        if ahead and not self._selecting(problem):
            raise ValueError(f"no transition lands at select_below = {self.select_below} or below; {problem.times}")
        each = (self.init + ahead) * price + problem.evaluations_kept() + guide_price(self.guide, problem)
        what = f"{self.states} state(s) of {self.init} first noises and a candidate at each of {ahead} transitions"
        require_budget(problem, max_nfe, self.states * each, what)

    def start(self, run: Run) -> Particles:
        """The best of the first noises of every state."""
        return run.score(best_noises(run, self.states, self.init))

    def advance(self, p: Particles, run: Run) -> Particles:
        """The best candidates of all states."""
        ahead = run.problem.evaluations_ahead(p.t)
        p = run.evaluate(p)
        p = self.guide(p, run) if self.guide else p
        if ahead == 0:
            return run.propose(p)
        s = run.next_time(p.t)
        if s > self.select_below:
            return run.score(run.propose(p))
        problem, price, selecting = run.problem, run.problem.look_ahead.price, self._selecting(run.problem)
        # What all transitions that select share, and what is left of it.
        each = self.init + run.problem.evaluations_ahead() - selecting
        reserved = each * price + problem.evaluations_kept() + guide_price(self.guide, problem)
        share = run.max_nfe // problem.cost - self.states * reserved
        kept = round(self.states ** ((ahead - 1) / run.problem.evaluations_ahead())) if self.narrow else self.states
        left = run.evaluations_left - kept * (problem.evaluations_kept(s) + guide_price(self.guide, problem, s))
        quota = left - share * (ahead - 1) // selecting
        k = len(p) * price
        q = run.score(run.propose(p, BestOfEnough(self.enough).most(quota // k, left // k, ahead)))
        return q.top(kept)

    def _selecting(self, problem: Problem) -> int:
        """Transitions to pay for in which candidates are selected."""
        return sum(0 < s <= self.select_below for s in problem.times[1:])
