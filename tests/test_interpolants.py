import math

import pytest
import torch
from conftest import MEAN, PATHS, STD, gaussian_flow, levels, marginal
from torch import float64

from flowscale_lite import COSINE, LINEAR, VP, convert, vp
from flowscale_lite.interpolants import matching_time

each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)


@each_path
@pytest.mark.parametrize("t", [0.0, 1e-4, 0.3, 0.9, 1.0])
def test_levels_match_the_formulas(path, t):
    a, s, da, ds = path.at(t)
    assert (a, s, da) == pytest.approx(levels(path.name, t)[:3], rel=1e-12, abs=1e-15)
    if t > 0:
        assert s * ds == pytest.approx(levels(path.name, t)[3], rel=1e-9, abs=1e-15)


@each_path
def test_derivatives_match_autograd(path):
    t = torch.cat([torch.tensor([1e-6, 1e-3]), torch.linspace(0.05, 1, 20)]).to(float64).requires_grad_()
    for curve, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(curve(t).sum(), t)
        torch.testing.assert_close(derivative(t.detach()), expected, rtol=1e-9, atol=1e-12)


def test_vp_keeps_its_digits_near_the_data_in_single_precision():
    t = torch.tensor([1e-7, 1e-5, 1e-3])
    expected = torch.tensor([levels("vp", u)[1] for u in t.tolist()])
    torch.testing.assert_close(VP.sigma(t), expected, rtol=1e-6, atol=0)


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_time_of_ratio_inverts_sigma_over_alpha(path, dtype):
    t = torch.tensor([0.0, 1e-3, 0.2, 0.5, 0.8, 0.99, 1.0], dtype=dtype)
    ends = [levels(path.name, u) for u in t.tolist()]
    ratio = torch.tensor([s / a if a > 1e-9 else math.inf for a, s, _, _ in ends], dtype=dtype)
    torch.testing.assert_close(path.time_of_ratio(ratio), t, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-12)
    assert path.time_of_ratio(torch.tensor(math.inf, dtype=dtype)).item() == pytest.approx(1, abs=1e-7)


@each_path
def test_endpoints_are_the_posterior_means_of_gaussian_data(path):
    t = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999], dtype=float64)
    x = torch.linspace(-2, 2, 15, dtype=float64).view(5, 3)
    x0, eps = path.endpoints(x, gaussian_flow(path.name)(x, t), t)
    for row, u in enumerate(t.tolist()):
        a, s, _, _ = levels(path.name, u)
        m, var = marginal(path.name, u)
        torch.testing.assert_close(x0[row], MEAN + a * STD**2 / var * (x[row] - m), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(eps[row], s / var * (x[row] - m), rtol=1e-9, atol=1e-11)


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_endpoints_at_both_ends(path, dtype):
    x = torch.tensor([[-1.5, 0.2], [0.4, 2.0]], dtype=dtype)
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    x0, eps = path.endpoints(x, gaussian_flow(path.name)(x, t), t)
    tol = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(x0[0], x[0], **tol)  # at t = 0 the state is the data,
    torch.testing.assert_close(eps[0], torch.zeros(2, dtype=dtype), **tol)  # and tells nothing of the noise
    a, s, _, _ = levels(path.name, 1.0)
    m, var = marginal(path.name, 1.0)
    tol = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else tol  # VP multiplies rounding by 1/alpha = 152
    torch.testing.assert_close(x0[1], MEAN + a * STD**2 / var * (x[1] - m), **tol)
    torch.testing.assert_close(eps[1], s / var * (x[1] - m), **tol)


@each_path
def test_score_of_gaussian_data(path):
    t = torch.tensor([0.05, 0.4, 1.0], dtype=float64)
    x = torch.linspace(-2, 2, 6, dtype=float64).view(3, 2)
    score = path.score(x, gaussian_flow(path.name)(x, t), t)
    for row, u in enumerate(t.tolist()):
        m, var = marginal(path.name, u)
        torch.testing.assert_close(score[row], -(x[row] - m) / var, rtol=1e-8, atol=1e-10)


@each_path
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 2)])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_state_and_velocity_are_read_off_the_posterior_means(path, t, shape):
    """For samples of any shape: a number, a vector, a picture."""
    t = max(t, path.t_min)
    x, v = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0), dtype=float64)
    tt = x.new_full((4,), t)
    x0, eps = path.endpoints(x, v, tt)
    a, s, _, _ = levels(path.name, t)
    torch.testing.assert_close(a * x0 + s * eps, x)
    torch.testing.assert_close(path.velocity(x0, eps, tt), v)


def test_velocity_of_the_linear_path_is_noise_minus_data():
    x0, eps = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(LINEAR.velocity(x0, eps, torch.rand(4)), eps - x0)


@pytest.mark.parametrize(
    "t", [0.5, torch.tensor(0.5), torch.full((4, 1), 0.5), torch.full((1,), 0.5), torch.full((3,), 0.5)]
)
def test_times_of_another_shape_are_refused_even_where_they_would_broadcast(t):
    x = torch.zeros(4, 4)
    for call in (
        lambda: LINEAR.coeffs(t, x),
        lambda: LINEAR.endpoints(x, x, t),
        lambda: LINEAR.velocity(x, x, t),
        lambda: LINEAR.score(x, x, t),
        lambda: convert(lambda x, t: x, LINEAR, VP)(x, t),
    ):
        with pytest.raises(ValueError, match=r"shape \(4,\)"):
            call()


def test_a_time_belongs_to_a_row_when_batch_equals_dimension():
    t = torch.tensor([0.1, 0.4, 0.7])
    x, v = torch.ones(3, 3), torch.ones(3, 3)
    torch.testing.assert_close(LINEAR.endpoints(x, v, t)[0], torch.tensor([[0.9] * 3, [0.6] * 3, [0.3] * 3]))


@pytest.mark.parametrize("src", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("dst", PATHS, ids=lambda p: p.name)
def test_convert_matches_the_closed_form_flow(src, dst):
    x = torch.linspace(-2, 2, 24, dtype=float64).view(8, 3)
    t = torch.linspace(0.02, 0.98, 8, dtype=float64)
    got = convert(gaussian_flow(src.name), src, dst)(x, t)
    torch.testing.assert_close(got, gaussian_flow(dst.name)(x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("src", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("dst", PATHS, ids=lambda p: p.name)
def test_matching_times_at_both_ends_and_between(src, dst):
    assert matching_time(0.0, src, dst) == 0
    if src is not VP:
        assert matching_time(1.0, src, dst) == pytest.approx(1, abs=1e-15)
    a, s, _, _ = levels(src.name, 0.4)
    b, r, _, _ = levels(dst.name, matching_time(0.4, src, dst))
    assert s / a == pytest.approx(r / b)


@pytest.mark.parametrize("src", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("dst", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, float64])
def test_convert_at_both_ends(src, dst, end, dtype):
    x = torch.tensor([[-1.5, 0.2], [0.4, 2.0]], dtype=dtype)
    t = torch.full((2,), end, dtype=dtype)
    got = convert(gaussian_flow(src.name), src, dst)(x, t)
    tol = 1e-10 if dtype == float64 else 1e-4
    if end == 0 and dst is VP:
        tol = 2e-3  # the score is not in the source's velocity: a limit, and rounding over sigma = 3e-4
    elif end == 1 and src is VP and dst is not VP:
        tol = 2e-2  # VP ends at sigma/alpha = 152, where alpha is 0.7 %
    elif VP in (src, dst) and dtype == torch.float32:
        tol = 1e-3  # rounding times 152
    torch.testing.assert_close(got, gaussian_flow(dst.name)(x, t), rtol=tol, atol=tol)


def test_vp_refuses_constants_that_are_no_path():
    for low, high in ((0, 1), (2, 1), (-1, 1)):
        with pytest.raises(ValueError, match="beta_min"):
            vp(low, high)


def test_cosine_is_exact_at_the_noise_end():
    assert COSINE.at(1.0)[:2] == (0.0, 1.0)
