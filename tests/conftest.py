"""Shared by the tests: a small problem, and oracles: paths and flow of Gaussian data, written again and differently."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor

from flowscale_lite import COSINE, LINEAR, VP, GaussianMixture, Interpolant, Kernel, Problem, Result, ddim, uniform

PATHS = (LINEAR, COSINE, VP)
MEAN, STD = 0.7, 0.5  # the Gaussian data N(MEAN, STD^2 I)
PLANE = GaussianMixture([[-1.0, 0.5], [1.0, -0.5], [0.3, 1.4]], [0.3, 0.4, 0.2], [0.5, 0.3, 0.2])
MIXTURE = PLANE.velocity(LINEAR)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def wish(x: Tensor) -> Tensor:
    """A reward that peaks beside one of the mixture's modes."""
    return -(x - x.new_tensor([1.2, 1.2])).square().sum(1)


def flat(x: Tensor) -> Tensor:
    """A reward that nothing improves."""
    return x.new_zeros(len(x))


def problem(steps: int = 5, velocity=MIXTURE, reward=wish, **changes) -> Problem:
    """A search in the plane, small enough to be run a thousand times."""
    rest = {"path": LINEAR, "kernel": ddim(), "times": uniform(steps), "shape": (2,)} | changes
    return Problem(velocity, reward, **rest)


def covariance(law: GaussianMixture) -> Tensor:
    """Covariance (D, D) of a mixture: of its means, and within its modes."""
    gap, within = law.means - law.mean(), law.weights @ law.scales**2
    return gap.T @ (law.weights[:, None] * gap) + within * torch.eye(gap.shape[1], dtype=gap.dtype)


def drawn(result: Result) -> list[int]:
    return [step.drawn for step in result.trace]


def levels(name: str, t: float) -> tuple[float, float, float, float]:
    """(alpha, sigma, alpha', sigma sigma') by hand; the last is finite everywhere, unlike sigma' alone."""
    if name == "linear":
        return 1 - t, t, -1.0, t
    if name == "cosine":
        h = math.pi / 2
        return math.cos(h * t), math.sin(h * t), -h * math.sin(h * t), h * math.sin(h * t) * math.cos(h * t)
    beta, total = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t * t
    return (
        math.exp(-total / 2),
        math.sqrt(-math.expm1(-total)),
        -beta / 2 * math.exp(-total / 2),
        beta / 2 * math.exp(-total),
    )


def marginal(name: str, t: float, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Mean and variance of x_t."""
    a, s, _, _ = levels(name, t)
    return a * mean, (a * std) ** 2 + s**2


def gaussian_flow(name: str, mean: float = MEAN, std: float = STD) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity of Gaussian data: m' + (var'/2 var) (x - m), m and var those of x_t. No endpoints involved."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for row, u in enumerate(t.tolist()):
            a, _, da, sds = levels(name, u)
            m, var = marginal(name, u, mean, std)
            out[row] = da * mean + (a * da * std**2 + sds) / var * (x[row] - m)
        return out

    return velocity


def moments_along(
    kernel: Kernel, path: Interpolant, times: tuple[float, ...], mean: float = MEAN, std: float = STD
) -> list[tuple[float, float]]:
    """Exact mean and variance at every time of a sampler that starts from the true marginal.

    The flow of Gaussian data is affine in x and a kernel is affine in (x, v), so two probes give the step x -> A x + b
    and the moments obey m -> A m + b, var -> A^2 var + std^2. No Monte Carlo.
    """
    flow = gaussian_flow(path.name, mean, std)
    m, var = marginal(path.name, times[0], mean, std)
    out = [(m, var)]
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, s in pairwise(times):
        step, noise = kernel(path, probe, flow(probe, probe.new_full((2,), t)), t, s)
        b, slope = step[0, 0].item(), (step[1, 0] - step[0, 0]).item()
        m, var = slope * m + b, slope**2 * var + noise**2
        out.append((m, var))
    return out


class Counting:
    """A velocity that counts the rows it was asked for, and can split them."""

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor], chunk: int | None = None):
        self.velocity, self.chunk, self.rows = velocity, chunk, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),) and t.dtype == x.dtype
        self.rows += len(x)
        if self.chunk is None:
            return self.velocity(x, t)
        return torch.cat([self.velocity(a, b) for a, b in zip(x.split(self.chunk), t.split(self.chunk), strict=True)])


def never(*_: Tensor) -> Tensor:
    raise AssertionError("evaluated, though the call should have been refused before any compute")
