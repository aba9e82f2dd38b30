"""Inference-time scaling for flow models: search for samples of high reward within a budget of velocity evaluations.

Data flows one way: a model or a toy -> `Problem` -> `search` with a method -> `Result`. Time runs from noise at t = 1
to data at t = 0. The method taught is Rollover Budget Forcing (Kim, Yoon, Hwang & Sung, arXiv 2503.19385). Importing
the package needs torch only; `flowscale_lite.flux`, `judges`, `experiments` and `plots` need more.
"""

from . import look_ahead
from .beyond import Cascade, Draft, Refine
from .interpolants import COSINE, LINEAR, VP, Interpolant, Velocity, convert, vp
from .kernels import Diffusion, Kernel, ddim, equivalent_sde, memoryless, ode, quadratic, renoise, sde, vp_diffusion
from .look_ahead import LookAhead
from .methods import (
    RBF,
    SMC,
    SVDD,
    Beam,
    BestOfEnough,
    BestOfN,
    BestOfQuota,
    Blockwise,
    FirstImprovement,
    Guide,
    SearchOverPaths,
    ZeroOrder,
    log_z,
)
from .problem import Particles, Problem, Result, Step
from .resampling import ess, multinomial, residual, stratified, systematic
from .rewards import Reward, chunked, decoded, rounded
from .schedules import levels, logit_normal, paper_vp, shifted, uniform
from .search import BudgetExceeded, Method, Run, Search, search, steps
from .tiny.toys import GaussianMixture, LinearReward, QuadraticReward

__version__ = "0.1.0"
