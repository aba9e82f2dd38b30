"""SVDD, CoDe and Search over Paths against loops written without the package; every method's account."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import Counting, never, seeded

from flowscale_lite import (
    LINEAR,
    SMC,
    SVDD,
    Blockwise,
    GaussianMixture,
    Problem,
    SearchOverPaths,
    gaussian,
    ode,
    search,
    uniform,
)

MIXTURE = GaussianMixture([[-1.0, 0.5], [1.0, -0.5], [0.3, 1.4]], [0.3, 0.4, 0.2], [0.5, 0.3, 0.2]).velocity(LINEAR)


def reward(x):
    return -(x - x.new_tensor([1.2, 1.2])).square().sum(1)


def problem(steps=5, velocity=MIXTURE, reward=reward, kernel=None, **rest) -> Problem:
    return Problem(velocity, reward, LINEAR, kernel or gaussian(1.0), uniform(steps), (2,), **rest)


def drawn(result) -> list[int]:
    return [step.drawn for step in result.trace]


def at(x, t):
    return MIXTURE(x, torch.full((len(x),), t))


def ancestral(x, v, t, s, g):
    """The exact Gaussian transition on the linear path, by hand."""
    rho = s * (1 - t) / ((1 - s) * t)
    z = torch.randn(x.shape, generator=g) if s > 0 else 0.0
    return (1 - s) * (x - t * v) + s * rho * (x + (1 - t) * v) + s * math.sqrt(1 - rho**2) * z


def best_rows(x, t, groups):
    """The best of each of `groups` runs of neighbouring rows, by look-ahead reward."""
    look = reward(x - t * at(x, t)).view(groups, -1)
    return x.view(groups, -1, 2)[torch.arange(groups), look.argmax(1)]


def plain_blockwise(steps, chains, init, block, copies, g):
    times = uniform(steps)
    x = torch.randn(chains * init, 2, generator=g)
    x = best_rows(x, 1.0, chains) if init > 1 else x
    for k, (t, s) in enumerate(pairwise(times)):
        if k % block == 0 and t > times[-2]:
            x = x.repeat_interleave(copies, 0)
        x = ancestral(x, at(x, t), t, s, g)
        if (k + 1) % block == 0 or s == 0:
            x = best_rows(x, s, chains) if s > 0 else x
    return x[reward(x).argmax()]


@pytest.mark.parametrize(("chains", "init", "copies"), [(1, 1, 4), (2, 3, 5), (3, 1, 1)])
def test_svdd_is_this_loop(chains, init, copies):
    for seed in range(5):
        x = plain_blockwise(6, chains, init, 1, copies, seeded(seed))
        result = search(problem(6), SVDD(chains, init, copies), max_nfe=200, generator=seeded(seed))
        torch.testing.assert_close(result.best, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 6, 9])
def test_blockwise_is_this_loop(block):
    for seed in range(5):
        x = plain_blockwise(6, 2, 2, block, 4, seeded(seed))
        result = search(problem(6), Blockwise(2, 2, block, 4), max_nfe=200, generator=seeded(seed))
        torch.testing.assert_close(result.best, x, rtol=1e-4, atol=1e-4)


def plain_paths(steps, paths, copies, up, down, g):
    times = uniform(steps)
    x = torch.randn(paths, 2, generator=g)
    i, rows = 0, paths
    while True:
        for _ in range(down):
            if i < steps:
                x = x + (times[i + 1] - times[i]) * at(x, times[i])
                i += 1
                rows += len(x) * (i < steps)
        if len(x) > paths:
            x = x[reward(x - times[i] * at(x, times[i]) if i < steps else x).topk(paths).indices]
        if i == steps:
            return x[reward(x).argmax()], rows
        t, s = times[i], times[i - up]
        b = (1 - s) / (1 - t)
        x = x.repeat_interleave(copies, 0)
        x = b * x + math.sqrt(s**2 - (b * t) ** 2) * torch.randn(x.shape, generator=g)
        i, rows = i - up, rows + len(x)


@pytest.mark.parametrize(("up", "down"), [(1, 2), (1, 3), (2, 3), (3, 4), (1, 5)])
def test_search_over_paths_is_this_loop(up, down):
    for seed in range(5):
        x, rows = plain_paths(6, 2, 5, up, down, seeded(seed))
        method = SearchOverPaths(paths=2, copies=5, up=up, down=down)
        result = search(problem(6, kernel=ode), method, max_nfe=500, generator=seeded(seed))
        assert result.nfe == rows
        torch.testing.assert_close(result.best, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [SVDD(), Blockwise(), SMC()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kernel", [ode, gaussian(0.0)], ids=lambda k: k.name)
def test_a_deterministic_kernel_is_refused_where_candidates_would_coincide(method, kernel):
    with pytest.raises(ValueError, match="coincide"):
        search(problem(velocity=never, reward=never, kernel=kernel), method, max_nfe=100, generator=seeded())


@pytest.mark.parametrize("method", [SVDD(), Blockwise(), SMC(), SearchOverPaths()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("cost", [1, 3])
def test_the_budget_is_spent_and_never_exceeded(method, cost):
    for budget in range(1, 200):
        velocity = Counting(MIXTURE)
        setup = problem(velocity=velocity, cost=cost)
        try:
            method.check(setup, budget)
        except ValueError as error:
            assert "max_nfe >=" in str(error)
            continue
        result = search(setup, method, max_nfe=budget, generator=seeded())
        assert cost * velocity.rows == result.nfe == budget - result.left
        assert result.left < 5 * cost * 2
