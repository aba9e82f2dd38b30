"""The paper's experiment, once: its samplers, and the settings of every method (arXiv 2503.19385).

500 velocity evaluations and 10 steps. Where the paper's code and text differ the code is followed, and said so here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from .. import kernels, schedules
from ..interpolants import LINEAR, VP, Interpolant, convert
from ..kernels import Kernel
from ..methods import RBF, SMC, SVDD, BestOfN, Blockwise, Guide, SearchOverPaths
from ..problem import Problem
from ..schedules import Times
from ..search import Method

NFE, STEPS = 500, 10


class Sampler(NamedTuple):
    """A kernel, the times it steps to, and the path on whose states it works."""

    kernel: Kernel
    times: Times
    path: Interpolant = LINEAR

    def of(self, problem: Problem) -> Problem:
        """A problem on the linear path, sampled this way."""
        velocity = problem.velocity if self.path is LINEAR else convert(problem.velocity, LINEAR, self.path)
        return replace(problem, velocity=velocity, kernel=self.kernel, times=self.times, path=self.path)


_UNIFORM, _QUADRATIC = schedules.uniform(STEPS), kernels.sde(kernels.quadratic())
SAMPLERS = {
    "ODE": Sampler(kernels.ode, _UNIFORM),
    "linear SDE": Sampler(_QUADRATIC, _UNIFORM),
    "VP-SDE": Sampler(kernels.sde(kernels.vp_diffusion()), schedules.paper_vp(STEPS)),
    "VP-SDE, on VP": Sampler(_QUADRATIC, tuple(math.sqrt(1 - (1 - t) ** 2) for t in _UNIFORM), VP),
}
"""g = 3 t^2 everywhere, on VP in VP's time. "VP-SDE" is the same SDE written on the linear path; its steps are of the
same length, but not the same to the last digit of a step. "VP-SDE, on VP" converts the velocity, as the paper does."""

METHODS: dict[str, Method] = {
    "best-of-n": BestOfN(50),
    "search over paths": SearchOverPaths(paths=2),
    "smc": SMC(50, tau=0.5, scheme="multinomial", tempering=0.0),
    "code": Blockwise(chains=2, copies=25),
    "svdd": SVDD(chains=2, copies=25),
    "rbf": RBF.published(),
}
"""SMC's temperature is ours, since it depends on the reward's unit; it does not temper. Search over paths makes as many
copies as the budget pays for; the paper's 5 a path would spend 148. In the paper's code SVDD and CoDe draw
25 identical states before the first step, and count them; here they are drawn once, so both spend 452 of the 500."""

CONTROLS: dict[str, Method] = {
    "plain": BestOfN(1),
    "svdd, 25 first noises": SVDD(chains=2, init=25, copies=25),
    "svdd, one chain, 50 first noises": SVDD(chains=1, init=50),
    "code, 25 first noises": Blockwise(chains=2, init=25, copies=25),
}
"""RBF searches among first noises, SVDD and CoDe do not. With the same first noises they spend the same 500."""

GUIDE = Guide(0.1, normalised=True)
"""Of the paper's differentiable task. The strength is ours, since it depends on the reward."""

GUIDED: dict[str, Method] = {
    "dps": BestOfN(1, guide=GUIDE),
    "svdd + dps": SVDD(init=25, guide=GUIDE),
    "rbf + dps": replace(RBF.published(), guide=GUIDE),
}
