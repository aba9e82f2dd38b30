"""Zero-order search on the initial noise (Ma et al., arXiv 2501.09732)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..kernels import ode
from ..search import Particles, Problem, Run
from ._common import best_noises, evaluations_at_noise, require_budget, require_positive


@dataclass(frozen=True)
class ZeroOrder:
    """Hill climbing on the initial noise: samples its neighbours' noises by the ODE, moves to the best, and so on.

    A neighbour of noise n is sqrt(1 - radius^2) n + radius z with fresh noise z, which is Gaussian like n. Rounds go on
    until the budget is spent; the best sample of all rounds is returned. The problem's kernel is not used.

    Attributes:
        neighbours: noises a round.
        radius: 1 draws afresh (best-of-N); near 0 neighbours hardly differ.
        init: initial noises, of which the best by look-ahead reward is the first to be sampled.
    """

    neighbours: int = 4
    radius: float = 0.3
    init: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "neighbours", "init")
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius must lie in (0, 1]; got {self.radius}")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if the budget does not pay for one sample."""
        evaluations = evaluations_at_noise(problem, self.init) + problem.evaluations_ahead()
        require_budget(problem, max_nfe, evaluations, f"one sample, the best of {self.init} noise(s),")

    def start(self, run: Run) -> Particles:
        """The first noise."""
        p = best_noises(run, 1, self.init)
        return replace(p, carry={"pivot": p.x, "sample": p.x, "record": torch.full_like(p.logw, -math.inf)})

    def advance(self, p: Particles, run: Run) -> Particles:
        """The pivot's neighbours, after a round; when the budget is spent, the best sample of all rounds."""
        noise = p.x
        while p.t > 0:
            p = run.propose(p, kernel=ode)
        q = run.score(p).best()
        carry = {"pivot": noise[q.parent], "sample": q.x, "record": q.reward}
        carry = carry if q.reward > q.carry["record"] else q.carry
        n = min(self.neighbours, run.evaluations_left // (1 + run.problem.evaluations_ahead()))
        if n == 0:
            return replace(q, x=carry["sample"], x0=carry["sample"], reward=carry["record"])
        near = math.sqrt(1 - self.radius**2) * carry["pivot"] + self.radius * run.noise(n)
        parent = q.parent.expand(n)  # the best row, which is the pivot or carries it
        q = run.start(n, near)
        carry = {name: value.expand(n, *value.shape[1:]) for name, value in carry.items()}
        return replace(q, carry=carry, parent=parent)
