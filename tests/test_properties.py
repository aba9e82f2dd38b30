"""What must hold for any numbers whatever: schedules, conversions, resampling. Of methods, see test_contract.py."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import PATHS, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import float64

from flowscale_lite import LINEAR, convert, logit_normal, paper_vp
from flowscale_lite import schedules as grids
from flowscale_lite.interpolants import matching_time
from flowscale_lite.resampling import SCHEMES

many = settings(max_examples=100, deadline=None, derandomize=True)
steps = st.integers(1, 100) | st.just(500)
paths = st.sampled_from(PATHS)
anything = st.floats(allow_nan=True, allow_infinity=True)


# Schedules


def is_schedule(times: tuple[float, ...], n: int) -> bool:
    return len(times) == n + 1 and times[0] <= 1 and times[-1] == 0 and all(t > s for t, s in pairwise(times))


@many
@given(n=steps, finish=st.integers(1, 100), mean=st.floats(-3, 3), std=st.floats(0.1, 3), shift=st.floats(1e-3, 1e3))
def test_schedules_fall_strictly_from_at_most_one_to_zero(n, finish, mean, std, shift):
    for times in (grids.uniform(n), paper_vp(n, min(finish, n)), logit_normal(n, mean, std)):
        assert is_schedule(times, n)
        assert is_schedule(grids.shifted(times, shift), n)


@many
@given(n=st.integers(-2, 12), finish=st.integers(-2, 12), mean=anything, std=anything, shift=anything)
def test_a_schedule_of_any_arguments_is_one_or_is_refused(n, finish, mean, std, shift):
    for make in (
        lambda: grids.uniform(n),
        lambda: paper_vp(n, finish),
        lambda: logit_normal(n, mean, std),
        lambda: grids.shifted(grids.uniform(n), shift),
    ):
        try:
            times = make()
        except ValueError:
            continue
        assert is_schedule(times, n)


# Conversions


@many
@given(src=paths, dst=paths, t=st.floats(1e-3, 0.99), shape=st.sampled_from([(3,), (1, 1), (2, 3, 2)]))
def test_conversions_there_and_back(src, dst, t, shape):
    """Below linear time 0.99, for VP has no state noisier than 0.9934."""
    t = matching_time(t, LINEAR, src)
    assert matching_time(matching_time(t, src, dst), dst, src) == pytest.approx(t, rel=1e-9)
    v = lambda x, t: torch.sin(2 * x) + t.view(-1, *[1] * len(shape))  # noqa: E731
    x, tt = torch.randn(2, *shape, generator=seeded(), dtype=float64), torch.full((2,), t, dtype=float64)
    torch.testing.assert_close(convert(convert(v, src, dst), dst, src)(x, tt), v(x, tt), rtol=1e-6, atol=1e-6)


@many
@given(path=paths, t=st.floats(0, 1), shape=st.sampled_from([(), (1,), (2, 3, 2)]))
def test_state_and_velocity_are_read_off_the_posterior_means(path, t, shape):
    t = max(t, path.t_min)
    x, v = torch.randn(2, 4, *shape, generator=seeded(), dtype=float64)
    tt = x.new_full((4,), t)
    x0, eps = path.endpoints(x, v, tt)
    a, s, _, _ = path.at(t)
    torch.testing.assert_close(a * x0 + s * eps, x)
    torch.testing.assert_close(path.velocity(x0, eps, tt), v)


# Resampling


@many
@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    logw=st.lists(st.floats(-1e4, 1e4) | st.just(-math.inf), min_size=1, max_size=12).filter(lambda w: max(w) > -1e5),
    n=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_resampling_gives_n_rows_that_have_weight(scheme, logw, n, seed):
    w = torch.tensor(logw, dtype=float64)
    rows = SCHEMES[scheme](w, n, seeded(seed))
    copies, expected = rows.bincount(minlength=len(w)).double(), n * w.softmax(0)
    assert copies.sum() == n == len(rows) and not copies[expected == 0].any()
    if scheme == "systematic":
        assert ((copies - expected).abs() < 1 + 1e-6).all()
    if scheme == "residual":
        assert (copies >= (expected - 1e-6).floor()).all()
