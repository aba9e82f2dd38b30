"""Hill climbing on the picture, region by region."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import redraw
from ..search import Particles, Problem, Run
from ._common import best_noises, require_budget, require_positive


@dataclass(frozen=True)
class Refine:
    """Redraws the noise of a few regions of the best picture so far, and keeps what is better.

    A try takes the record holder apart into its posterior means, puts them together again at a noise level s, with
    fresh noise in a random few of the picture's regions (`kernels.redraw`), and looks ahead from there, at one
    evaluation. If its reward is better it is the new record holder. Levels are the schedule's times after the first, an
    equal part of the budget each: high ones may change what is there, low ones how it looks. When the budget is spent
    the record holder's posterior mean is the sample; so this is for few-step models, whose posterior mean is a sharp
    picture. A trajectory has as many chances as steps, and a new draw changes all of it; here any number of tries can
    put right one region and leave the others as they are. The problem's kernel is not used.

    Attributes:
        init: initial noises, of which the best by look-ahead reward is the first record holder.
        share: of the regions that are redrawn in a try, at least one.
        cells: regions along each side of a sample, or as many as it has entries. A sample (C, H, W) is cut along H and
            W, one of fewer axes along all of them.
        batch: tries evaluated at a time, of which the best counts; 1 wastes none.

    Raises:
        ValueError: a field is out of range.
    """

    init: int = 4
    share: float = 0.4
    cells: int = 4
    batch: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "init", "cells", "batch")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1]; got {self.share}")

    @classmethod
    def few_step(cls, max_nfe: int, cost: int = 1) -> Refine:
        """Settings for a few-step model, found on tiny-flux schnell: a quarter of the budget on first noises; to be
        used with `schedules.levels`. `cost` is the problem's: NFE of one evaluation."""
        return cls(init=max(1, max_nfe // cost // 4))

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for a try at every level."""
        paid = problem.evaluations_ahead()
        require_budget(problem, max_nfe, self.init + paid, f"{self.init} noise(s) and a try at each of {paid} level(s)")

    def start(self, run: Run) -> Particles:
        """The best noise."""
        return run.score(best_noises(run, 1, self.init))

    def advance(self, p: Particles, run: Run) -> Particles:
        """The record holder after a batch of tries; when the budget is spent, its posterior mean."""
        levels = run.problem.times[1:-1]
        rows = run.max_nfe // run.problem.cost - self.init
        if run.evaluations_left == 0 or not levels:
            return run.propose(p, s=0.0, kernel=redraw())
        spent = rows - run.evaluations_left
        level = spent * len(levels) // rows
        n = min(self.batch, -(-(level + 1) * rows // len(levels)) - spent)  # not beyond the level
        where = regions(n, run.problem.shape, self.share, self.cells, run.generator).to(p.x.device)
        z = run.noise(n) / run.problem.path.at(run.problem.times[0])[1]
        same = p[torch.zeros(n, dtype=torch.int64, device=p.x.device)]
        q = run.score(run.propose(same, s=levels[level], kernel=redraw(where, z))).best()
        return q if q.reward > p.reward else p


def regions(n: int, shape: tuple[int, ...], share: float, cells: int, generator: torch.Generator) -> Tensor:
    """n random choices of a share of the regions: bool (n, *D), or 1 in place of the channels' size."""
    sides = shape[1:] if len(shape) > 2 else shape
    grid = [min(cells, side) for side in sides]
    order = torch.rand(n, math.prod(grid), generator=generator, device=generator.device).argsort(1)
    chosen = (order < max(1, round(share * math.prod(grid)))).view(n, *grid)
    for axis, (side, parts) in enumerate(zip(sides, grid, strict=True), 1):
        chosen = chosen.index_select(axis, torch.arange(side, device=chosen.device) * parts // side)
    return chosen.view(n, *[1] * (len(shape) - len(sides)), *sides)
