"""The same answers from other people's code: Meta's flow_matching for paths, nchopin's particles for resampling.

flow_matching's clock runs the other way: noise at 0, data at 1, hence 1 - t for t and minus its derivatives.
"""

import numpy as np
import particles.resampling as rs
import pytest
import torch
from conftest import PATHS, seeded
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler, CosineScheduler, ScheduleTransformedModel, VPScheduler
from scipy.stats import chi2_contingency
from torch import Tensor, float64, nn

from flowscale_lite import GaussianMixture, convert, ess, multinomial, residual, stratified, systematic
from flowscale_lite.resampling import _invert

SCHEDULERS = {"linear": CondOTScheduler(), "cosine": CosineScheduler(), "vp": VPScheduler()}
MIXTURE = GaussianMixture([[-1.0, 0.5], [1.0, -0.5], [0.3, 2.0]], [0.3, 0.5, 0.2], [0.5, 0.3, 0.2])
T = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], dtype=float64)
X = torch.linspace(-2, 2, 14, dtype=float64).view(7, 2)

each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)


# Paths, against flow_matching


@each_path
def test_velocity_and_posterior_means(path):
    theirs = AffineProbPath(SCHEDULERS[path.name])
    x0, eps = torch.randn(2, 7, 2, generator=seeded(), dtype=float64)
    sample = theirs.sample(x_0=eps, x_1=x0, t=1 - T)
    a, s, _, _ = path.coeffs(T, x0)
    torch.testing.assert_close(a * x0 + s * eps, sample.x_t)
    torch.testing.assert_close(path.velocity(x0, eps, T), -sample.dx_t)
    v = torch.randn(7, 2, generator=seeded(1), dtype=float64)  # of no particular x0 and eps
    column = 1 - T[:, None]
    expected = theirs.velocity_to_target(-v, X, column), theirs.velocity_to_epsilon(-v, X, column)
    torch.testing.assert_close(path.endpoints(X, v, T), expected)


class Reversed(nn.Module):
    """One of our velocities on their clock."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.velocity(x, 1 - t[:, 0])


@pytest.mark.parametrize("src", PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("dst", PATHS, ids=lambda p: p.name)
def test_conversions(src, dst):
    """Theirs by the chain rule, ours through the posterior means; of a mixture, and of a field that is no flow."""
    strange = lambda x, t: torch.sin(3 * x) * (1 + t[:, None])  # noqa: E731
    for velocity in (MIXTURE.velocity(src), strange):
        theirs = ScheduleTransformedModel(Reversed(velocity), SCHEDULERS[src.name], SCHEDULERS[dst.name])
        t = T[T < 0.95] if src.name == "vp" else T  # VP ends at linear time 0.993
        x = X[: len(t)]
        torch.testing.assert_close(convert(velocity, src, dst)(x, t), -theirs(x, 1 - t[:, None]), rtol=1e-6, atol=1e-6)


@each_path
def test_the_mixtures_closed_form_is_the_linear_one_converted(path):
    theirs = ScheduleTransformedModel(Reversed(MIXTURE.velocity(PATHS[0])), SCHEDULERS["linear"], SCHEDULERS[path.name])
    torch.testing.assert_close(MIXTURE.velocity(path)(X, T), -theirs(X, 1 - T[:, None]), rtol=1e-6, atol=1e-6)


# Resampling, against particles

W = torch.tensor([0.07, 0.0, 0.31, 0.48, 0.14], dtype=float64)
PAIRS = [(multinomial, rs.multinomial), (residual, rs.residual), (stratified, rs.stratified)]
PAIRS += [(systematic, rs.systematic)]


class Uniforms:
    """numpy's random module as particles uses it, with numbers from a torch generator."""

    def __init__(self, seed: int):
        self.generator = seeded(seed)

    def rand(self, n: int) -> np.ndarray:
        return torch.rand(n, generator=self.generator, dtype=float64).numpy()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS[2:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_same_uniforms_give_the_same_rows(ours, theirs, n, monkeypatch):
    for seed in range(50):
        monkeypatch.setattr(rs, "random", Uniforms(seed))
        assert ours(W.log(), n, seeded(seed)).tolist() == theirs(W.numpy(), M=n).tolist()


def test_the_same_sorted_uniforms_are_inverted_alike():
    u = torch.rand(1000, generator=seeded(), dtype=float64).sort().values
    assert _invert(W, u).tolist() == rs.inverse_cdf(u.numpy(), W.numpy()).tolist()


def p_value(ours, theirs, monkeypatch) -> float:
    """A chi-square test on how often each vector of copies came up in 1,500 rounds; rare ones are taken together."""
    rounds, n, w = 1500, 4, torch.tensor([0.2, 0.5, 0.3], dtype=float64)
    g = seeded()
    monkeypatch.setattr(rs, "random", Uniforms(1))
    first = [tuple(ours(w.log(), n, g).bincount(minlength=3).tolist()) for _ in range(rounds)]
    second = [tuple(np.bincount(theirs(w.numpy(), M=n), minlength=3).tolist()) for _ in range(rounds)]
    kinds = sorted(set(first + second))
    table = np.array([[draws.count(kind) for kind in kinds] for draws in (first, second)])
    often = table.sum(0) >= 20
    rare = table[:, ~often].sum(1) + 1  # so that the column is not empty
    return chi2_contingency(np.column_stack([table[:, often], rare])).pvalue


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda f: f.__name__)
def test_the_copies_have_one_law(ours, theirs, monkeypatch):
    assert p_value(ours, theirs, monkeypatch) > 6e-5  # four standard errors


def test_the_test_of_laws_tells_them_apart(monkeypatch):
    assert p_value(multinomial, rs.residual, monkeypatch) < 1e-6
    assert p_value(stratified, rs.systematic, monkeypatch) < 1e-6


def test_effective_sample_size():
    logw = torch.randn(30, generator=seeded(), dtype=float64) * 3 - 50
    assert ess(logw) == pytest.approx(rs.essl(logw.numpy()))
