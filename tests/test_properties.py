"""What must hold for any numbers whatever: schedules, conversions, resampling, and every method at any budget."""

import dataclasses
import math
import types
import typing
from itertools import pairwise

import pytest
import torch
from conftest import PATHS, Counting, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import float64

from flowscale_lite import LINEAR, Guide, Problem, convert, ddim, logit_normal, methods, paper_vp, sde, search
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


# Every method at any budget

METHODS = [
    kind for name in methods.__all__ if hasattr(kind := getattr(methods, name), "advance") and hasattr(kind, "check")
]


def values(hint, default) -> st.SearchStrategy:
    """Something to try for a field, from its type: its default most often, and now and then what is out of range."""
    if isinstance(hint, types.UnionType):
        return st.one_of(*(values(kind, dataclasses.MISSING) for kind in typing.get_args(hint)), st.just(default))
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    known = {int: st.sampled_from([1, 1, 2, 3, 0]), bool: st.booleans(), types.NoneType: st.none()}
    known |= {float: st.sampled_from([0.5, 1.0, 0.0]), Guide: st.just(Guide(0.5, below=0.7))}
    return known[hint] if default is dataclasses.MISSING else st.one_of(st.just(default), st.just(default), known[hint])


@st.composite
def options(draw, kind):
    """A method of this kind with any of its options; None where it refuses them."""
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{f.name: draw(values(hints[f.name], f.default)) for f in dataclasses.fields(kind)})
    except ValueError:
        return None


def test_all_methods_are_found():
    assert {"BestOfN", "DPS", "RBF", "SMC", "SVDD"} <= {kind.__name__ for kind in METHODS}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_method_keeps_an_exact_account_or_refuses_before_any_compute(kind):
    ran = []

    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(
        method=options(kind),
        n=st.sampled_from(range(1, 9)),
        budget=st.sampled_from(range(1, 41)),
        prices=st.sampled_from([(1, 3), (1, 1), (2, 1)]),
        shape=st.sampled_from([(2, 3), (), (1,), (1, 1, 3)]),
        grid=st.sampled_from([grids.uniform, paper_vp, logit_normal]),
        kernel=st.sampled_from([ddim(1.0), sde(lambda t: t), ddim(0.0)]),
        judge=st.sampled_from([torch.sin, torch.round, lambda x: 0 * x]),
    )
    def check(method, n, budget, prices, shape, grid, kernel, judge):
        if method is None:
            return
        velocity = Counting(lambda x, t: torch.tanh(x) * (1 + t.view(-1, *[1] * len(shape))))
        reward = Counting(lambda x, _: judge(3 * x.reshape(len(x), -1).sum(1)))
        problem = Problem(
            velocity, lambda x: reward(x, x.new_zeros(len(x))), LINEAR, kernel, grid(n), shape,
            cost=prices[0], gradient_cost=prices[1],
        )  # fmt: skip
        try:
            result = search(problem, method, max_nfe=budget, generator=seeded())
        except ValueError as error:
            assert velocity.rows == reward.rows == 0, error
            return
        assert result.nfe == prices[0] * (velocity.rows + (prices[1] - 1) * result.gradients) <= budget
        assert result.nfe + result.left == budget and result.reward_calls == reward.rows
        assert result.best.shape == shape and result.trace[-1].t == 0 and result.seen_reward >= result.reward
        ran.append(method)

    check()
    assert len(ran) >= 15, ran  # not all were refused
