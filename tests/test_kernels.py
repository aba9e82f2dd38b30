import math
from itertools import pairwise

import pytest
import torch
from conftest import MEAN, PATHS, gaussian_flow, levels, marginal, moments_along, seeded
from torch import Tensor, float64

from flowscale_lite import (
    COSINE,
    LINEAR,
    VP,
    Diffusion,
    GaussianMixture,
    Interpolant,
    Kernel,
    convert,
    ddim,
    equivalent_sde,
    memoryless,
    ode,
    paper_vp,
    quadratic,
    renoise,
    sde,
    uniform,
    vp_diffusion,
)

X = torch.linspace(-2, 2, 6, dtype=float64).view(3, 2)


def early(n: int) -> tuple[float, ...]:
    """The paper's grid without its coarse end, where it refines as sqrt(1/n) only."""
    return tuple(t for t in paper_vp(n) if t > 0.3)


def worst(kernel: Kernel, path: Interpolant, times: tuple[float, ...]) -> float:
    """Largest error of mean or variance along the way, against the marginals."""
    got = moments_along(kernel, path, times)
    return max(
        abs(a - b) for t, m in zip(times, got, strict=True) for a, b in zip(m, marginal(path.name, t), strict=True)
    )


# Moments, by exact recursion on Gaussian data

ODES = [*((ode, path, uniform) for path in PATHS), (sde(lambda t: 0.0), VP, uniform)]
SDES = [(sde(g), path, uniform) for g in (quadratic(), memoryless(VP)) for path in PATHS]
ETAS = [(ddim(eta), path, uniform) for eta in (0.0, 0.5, 1.0) for path in PATHS]
CONVERTED = [(sde(vp_diffusion()), LINEAR, early), (sde(vp_diffusion(memoryless(VP))), LINEAR, early)]


@pytest.mark.parametrize(
    ("kernel", "path", "grid"), ODES + SDES + ETAS + CONVERTED, ids=lambda v: getattr(v, "name", "")
)
def test_every_kernel_keeps_the_marginals_with_an_error_of_order_one(kernel, path, grid):
    """The worst error of mean or variance along the way falls to nothing like the step: slope 1 in log over log."""
    coarse, fine = worst(kernel, path, grid(100)), worst(kernel, path, grid(200))
    assert fine < 0.025
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.16)


def test_the_biases_at_ten_steps_are_the_ones_documented():
    times = uniform(10)

    def inflation(kernel: Kernel) -> list[float]:
        got = moments_along(kernel, LINEAR, times)
        return [var / marginal("linear", t)[1] for t, (_, var) in zip(times, got, strict=True)]

    assert max(inflation(sde(quadratic()))) == pytest.approx(1.38, abs=0.01)
    assert [inflation(k)[-1] for k in (sde(quadratic()), ode, ddim(1.0))] == pytest.approx([0.97, 0.74, 0.60], abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("times", [(1.0, 0.7, 0.2, 0.0), (0.9, 0.1), (1.0, 0.0)])
def test_ddim_transitions_are_exact_for_point_mass_data(eta, path, times):
    for t, (m, var) in zip(times, moments_along(ddim(eta), path, times, std=0.0), strict=True):
        assert (m, var) == pytest.approx(marginal(path.name, t, std=0.0), rel=1e-7, abs=1e-7)


# One step


@pytest.mark.parametrize("g", [0.0, 1.5])
def test_euler_maruyama_by_hand(g):
    t, s = 0.6, 0.45
    m, var = marginal("linear", t)
    v = gaussian_flow("linear")(X, X.new_full((3,), t))
    mean, std = sde(lambda u: g * u)(LINEAR, X, v, t, s)
    score = -(X - m) / var
    torch.testing.assert_close(mean, X - 0.15 * (v - (g * t) ** 2 / 2 * score))
    assert std == pytest.approx(g * t * math.sqrt(0.15))


def test_the_last_step_of_the_sde_is_the_odes():
    v = gaussian_flow("linear")(X, X.new_full((3,), 0.3))
    mean, std = sde(quadratic())(LINEAR, X, v, 0.3, 0.0)
    assert std == 0 and torch.equal(mean, ode(LINEAR, X, v, 0.3, 0.0)[0])


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_ddim_at_eta_one_reverses_the_forward_process(path):
    """Forward, x_t = (alpha_t/alpha_s) x_s + noise: so Cov(x_t, x_s) = (alpha_t/alpha_s) sigma_s^2 given the data."""
    t, s = 0.8, 0.3
    probe = torch.tensor([[0.0], [1.0]], dtype=float64)
    mean, _ = ddim(1.0)(path, probe, gaussian_flow(path.name, std=0.0)(probe, probe.new_full((2,), t)), t, s)
    a_t, s_t, _, _ = levels(path.name, t)
    a_s, s_s, _, _ = levels(path.name, s)
    assert (mean[1] - mean[0]).item() * s_t**2 == pytest.approx(a_t / a_s * s_s**2, rel=1e-8)


def test_ddim_at_eta_zero_is_the_ode_on_the_linear_path():
    v = gaussian_flow("linear")(X, X.new_full((3,), 0.8))
    mean, std = ddim(0.0)(LINEAR, X, v, 0.8, 0.3)
    assert std == 0
    torch.testing.assert_close(mean, ode(LINEAR, X, v, 0.8, 0.3)[0])


def test_ddim_takes_the_limit_where_the_linear_path_has_no_signal():
    mean, std = ddim(1.0)(LINEAR, X, gaussian_flow("linear")(X, torch.ones(3, dtype=float64)), 1.0, 0.4)
    assert std == pytest.approx(0.4)  # all of sigma_s: the state is drawn afresh around the posterior mean
    torch.testing.assert_close(mean, torch.full_like(X, 0.6 * MEAN))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_depends_on_the_path_through_its_ratio_only(eta):
    """At times of equal sigma/alpha the linear and cosine transitions are one law up to scale."""
    t, s = (torch.tensor(u, dtype=float64) for u in (0.7, 0.35))
    t2, s2 = (COSINE.time_of_ratio(u / (1 - u)) for u in (t, s))
    scale = {
        k: math.hypot(*COSINE.at(b.item())[:2]) / math.hypot(*LINEAR.at(a.item())[:2])
        for k, a, b in (("t", t, t2), ("s", s, s2))
    }
    flow = gaussian_flow("linear")
    y = X * scale["t"]
    mean, std = ddim(eta)(LINEAR, X, flow(X, t.expand(3)), t.item(), s.item())
    mean2, std2 = ddim(eta)(COSINE, y, convert(flow, LINEAR, COSINE)(y, t2.expand(3)), t2.item(), s2.item())
    torch.testing.assert_close(mean2, mean * scale["s"])
    assert std2 == pytest.approx(std * scale["s"])


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize(("t", "s"), [(0.0, 0.3), (0.2, 0.9), (0.4, 1.0)])
def test_renoise_carries_one_marginal_to_another(path, t, s):
    probe = torch.tensor([[0.0], [1.0]], dtype=float64)
    mean, std = renoise(path, probe, probe, t, s)
    b, slope = mean[0].item(), (mean[1] - mean[0]).item()
    m, var = marginal(path.name, t)
    assert (slope * m + b, slope**2 * var + std**2) == pytest.approx(marginal(path.name, s), rel=1e-9)


def test_memoryless_diffusion_by_hand():
    for t in (0.1, 0.5, 0.9):
        assert memoryless(VP)(t) == pytest.approx(math.sqrt(0.1 + 19.9 * t))  # the VP-SDE's sqrt(beta)
        assert memoryless(LINEAR)(t) == pytest.approx(math.sqrt(2 * t / (1 - t)))
    assert memoryless(LINEAR)(0.0) == 0 and memoryless(VP)(0.0) == pytest.approx(math.sqrt(0.1), rel=2e-4)
    with pytest.raises(ValueError, match="infinite"):
        memoryless(LINEAR)(1.0)


# Conversion of the interpolant is a change of grid and of diffusion


def gap_between_paths(noise: Tensor, g: Diffusion, src: Interpolant, dst: Interpolant) -> float:
    """Largest RMS distance on the way between an SDE on src and its equivalent on dst; the same noise (n, K, 2)."""
    n, k, _ = noise.shape
    times = [t for t in uniform(n) if t >= 0.1]  # the last step to 0 is long on VP's clock
    moved, g_dst = equivalent_sde(times, g, src, dst)
    scale = [math.hypot(*src.at(t)[:2]) / math.hypot(*dst.at(u)[:2]) for t, u in zip(times, moved, strict=True)]
    mixture = GaussianMixture([[-1.0, 0.5], [1.0, -0.5], [0.3, 2.0]], [0.3, 0.5, 0.2])
    (v, kernel), (w, twin) = (mixture.velocity(src), sde(g)), (mixture.velocity(dst), sde(g_dst))
    x, gaps = torch.randn(k, 2, generator=seeded(1), dtype=float64), []
    y = x / scale[0]
    for z, c, (t, s), (t2, s2) in zip(noise, scale[1:], pairwise(times), pairwise(moved), strict=False):
        mean, std = kernel(src, x, v(x, x.new_full((k,), t)), t, s)
        mean2, std2 = twin(dst, y, w(y, y.new_full((k,), t2)), t2, s2)
        x, y = mean + std * z, mean2 + std2 * z
        gaps.append((x / c - y).square().sum(1).mean().sqrt().item())
    return max(gaps)


@pytest.mark.parametrize(
    ("g", "src", "dst"),
    [(quadratic(), VP, LINEAR), (memoryless(VP), VP, LINEAR), (quadratic(), VP, COSINE)],
    ids=["paper", "memoryless", "cosine"],
)
def test_sample_paths_agree_step_by_step_in_the_limit_of_small_steps(g, src, dst):
    """Strong order one: along one Brownian path, half the step, half the distance."""
    fine = torch.randn(200, 50, 2, generator=seeded(), dtype=float64)
    coarse = (fine[::2] + fine[1::2]) / math.sqrt(2)
    gaps = [gap_between_paths(noise, g, src, dst) for noise in (coarse, fine)]
    assert gaps[1] < 0.02
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.25), gaps


def test_the_equivalent_grid_by_hand():
    grid, _ = equivalent_sde((1.0, 0.6, 0.2, 0.0), quadratic())
    expected = [s / (a + s) for a, s, _, _ in (levels("vp", u) for u in (1.0, 0.6, 0.2, 0.0))]
    assert grid == pytest.approx(expected, rel=1e-9) and grid[-1] == 0
    assert equivalent_sde(paper_vp(7), quadratic(), LINEAR, VP)[0] == pytest.approx(
        [math.sqrt(1 - (1 - t) ** 2) for t in uniform(7)]
    )


def test_states_beyond_vps_last_cannot_be_told_apart_on_it():
    with pytest.raises(ValueError, match="fall together"):
        equivalent_sde((1.0, 0.995, 0.5, 0.0), quadratic(), LINEAR, VP)


def test_vp_diffusion_is_the_papers_formula():
    """g_lin(t)^2 = (g_s/c)^2 ds/dt along t = sbar/(abar + sbar), c = abar + sbar."""
    s = torch.linspace(0.05, 0.99, 8, dtype=float64, requires_grad=True)
    c = VP.alpha(s) + VP.sigma(s)
    t = VP.sigma(s) / c
    (dt,) = torch.autograd.grad(t.sum(), s)
    expected = (3 * s**2 / c / dt.sqrt()).tolist()
    assert [vp_diffusion()(u) for u in t.tolist()] == pytest.approx(expected)


def test_vp_diffusion_stands_still_beyond_vps_last_state():
    g, last = vp_diffusion(), paper_vp(10)[0]
    assert g(1.0) == pytest.approx(g(last)) == pytest.approx(11.7, abs=0.05)
    assert g(0.0) == 0


# What a kernel says of itself, and what it refuses


def test_kernels_say_whether_they_are_stochastic():
    flags = [k.stochastic for k in (ode, ddim(0.0), ddim(0.5), sde(quadratic()), renoise)]
    assert flags == [False, False, True, True, True]


def test_errors():
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            ddim(eta)
    for kernel in (ddim(1.0), sde(quadratic())):
        with pytest.raises(ValueError, match="s < t"):
            kernel(LINEAR, X, X, 0.3, 0.5)
    with pytest.raises(ValueError, match="s > t"):
        renoise(LINEAR, X, X, 0.5, 0.5)
