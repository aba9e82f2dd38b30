import math

import pytest
import torch
from conftest import MEAN, PATHS, STD, gaussian_flow, levels, seeded
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
    torch.testing.assert_close(MIXTURE.cov().diagonal(), law.variance)


def test_sample_has_the_moments():
    n = 20_000
    x = MIXTURE.sample(n, seeded()).double()
    assert x.shape == (n, 2)
    se = (MIXTURE.cov().diagonal() / n).sqrt()
    assert ((x.mean(0) - MIXTURE.mean()).abs() < 4 * se).all()
    # The products (x - m)_i (x - m)_j have the sample covariance as mean; four of their own standard errors.
    gap = x - MIXTURE.mean()
    products = gap[:, :, None] * gap[:, None]
    assert ((products.mean(0) - MIXTURE.cov()).abs() < 4 * products.std(0) / math.sqrt(n)).all()


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
    torch.testing.assert_close(tilted.cov(), (mass[:, None] * (grid - mean)).T @ (grid - mean) / z)
    torch.testing.assert_close(tilted.log_prob(X), MIXTURE.log_prob(X) + reward(X) / tau - log_z)


def test_dtype_follows_the_question():
    t = torch.full((5,), 0.5)
    for out in (MIXTURE.velocity(LINEAR)(X.float(), t), MIXTURE.posterior_mean(LINEAR)(X.float(), t)):
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
