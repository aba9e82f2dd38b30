import math

import numpy as np
import pytest
import torch
from conftest import MEAN, PATHS, STD, covariance, gaussian_flow, levels, seeded
from scipy.integrate import solve_ivp
from torch import float64
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flowscale_lite import LINEAR, VP, GaussianMixture, LinearReward, QuadraticReward

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.3, 2.0]], dtype=float64)
SCALES = torch.tensor([0.3, 0.5, 0.2], dtype=float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=float64)
MIXTURE = GaussianMixture(MEANS, SCALES, WEIGHTS)
X = torch.linspace(-2, 2, 10, dtype=float64).view(5, 2)


def density(t: float, name: str) -> MixtureSameFamily:
    """Law of x_t, from torch.distributions."""
    a, s, _, _ = levels(name, t)
    std = ((a * SCALES) ** 2 + s**2).sqrt()[:, None].expand(3, 2)
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal(a * MEANS, std), 1))


def test_log_prob_and_moments_match_torch_distributions():
    law = density(0.0, "linear")
    torch.testing.assert_close(MIXTURE.log_prob(X), law.log_prob(X))
    torch.testing.assert_close(MIXTURE.mean(), law.mean)
    torch.testing.assert_close(covariance(MIXTURE).diagonal(), law.variance)


def in_dimension(d: int) -> GaussianMixture:
    """Three modes in d dimensions."""
    return GaussianMixture(torch.randn(3, d, generator=seeded(d), dtype=float64), SCALES, WEIGHTS)


@pytest.mark.parametrize("law", [MIXTURE, *map(in_dimension, (1, 3, 16)),
                                 in_dimension(5).tilted(QuadraticReward([0.5] * 5, 2.0))[0]])  # fmt: skip
def test_sample_has_the_moments(law):
    n, d = 20_000, law.means.shape[1]
    x = law.sample(n, seeded()).double()
    assert x.shape == (n, d)
    se = (covariance(law).diagonal() / n).sqrt()
    assert ((x.mean(0) - law.mean()).abs() < 4 * se).all()
    # The products (x - m)_i (x - m)_j have the sample covariance as mean; four of their own standard errors.
    gap = x - law.mean()
    products = gap[:, :, None] * gap[:, None]
    assert ((products.mean(0) - covariance(law)).abs() < 4 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("t", [0.05, 0.4, 0.8, 1.0])
def test_the_score_read_off_the_velocity_is_the_gradient_of_log_p(path, t):
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(density(t, path.name).log_prob(x).sum(), x)
    tt = X.new_full((5,), t)
    torch.testing.assert_close(path.score(X, MIXTURE.velocity(path)(X, tt), tt), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_velocity_of_one_gaussian(path):
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=float64)
    got = GaussianMixture([[MEAN, MEAN]], STD).velocity(path)(X, t)
    tol = 1e-9 if path is not VP else 1e-3  # VP's velocity at 0 is read at t_min
    torch.testing.assert_close(got, gaussian_flow(path.name)(X, t), rtol=tol, atol=tol)


def test_posterior_mean_is_bayes_rule_over_samples():
    """E[x0 | x_t = y] for draws x0 weighted by the likelihood of y; self-normalised, four standard errors."""
    t, n = 0.4, 20_000
    x0 = MIXTURE.sample(n, seeded()).double()
    for y in X:
        w = (-(y - (1 - t) * x0).square().sum(1) / (2 * t**2)).softmax(0)[:, None]
        mean = (w * x0).sum(0)
        se = (w * (x0 - mean)).square().sum(0).sqrt()
        got = MIXTURE.posterior_mean(LINEAR)(y[None], torch.tensor([t], dtype=float64))[0]
        assert ((got - mean).abs() < 4 * se).all()


@pytest.mark.parametrize("tau", [0.3, 2.0])
@pytest.mark.parametrize("reward", [LinearReward([1.0, -2.0]), QuadraticReward([0.5, 0.5], 3.0)], ids=repr)
def test_tilted_matches_quadrature(reward, tau):
    axis = torch.linspace(-9, 9, 451, dtype=float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = (MIXTURE.log_prob(grid) + reward(grid) / tau).exp() * (axis[1] - axis[0]) ** 2
    z, (tilted, log_z) = mass.sum(), MIXTURE.tilted(reward, tau)
    assert log_z == pytest.approx(z.log().item(), abs=1e-8)
    mean = (mass[:, None] * grid).sum(0) / z
    torch.testing.assert_close(tilted.mean(), mean)
    torch.testing.assert_close(covariance(tilted), (mass[:, None] * (grid - mean)).T @ (grid - mean) / z)
    torch.testing.assert_close(tilted.log_prob(X), MIXTURE.log_prob(X) + reward(X) / tau - log_z)


@pytest.mark.parametrize("d", [1, 3, 16])
def test_tilted_in_any_dimension_is_the_law_times_the_tilt(d):
    """Both sides are normalised, so that agreement at a few points proves the constant as well."""
    law, x = in_dimension(d), torch.randn(6, d, generator=seeded(), dtype=float64)
    for reward in (LinearReward([0.7] * d), QuadraticReward([0.2] * d, 3.0)):
        tilted, log_z = law.tilted(reward, 0.5)
        torch.testing.assert_close(tilted.log_prob(x), law.log_prob(x) + reward(x) / 0.5 - log_z)


@pytest.mark.parametrize("d", [1, 3, 16])
def test_the_score_in_any_dimension(d):
    law, x = in_dimension(d), torch.randn(6, d, generator=seeded(), dtype=float64)
    t, y = x.new_full((6,), 0.4), x.clone().requires_grad_()
    noisy = GaussianMixture(0.6 * law.means, ((0.6 * law.scales) ** 2 + 0.4**2).sqrt(), law.weights)  # the law of x_t
    (expected,) = torch.autograd.grad(noisy.log_prob(y).sum(), y)
    torch.testing.assert_close(LINEAR.score(x, law.velocity(LINEAR)(x, t), t), expected)


# The standard toy, and a perfectly distilled model


def test_the_ring():
    ring = GaussianMixture.ring(modes=6, radius=3.0, scale=0.1, rare=0.04)
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((6,), 3.0, dtype=float64))
    torch.testing.assert_close(ring.means[0], torch.tensor([3.0, 0.0], dtype=float64))
    neighbours = (ring.means - ring.means.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(neighbours, torch.full_like(neighbours, 3.0))  # a hexagon's side is its radius
    assert ring.weights.tolist() == pytest.approx([0.04] + [0.192] * 5) and (ring.scales == 0.1).all()
    for modes, rare in ((1, 0.1), (8, 0.0), (8, 1.0)):
        with pytest.raises(ValueError, match="modes >= 2"):
            GaussianMixture.ring(modes, rare=rare)


def ends(law: GaussianMixture, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Ends of the exact flow by scipy's integrator of order 8 on the exact velocity."""
    flow = law.velocity(LINEAR)

    def field(u: float, y: np.ndarray) -> np.ndarray:
        return flow(torch.from_numpy(y)[None], torch.tensor([u], dtype=float64))[0].numpy()

    solved = [
        solve_ivp(field, (u.item(), 0.0), y.numpy(), method="DOP853", rtol=1e-9, atol=1e-10).y[:, -1]
        for y, u in zip(x, t, strict=True)
    ]
    return torch.from_numpy(np.stack(solved))


@pytest.mark.parametrize("law", [GaussianMixture.ring(), MIXTURE, in_dimension(5)], ids=["ring", "plane", "5-D"])
def test_a_distilled_step_lands_on_the_end_of_the_exact_flow(law):
    t = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01, 1e-6], dtype=float64)
    g = seeded(7)
    noise = torch.randn(10, law.means.shape[1], generator=g, dtype=float64)
    x = (1 - t)[:, None] * law.sample(10, g).double() + t[:, None] * noise
    expected = ends(law, x, t)
    errors = [x - t[:, None] * law.distilled(steps)(x, t) - expected for steps in (16, 32)]
    coarse, fine = (e.norm(dim=1) for e in errors)
    assert fine.median() < 1e-6 and fine.max() < 1e-4
    assert 12 < coarse.max() / fine.max() < 22  # order four: 16


@pytest.mark.parametrize("d", [1, 4])
def test_the_distilled_flow_of_one_gaussian_is_a_straight_scaling(d):
    t = torch.tensor([1.0, 0.8, 0.4, 0.05, 1e-9], dtype=float64)
    x = torch.linspace(-2, 2, 5 * d, dtype=float64).view(5, d)
    got = x - t[:, None] * GaussianMixture([[MEAN] * d], STD).distilled()(x, t)
    expected = MEAN + STD * (x - (1 - t[:, None]) * MEAN) / (((1 - t) * STD) ** 2 + t**2).sqrt()[:, None]
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_the_distilled_velocity_at_the_data_is_its_limit():
    zero, near = torch.zeros(5, dtype=float64), torch.full((5,), 1e-5, dtype=float64)
    torch.testing.assert_close(MIXTURE.distilled()(X, zero), MIXTURE.velocity(LINEAR)(X, zero))
    torch.testing.assert_close(MIXTURE.distilled()(X, near), MIXTURE.velocity(LINEAR)(X, near), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_distilled():
    for law, steps in ((GaussianMixture([[0.0], [1.0]], [0.1, 0.0]), 8), (MIXTURE, 0)):
        with pytest.raises(ValueError, match="distilled"):
            law.distilled(steps)


def test_dtype_follows_the_question():
    t = torch.full((5,), 0.5)
    velocities = (MIXTURE.velocity(LINEAR), MIXTURE.posterior_mean(LINEAR), MIXTURE.distilled(4))
    for out in (velocity(X.float(), t) for velocity in velocities):
        assert out.dtype == torch.float32
    assert MIXTURE.log_prob(X.float()).dtype == torch.float32


def test_a_point_mass_flows_straight():
    x, t = torch.tensor([[1.0, 2.0]], dtype=float64), torch.tensor([0.25], dtype=float64)
    got = GaussianMixture([[3.0, 1.0]], 0.0).velocity(LINEAR)(x, t)
    torch.testing.assert_close(got, (x - torch.tensor([[3.0, 1.0]], dtype=float64)) / 0.25)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1.0, 2.0],), "means"),
        (([[1.0]], [1.0, 2.0]), "as many"),
        (([[1.0], [2.0]], 1.0, [1.0]), "as many"),
        (([[1.0]], -1.0), "negative"),
        (([[math.nan]],), "finite"),
        (([[1.0]], math.inf), "finite"),
        (([[1.0]], 1.0, [0.0]), "positive sum"),
        (([[1.0], [2.0]], 1.0, [2.0, -1.0]), "negative"),
    ],
)
def test_what_is_no_mixture(args, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*args)


def test_tau_is_positive():
    with pytest.raises(ValueError, match="tau"):
        MIXTURE.tilted(LinearReward([1.0, 0.0]), 0.0)


def test_a_reward_of_another_dimension_is_refused():
    for reward in (LinearReward([1.0]), QuadraticReward([1.0, 0.0, 0.0])):
        with pytest.raises(ValueError, match="2 coordinates"):
            MIXTURE.tilted(reward)
