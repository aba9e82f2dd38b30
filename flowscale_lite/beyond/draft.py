"""Search with a few-step sibling of the model, finish with the model.

FLUX.1-schnell is such a sibling of FLUX.1-dev: its latents are the same, and one evaluation of it shows the picture
that a noise will become. The problem's look-ahead is the sibling's, `look_ahead.sibling(velocity)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import kernels, look_ahead
from ..methods._common import best_noises, require_budget, require_positive
from ..search import Particles, Problem, Run
from .refine import noise_in, redrawn, renoised


def _check(method: Draft | Cascade, problem: Problem, max_nfe: int, evaluations: int) -> None:
    """Raises ValueError if no sibling looks ahead, or the budget does not pay for the evaluations."""
    if problem.look_ahead.evaluates:
        raise ValueError(f"drafts need look_ahead.sibling(velocity); the problem's is {problem.look_ahead.name!r}")
    what = f"{method.init} first draft(s) and one finished sample"
    require_budget(problem, max_nfe, method.init * problem.look_ahead.price + evaluations, what)


def _check_fields(method: Draft | Cascade, *counts: str) -> None:
    require_positive(method, "init", "cells", "batch", *counts)
    for name in ("drafts", "share", *(("level",) if isinstance(method, Cascade) else ())):
        if not 0 < getattr(method, name) <= 1:
            raise ValueError(f"{name} must lie in (0, 1]; got {getattr(method, name)}")


@dataclass(frozen=True)
class Draft:
    """Searches among noises with the sibling, and finishes the best of them with the model.

    From one noise the model draws much the same picture as its sibling. Drafts climb: a try redraws the noise of a
    random few regions of the best draft so far. The best noises are then finished by the ODE, and the best sample wins.

    Attributes:
        init: first noises, all of them drafts.
        drafts: share of the budget that drafts may take. The rest finishes as many of the best as it pays for.
        share, cells: regions that a try redraws, as in `Refine`.
        batch: tries evaluated at a time.
    """

    init: int = 4
    drafts: float = 0.6
    share: float = 0.4
    cells: int = 4
    batch: int = 5

    def __post_init__(self) -> None:
        _check_fields(self)

    @classmethod
    def multi_step(cls, max_nfe: int, cost: int = 1) -> Draft:
        """Settings for a budget: a quarter of the drafts are first noises. `cost` is the problem's."""
        return cls(init=max(1, round(0.6 * max_nfe / cost / 4)))

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if no sibling looks ahead, or the budget does not finish one sample."""
        _check(self, problem, max_nfe, problem.evaluations_kept())

    def start(self, run: Run) -> Particles:
        """The first drafts."""
        return run.score(run.start(self.init))

    def advance(self, p: Particles, run: Run) -> Particles:
        """The best drafts so far; when no more are due, the best of them a step further."""
        problem = run.problem
        if p.t < problem.times[0]:
            return run.propose(p, kernel=kernels.ode)
        each, total = problem.evaluations_kept(), run.max_nfe // problem.cost
        kept = max(1, (total - round(self.drafts * total)) // each)  # samples that the rest of the budget finishes
        n = min(self.batch, (run.evaluations_left - kept * each) // problem.look_ahead.price)
        if n < 1:
            return run.propose(p.top(min(len(p), run.evaluations_left // each)), kernel=kernels.ode)
        pool = Particles.cat([p, run.score(redrawn(p.best(), run, n, p.t, self.share, self.cells))])
        return pool.top(min(kept, len(pool)))


@dataclass(frozen=True)
class Cascade:
    """Refines a picture with the sibling, then redraws and refines it with the model.

    The sibling refines as `Refine` does, at levels that are the schedule's times after the first. Its best picture is
    noised to `level` and finished by the model. From then on the model refines. It finishes every try in `steps` steps
    of the ODE, so the sample returned is the model's own.

    Attributes:
        init: first noises, of which the best draft is kept.
        drafts: share of the budget that the sibling takes.
        level: the model redraws the sibling's picture from the schedule's first time that is not above it, or its last.
        steps: evaluations of the model a try.
        share, cells: regions that a try redraws, as in `Refine`.
        batch: the sibling's tries at a time; the model's are two.
    """

    init: int = 4
    drafts: float = 0.5
    level: float = 0.8
    steps: int = 5
    share: float = 0.4
    cells: int = 4
    batch: int = 5

    def __post_init__(self) -> None:
        _check_fields(self, "steps")

    @classmethod
    def multi_step(cls, max_nfe: int, cost: int = 1) -> Cascade:
        """Settings for a budget: a quarter of the drafts are first noises; for `schedules.levels`."""
        return cls(init=max(1, round(0.5 * max_nfe / cost / 4)))

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if no sibling looks ahead, or the budget does not finish one draft."""
        _check(self, problem, max_nfe, self.steps)

    def start(self, run: Run) -> Particles:
        """The best of the first drafts."""
        p = run.score(best_noises(run, 1, self.init))
        return replace(p, carry={"own": torch.zeros_like(p.reward)})  # 1 once the model has drawn it

    def advance(self, p: Particles, run: Run) -> Particles:
        """The best picture after a few tries; when the budget is spent, the model's best."""
        problem, finish = run.problem, look_ahead.ode(self.steps)
        total, left, price = run.max_nfe // problem.cost, run.evaluations_left, problem.look_ahead.price
        mine = total - min(round(self.drafts * total), total - self.steps)  # the model's part of the budget
        if not p.carry["own"]:
            n = min(self.batch, (left - mine) // price)
            if n < 1:
                level = next((s for s in problem.times[:-1] if s <= self.level), problem.times[-2])
                drawn = renoised(p, run, noise_in(p, run), level)
                return replace(run.score(drawn, finish), carry={"own": torch.ones_like(p.reward)})
            progress, ahead = (total - left) / (total - mine), None
        else:
            n = min(2, left // self.steps)
            if n < 1:
                return run.place(p, p.x0, 0.0)
            progress, ahead = 1 - left / mine, finish
        levels = problem.times[1:-1] or problem.times[:1]
        s = levels[max(0, int(progress * len(levels)))]
        q = run.score(redrawn(p, run, n, s, self.share, self.cells), ahead).best()
        return q if q.reward > p.reward else p
