import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowscale_lite import levels, logit_normal, paper_vp, shifted, uniform
from flowscale_lite.schedules import check


def test_uniform():
    assert uniform(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert uniform(1) == (1.0, 0.0)


def test_logit_normal_by_hand():
    """Quantiles: the median is the logistic of the mean, and one standard deviation lies at 0.8413."""
    times = logit_normal(2)  # mean 0.7 and deviation 0.9, which stored results rest on
    assert times == pytest.approx((1.0, 1 / (1 + math.exp(-0.7)), 0.0))
    for spread, one_above in ((logit_normal(10_000), 0.7 + 0.9), (logit_normal(10_000, 0.2, 0.5), 0.2 + 0.5)):
        assert math.log(spread[1587] / (1 - spread[1587])) == pytest.approx(one_above, abs=1e-3)
        assert check(spread) == spread


def vp_to_linear(s: float) -> float:
    alpha = math.exp(-(0.1 * s + 9.95 * s * s) / 2)
    sigma = math.sqrt(1 - alpha * alpha)
    return sigma / (alpha + sigma)


def test_paper_grid_by_hand():
    got = paper_vp(10)
    expected = [vp_to_linear(math.sqrt(1 - (1 - t) ** 2)) for t in uniform(10)[:-1]]
    assert got == pytest.approx((*expected, 0.0), rel=1e-9)
    assert got[0] == pytest.approx(0.9934, abs=1e-4) and got[-2] == pytest.approx(0.709, abs=1e-3)


def test_paper_grid_with_a_finish():
    got = paper_vp(12, finish=3)
    assert len(got) == 13
    assert got[:10] == paper_vp(10)[:10]
    assert got[9:] == pytest.approx([got[9], got[9] * 2 / 3, got[9] / 3, 0.0])


def test_shift_by_hand():
    assert shifted((1.0, 0.5, 0.0), 3.0) == pytest.approx((1.0, 0.75, 0.0))
    assert shifted(uniform(7), 1.0) == pytest.approx(uniform(7))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((), "at least two"),
        ((0.0,), "at least two"),
        ((1.2, 0.0), r"\[0, 1\]"),
        ((1.0, -0.1), r"\[0, 1\]"),
        ((math.nan, 0.0), r"\[0, 1\]"),
        ((1.0, 0.5, 0.5, 0.0), r"times\[1\]"),
        ((0.0, 0.5, 1.0), r"times\[0\]"),
        ((1.0, 0.5), "exactly 0"),
    ],
)
def test_what_is_no_schedule(times, message):
    with pytest.raises(ValueError, match=message):
        check(times)


def test_levels_by_hand():
    assert levels(4, 0.9, 0.5) == pytest.approx((1.0, 0.9, 0.7, 0.5, 0.0)) and levels(2) == (1.0, 0.95, 0.0)
    assert levels(3) == pytest.approx((1.0, 0.95, 0.7, 0.0))  # which stored results rest on


def test_errors():
    for wrong in ((1,), (5, 0.5, 0.5), (5, 1.0, 0.5), (5, 0.5, 0.0), (5, math.nan)):
        with pytest.raises(ValueError, match="low < high"):
            levels(*wrong)
    with pytest.raises(ValueError, match="std positive"):
        logit_normal(5, std=0.0)
    with pytest.raises(ValueError, match="steps"):
        uniform(0)
    for finish in (0, 6):
        with pytest.raises(ValueError, match="finish"):
            paper_vp(5, finish)
    for shift in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="shift"):
            shifted(uniform(3), shift)


# For any numbers whatever

many = settings(max_examples=100, deadline=None, derandomize=True)
anything = st.floats(allow_nan=True, allow_infinity=True)


def is_schedule(times: tuple[float, ...], n: int) -> bool:
    return len(times) == n + 1 and times[0] <= 1 and times[-1] == 0 and all(t > s for t, s in pairwise(times))


@many
@given(
    n=st.integers(1, 100) | st.just(500),
    finish=st.integers(1, 100),
    mean=st.floats(-3, 3),
    std=st.floats(0.1, 3),
    shift=st.floats(1e-3, 1e3),
)
def test_schedules_fall_strictly_from_at_most_one_to_zero(n, finish, mean, std, shift):
    for times in (uniform(n), paper_vp(n, min(finish, n)), logit_normal(n, mean, std)):
        assert is_schedule(times, n) and is_schedule(shifted(times, shift), n)


@many
@given(n=st.integers(-2, 12), finish=st.integers(-2, 12), mean=anything, std=anything, shift=anything)
def test_a_schedule_of_any_arguments_is_one_or_is_refused(n, finish, mean, std, shift):
    for make in (
        lambda: uniform(n),
        lambda: paper_vp(n, finish),
        lambda: logit_normal(n, mean, std),
        lambda: levels(n, mean, std),
        lambda: shifted(uniform(n), shift),
    ):
        try:
            times = make()
        except ValueError:
            continue
        assert is_schedule(times, n)
