import math

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from flowscale_lite import ess, multinomial, residual, stratified, systematic
from flowscale_lite.resampling import _invert

SCHEMES = [multinomial, stratified, systematic, residual]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda f: f.__name__)
W = torch.tensor([0.05, 0.0, 0.31, 0.5, 0.14], dtype=torch.float64)


def counts(scheme, w, n, rounds, seed=0):
    g = seeded(seed)
    return torch.stack([torch.bincount(scheme(w.log(), n, g), minlength=len(w)) for _ in range(rounds)]).double()


@each_scheme
@pytest.mark.parametrize("n", [3, 8])
def test_copies_are_unbiased(scheme, n):
    rounds = 2000
    got = counts(scheme, W, n, rounds).mean(0)
    # Multinomial copies have the largest variance of the four, n w (1 - w); four standard errors of their mean.
    tolerance = 4 * (n * W * (1 - W) / rounds).sqrt()
    assert ((got - n * W).abs() <= tolerance).all(), (got, n * W)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scheme=st.sampled_from(SCHEMES),
    logw=st.lists(st.floats(-1e4, 1e4) | st.just(-math.inf), min_size=1, max_size=12).filter(lambda w: max(w) > -1e5),
    n=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_copies_are_n_of_rows_that_have_weight_and_near_their_mean(scheme, logw, n, seed):
    w = torch.tensor(logw, dtype=torch.float64)
    rows = scheme(w, n, seeded(seed))
    copies, expected = rows.bincount(minlength=len(w)).double(), n * w.softmax(0)
    assert copies.sum() == n == len(rows) and not copies[expected == 0].any()
    if scheme in (systematic, stratified):
        assert ((copies - expected).abs() < (1 if scheme is systematic else 2) + 1e-6).all()
    if scheme is residual:
        assert (copies >= (expected - 1e-6).floor()).all()


def test_a_number_on_an_edge_falls_to_the_row_above_it():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    w = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    assert _invert(w, u).tolist() == [1, 3, 4, 4]


def test_variances_are_those_of_the_schemes():
    n, rounds = 8, 2000
    var = {f.__name__: counts(f, W, n, rounds).var(0) for f in SCHEMES}
    # A variance estimated from N rounds has a relative standard error of about sqrt(2/N) = 3 %; five of them.
    torch.testing.assert_close(var["multinomial"], n * W * (1 - W), rtol=0.16, atol=1e-12)
    part = n * W - (n * W).floor()
    torch.testing.assert_close(var["systematic"], part * (1 - part), rtol=0.16, atol=1e-3)
    left = n - (n * W).floor().sum()
    torch.testing.assert_close(var["residual"], part * (1 - part / left), rtol=0.16, atol=1e-3)


@pytest.mark.parametrize("scheme", [stratified, systematic, residual], ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [1, 7, 49, 100])
def test_equal_weights_give_one_copy_each(scheme, k):
    assert torch.equal(scheme(torch.full((k,), -3.0), k, seeded()).sort().values, torch.arange(k))


@each_scheme
def test_same_seed_same_rows_and_any_scale_of_weights(scheme):
    logw = W.log().float()
    assert torch.equal(scheme(logw, 9, seeded(3)), scheme(logw, 9, seeded(3)))
    huge = torch.tensor([-1e4, -1e4 + 1, 1e4])
    assert (scheme(huge, 5, seeded()) == 2).all()


@each_scheme
@pytest.mark.parametrize(
    "logw", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.0, math.nan]), torch.full((3,), -math.inf)]
)
def test_weights_that_are_none_are_refused(scheme, logw):
    with pytest.raises(ValueError, match="log weights"):
        scheme(logw, 4, seeded())


def test_ess():
    assert ess(torch.full((8,), 5.0)) == pytest.approx(8)
    assert ess(torch.tensor([0.0, -math.inf, -math.inf])) == pytest.approx(1)
    assert ess(torch.tensor([0.75, 0.25]).log()) == pytest.approx(1 / (0.75**2 + 0.25**2))
