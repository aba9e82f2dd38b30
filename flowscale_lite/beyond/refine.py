"""Hill climbing on the picture, region by region."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods._common import best_noises, require_budget, require_positive
from ..search import Particles, Problem, Run


@dataclass(frozen=True)
class Refine:
    """Redraws the noise of a few regions of the best picture so far, and keeps what is better.

    A try takes the best picture so far, the record holder, apart into its look-ahead estimate and its noise. It puts
    them together again at a noise level s, with fresh noise in a random few of the picture's regions, and looks ahead
    from there. If its reward is better it is the new record holder. Levels are the schedule's times after the first, an
    equal part of the budget each. When the budget is spent, the record holder's estimate is the sample. So this is for
    models whose look-ahead is a sharp picture, as that of few-step models is. The problem's kernel is not used.

    Attributes:
        init: initial noises, of which the best by look-ahead reward is the first record holder.
        share: of the regions that are redrawn in a try, at least one.
        cells: regions along each side of a sample: (C, H, W) is cut along H and W, one of fewer axes along all of them.
        batch: tries evaluated at a time, of which the best counts; 1 wastes none.
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
        """Settings found on tiny-flux schnell: a quarter of the budget on first noises; for `schedules.levels`."""
        return cls(init=max(1, max_nfe // cost // 4))

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for a try at every level."""
        levels, price = problem.evaluations_ahead(), problem.look_ahead.price
        what = f"{self.init} noise(s) and a try at each of {levels} level(s)"
        require_budget(problem, max_nfe, (self.init + levels) * price, what)

    def start(self, run: Run) -> Particles:
        """The best noise."""
        return run.score(best_noises(run, 1, self.init))

    def advance(self, p: Particles, run: Run) -> Particles:
        """The record holder after a batch of tries; when the budget is spent, its look-ahead estimate."""
        levels, price = run.problem.times[1:-1], run.problem.look_ahead.price
        tries = run.max_nfe // run.problem.cost // price - self.init
        made = tries - run.evaluations_left // price
        if made == tries or not levels:
            return run.place(p, p.x0, 0.0)
        level = made * len(levels) // tries
        until = math.ceil((level + 1) * tries / len(levels))  # the number of tries after which the next level begins
        q = run.score(redrawn(p, run, min(self.batch, until - made), levels[level], self.share, self.cells)).best()
        return q if q.reward > p.reward else p


def redrawn(p: Particles, run: Run, n: int, s: float, share: float, cells: int) -> Particles:
    """n descendants at level s of the one particle p: its estimate, with the noise of some regions drawn afresh."""
    start = run.problem.path.at(run.problem.times[0])[1]
    where = regions(n, run.problem.shape, share, cells, run.generator).to(p.x.device)
    return renoised(p, run, torch.where(where, run.noise(n) / start, noise_in(p, run)), s)


def noise_in(p: Particles, run: Run) -> Tensor:
    """The noise (K, *D) that the states hold beside their estimates."""
    a, sigma, _, _ = run.problem.path.at(p.t)
    return (p.x - a * p.x0) / sigma


def renoised(p: Particles, run: Run, noise: Tensor, s: float) -> Particles:
    """Descendants at level s of the one particle p: its estimate with each of the noises (n, *D)."""
    a, sigma, _, _ = run.problem.path.at(s)
    rows = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
    return run.place(p[rows], a * p.x0 + sigma * noise, s)


def regions(n: int, shape: tuple[int, ...], share: float, cells: int, generator: torch.Generator) -> Tensor:
    """n random choices of a share of the regions: bool (n, *D), or 1 in place of the channels' size."""
    sides = shape[1:] if len(shape) > 2 else shape
    grid = [min(cells, side) for side in sides]
    order = torch.rand(n, math.prod(grid), generator=generator, device=generator.device).argsort(1)
    chosen = (order < max(1, round(share * math.prod(grid)))).view(n, *grid)
    for axis, (side, parts) in enumerate(zip(sides, grid, strict=True), 1):
        chosen = chosen.index_select(axis, torch.arange(side, device=chosen.device) * parts // side)
    return chosen.view(n, *[1] * (len(shape) - len(sides)), *sides)
