"""Inference-time scaling for flow models: search for samples of high reward within a budget of velocity evaluations.

Data flows one way: a model or a toy -> `Problem` -> `search` with a method -> `Result`. Time runs from noise at t = 1
to data at t = 0. The method taught is Rollover Budget Forcing (Kim, Yoon, Hwang & Sung, arXiv 2503.19385).

Importing the package needs torch only.
"""

from .interpolants import COSINE, LINEAR, VP, Interpolant, Velocity, convert, vp
from .kernels import (
    Diffusion,
    Kernel,
    ddim,
    equivalent_sde,
    memoryless,
    ode,
    quadratic,
    redraw,
    renoise,
    sde,
    vp_diffusion,
)
from .methods import DPS, RBF, SMC, SVDD, BestOfN, Blockwise, Funnel, Guide, Refine, SearchOverPaths, ZeroOrder, log_z
from .resampling import ess, multinomial, residual, stratified, systematic
from .rewards import Decoded, Reward, chunked, rounded
from .schedules import levels, logit_normal, paper_vp, shifted, uniform
from .search import BudgetExceeded, Method, Particles, Problem, Result, Run, Step, search
from .toys import GaussianMixture, LinearReward, QuadraticReward

__version__ = "0.1.0"

__all__ = [
    "COSINE",
    "DPS",
    "LINEAR",
    "RBF",
    "SMC",
    "SVDD",
    "VP",
    "BestOfN",
    "Blockwise",
    "BudgetExceeded",
    "Decoded",
    "Diffusion",
    "Funnel",
    "GaussianMixture",
    "Guide",
    "Interpolant",
    "Kernel",
    "LinearReward",
    "Method",
    "Particles",
    "Problem",
    "QuadraticReward",
    "Refine",
    "Result",
    "Reward",
    "Run",
    "SearchOverPaths",
    "Step",
    "Velocity",
    "ZeroOrder",
    "chunked",
    "convert",
    "ddim",
    "equivalent_sde",
    "ess",
    "levels",
    "log_z",
    "logit_normal",
    "memoryless",
    "multinomial",
    "ode",
    "paper_vp",
    "quadratic",
    "redraw",
    "renoise",
    "residual",
    "rounded",
    "sde",
    "search",
    "shifted",
    "stratified",
    "systematic",
    "uniform",
    "vp",
    "vp_diffusion",
]
