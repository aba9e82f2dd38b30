"""Gradients of the look-ahead reward, their price, and what steering by them does, against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import MEAN, PATHS, PLANE, STD, Counting, gaussian_flow, levels, marginal, never, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from flowscale_lite import (
    LINEAR,
    RBF,
    SMC,
    SVDD,
    Beam,
    BestOfN,
    BudgetExceeded,
    GaussianMixture,
    Guide,
    LinearReward,
    Problem,
    QuadraticReward,
    Run,
    ddim,
    flux,
    ode,
    quadratic,
    sde,
    search,
    uniform,
)
from flowscale_lite.tiny.data import locate

BELL = GaussianMixture([[MEAN, MEAN]], STD)
SLOPE = (2.0, -1.0)
GRID = uniform(5)
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)


def problem(mixture=BELL, reward=None, path=LINEAR, kernel=None, times=GRID, **rest) -> Problem:
    rest = {"velocity": mixture.velocity(path), "dtype": torch.float64, "shape": (2,), **rest}
    return Problem(reward=reward or LinearReward(SLOPE), path=path, kernel=kernel or ddim(1.0), times=times, **rest)


def opened(max_nfe=1000, **changes) -> Run:
    return Run(problem(**changes), max_nfe=max_nfe, generator=seeded())


# The gradient


@each_path
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_gradient_of_gaussian_data_is_the_closed_form(path, t):
    """x0|t is affine in x with slope alpha STD^2 / var, so the chain rule is a product."""
    slope = levels(path.name, t)[0] * STD**2 / marginal(path.name, t)[1]
    for reward, uphill in (
        (LinearReward(SLOPE), lambda x0: x0.new_tensor(SLOPE).expand_as(x0)),
        (QuadraticReward([0.3, 1.0], 2.0), lambda x0: -2.0 * (x0 - x0.new_tensor([0.3, 1.0]))),
    ):
        run = opened(reward=reward, path=path, times=(t, t / 2, 0.0))
        p = run.evaluate(run.start(6))
        torch.testing.assert_close(run.gradient(p), slope * uphill(p.x0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("cost", "price"), [(1, 3), (2, 3), (1, 1), (3, 5)])
def test_a_gradient_is_paid_for_and_counted(cost, price):
    velocity, judged = Counting(BELL.velocity(LINEAR)), []
    reward = lambda x: judged.append(len(x)) or x[:, 0]  # noqa: E731
    run = opened(velocity=velocity, reward=reward, cost=cost, gradient_cost=price)
    p = run.evaluate(run.start(4))
    run.gradient(p)
    assert velocity.rows == 8 and run.nfe == cost * (4 + 4 * price)
    assert (run.gradients, run.reward_calls, judged) == (4, 4, [4])
    best = int(p.x0[:, 0].argmax())
    torch.testing.assert_close(run.seen[0], p.x0[best])  # it is a look like any other


def test_a_gradient_beyond_the_budget_is_refused_before_it_is_computed():
    run = opened(max_nfe=4 + 11, velocity=(velocity := Counting(BELL.velocity(LINEAR))))
    p = run.evaluate(run.start(4))
    with pytest.raises(BudgetExceeded, match="12 NFE; 11 of 15"):
        run.gradient(p)
    assert velocity.rows == 4 and run.left == 11 and run.gradients == 0


def test_nothing_else_keeps_a_graph():
    run = opened()
    with torch.no_grad():
        p = run.score(run.start(3))
        g = run.gradient(p)
        steered = Guide()(p, run)
    for tensor in (p.x, p.v, p.reward, g, steered.v, steered.x0, run.seen[0]):
        assert not tensor.requires_grad


def cut(fn):
    return lambda *args: fn(*args).detach()


@torch.no_grad()
def shut(x, t):
    return x * (1 - t[:, None])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"velocity": cut(BELL.velocity(LINEAR))}, "velocity"),
        ({"velocity": shut}, "velocity"),
        ({"reward": cut(LinearReward(SLOPE))}, "reward"),
        ({"reward": lambda x: (x > 0).sum(1)}, "reward"),
        ({"reward": lambda x: torch.from_numpy(x.numpy()).sum(1)}, "reward"),
    ],
    ids=["velocity detached", "velocity under no_grad", "reward detached", "reward counts", "reward in numpy"],
)
@pytest.mark.parametrize("method", [BestOfN, SVDD, SMC])
def test_what_is_not_differentiable_is_refused_and_named(changes, what, method):
    with pytest.raises(ValueError, match=f"the {what} is not differentiable"):
        search(problem(**changes), method(guide=Guide()), max_nfe=100, generator=seeded())


def test_other_errors_of_a_reward_come_through():
    def broken(x):
        raise RuntimeError("out of memory")

    run = opened(reward=broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.gradient(run.start(1))


def test_a_gradient_that_is_not_finite_is_refused():
    run = opened(reward=lambda x: (x - x.detach()).abs().sqrt().sum(1))
    with pytest.raises(ValueError, match="not finite"):
        run.gradient(run.start(1))


def test_a_finished_sample_has_no_gradient():
    run = opened(times=(1.0, 0.0))
    with pytest.raises(ValueError, match="finished"):
        run.gradient(run.propose(run.start(1)))


# Steering


@each_path
@pytest.mark.parametrize("t", [0.03, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_the_steered_flow_of_gaussian_data_is_the_flow_of_the_tilted_data(path, t, strength):
    """A linear reward moves N(MEAN, STD^2) by strength STD^2 slope, at no cost to its width."""
    run = opened(path=path, times=(t, t / 2, 0.0))
    p = run.evaluate(run.start(5))
    q = Guide(strength, floor=1e-6)(p, run)
    for i, slope in enumerate(SLOPE):
        tilted = gaussian_flow(path.name, MEAN + strength * STD**2 * slope)
        torch.testing.assert_close(q.v[:, i], tilted(p.x[:, i : i + 1], p.x.new_full((5,), t))[:, 0])
    times = p.x.new_full((5,), t)
    torch.testing.assert_close(q.x0, path.endpoints(q.x, q.v, times)[0])  # the mean that the velocity implies
    moved = path.score(q.x, q.v, times) - path.score(p.x, p.v, times)
    torch.testing.assert_close(moved, strength * run.gradient(p), rtol=1e-5, atol=1e-8)
    assert torch.equal(q.x, p.x) and q.reward.isnan().all()


@pytest.mark.parametrize("guide", [Guide(2.0), Guide(2.0, floor=0.3), Guide(2.0, normalised=True)], ids=repr)
def test_steering_is_finite_where_alpha_is_zero(guide):
    """At t = 1 of the linear path, for a velocity that knows x0 there (one step from the noise lands on it)."""
    run = opened(velocity=lambda x, t: (1 - STD) * x - MEAN)
    p = run.evaluate(run.start(5))
    q = guide(p, run)
    uphill = STD * p.x.new_tensor(SLOPE)
    length = uphill.square().mean().sqrt()
    shift = 2.0 * (uphill / length if guide.normalised else uphill / guide.floor)
    torch.testing.assert_close(q.x0 - p.x0, shift.expand(5, 2))
    torch.testing.assert_close(q.x - q.v, q.x0)


@pytest.mark.parametrize("t", [0.1, 0.8])
def test_below_the_floor_the_strength_fades(t):
    run = opened(times=(t, t / 2, 0.0))
    p = run.evaluate(run.start(5))
    full, faded = (Guide(1.0, floor=floor)(p, run).v - p.v for floor in (1e-6, 0.5))
    torch.testing.assert_close(faded, min(1.0, (1 - t) / 0.5) * full)


@pytest.mark.parametrize("shape", [(2,), (1, 3, 2)])
def test_normalised_the_posterior_mean_moves_by_a_set_length(shape):
    reward = lambda x: 1e-5 * x.flatten(1).pow(3).sum(1)  # noqa: E731
    run = opened(velocity=lambda x, t: x / 2, reward=reward, shape=shape, times=(0.6, 0.3, 0.0))
    p = run.evaluate(run.start(5))
    shift = (Guide(0.7, normalised=True)(p, run).x0 - p.x0).flatten(1)
    torch.testing.assert_close(shift.square().mean(1).sqrt(), torch.full((5,), 0.7 * 0.6, dtype=torch.float64))
    g = run.gradient(p).flatten(1)
    torch.testing.assert_close(torch.cosine_similarity(shift, g), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("normalised", [False, True])
def test_without_a_slope_nothing_moves(normalised):
    run = opened(reward=lambda x: x.sum(1).round())
    p = run.evaluate(run.start(3))
    q = Guide(5.0, normalised=normalised)(p, run)
    assert torch.equal(q.v, p.v) and torch.equal(q.x0, p.x0)


def test_only_from_below_on_and_never_at_the_last_transition():
    run, guide = opened(), Guide(below=0.6)
    p, spent = run.start(2), []
    while p.t > 0:
        p = run.evaluate(p)
        before = run.nfe
        q = guide(p, run)
        spent.append(run.nfe - before)
        assert (q is p) == (spent[-1] == 0)
        p = run.propose(p)
    assert spent == [0, 0, 6, 6, 0]
    assert [guide.price(run.problem, t) for t in (None, 1.0, 0.6, 0.5, 0.4, 0.2)] == [6, 6, 6, 3, 3, 0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_the_price_told_beforehand_is_the_price_paid(data):
    times = sorted(data.draw(st.sets(st.integers(1, 20), min_size=2, max_size=7)), reverse=True)
    guide = Guide(below=data.draw(st.sampled_from([0.05, 0.33, 0.5, 1.0])))
    price, kernel = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([ode, ddim(1.0)]))
    run = opened(times=(*(t / 20 for t in times), 0.0), kernel=kernel, gradient_cost=price)
    p = run.start(1)
    ahead = [guide.price(run.problem, run.problem.times[0])]
    while p.t > 0:
        p = run.evaluate(p)
        before = run.nfe
        steered = guide(p, run)
        assert run.nfe - before == ahead[-1] - guide.price(run.problem, run.next_time(p.t))
        ahead.append(guide.price(run.problem, run.next_time(p.t)))
        p = run.propose(steered)
    assert run.nfe == len(times) + ahead[0] and ahead[-1] == 0 and run.gradients * price == ahead[0]


@pytest.mark.parametrize("method", [BestOfN, SVDD, SMC, RBF, Beam])
@pytest.mark.parametrize(("times", "below"), [((1.0, 0.0), 1.0), (uniform(5), 0.3)])
def test_a_guide_with_nothing_to_steer_is_refused_before_any_compute(method, times, below):
    with pytest.raises(ValueError, match="nothing to steer"):
        setup = problem(velocity=never, reward=never, times=times)
        search(setup, method(guide=Guide(below=below)), max_nfe=100, generator=seeded())


# Guided best-of-N, which is DPS


@pytest.mark.parametrize("kernel", [ode, sde(quadratic()), ddim(1.0)], ids=lambda k: k.name)
def test_dps_is_this_loop(kernel):
    """With the flow of the tilted Gaussian in place of the gradient; the last transition is the model's own."""
    strength, times = 0.8, (0.85, 0.6, 0.4, 0.15, 0.0)
    g = seeded(3)
    x = 0.85 * torch.randn(4, 2, generator=g, dtype=torch.float64)
    for t, s in pairwise(times):
        gain = strength * STD**2 if s > 0 else 0.0
        flows = [gaussian_flow("linear", MEAN + gain * slope) for slope in SLOPE]
        v = torch.cat([flow(x[:, i : i + 1], x.new_full((4,), t)) for i, flow in enumerate(flows)], 1)
        mean, std = kernel(LINEAR, x, v, t, s)
        x = mean + std * torch.randn(4, 2, generator=g, dtype=torch.float64) if std > 0 else mean
    method = BestOfN(4, guide=Guide(strength))
    result = search(problem(times=times, kernel=kernel), method, max_nfe=1000, generator=seeded(3))
    torch.testing.assert_close(result.particles.x, x)
    assert result.nfe == 4 * (4 + 3 * 3) and result.gradients == 12 and result.reward_calls == 16


def test_dps_turns_gaussian_data_into_the_tilted_data():
    """Noise z becomes MEAN + STD^2 slope + STD z as the steps grow small; halving them halves the error."""
    errors = []
    for steps in (100, 200):
        setup = problem(kernel=ode, times=uniform(steps))
        p = search(setup, BestOfN(50, guide=Guide(1.0, floor=1e-6)), max_nfe=10**6, generator=seeded()).particles
        z = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
        errors.append((p.x - (MEAN + STD**2 * z.new_tensor(SLOPE) + STD * z)).abs().max().item())
    assert errors[1] < 0.015 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("guide", [Guide(2.0), Guide(0.5, normalised=True)], ids=["plain", "normalised"])
def test_dps_raises_the_reward(guide):
    """40 samples, the same noise with and without: better by more than four standard errors of the difference."""
    setup = problem(PLANE, QuadraticReward([0.8, 1.0]), kernel=sde(quadratic()), times=uniform(20))
    plain, steered = (
        search(setup, method, max_nfe=10**6, generator=seeded()).particles.reward
        for method in (BestOfN(40), BestOfN(40, guide=guide))
    )
    gain = steered - plain
    assert gain.mean() > 4 * gain.std() / math.sqrt(40)


# Inside other methods


def test_guided_svdd_is_this_loop():
    g, chains, copies, strength = seeded(1), 2, 3, 0.8
    flow, reward = PLANE.velocity(LINEAR), QuadraticReward([0.8, 1.0], 2.0)
    times = (0.9, 0.6, 0.3, 0.0)
    x = 0.9 * torch.randn(chains, 2, generator=g, dtype=torch.float64)
    for t, s in pairwise(times):
        at = lambda x, t: x - t * flow(x, x.new_full((len(x),), t))  # noqa: E731
        x0 = at(x, t)
        if s > 0:
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(reward(at(leaf, t)).sum(), leaf)
            x0 = x0 + strength * t**2 / (1 - t) * grad
        eps = (x - (1 - t) * x0) / t
        rho = s * (1 - t) / ((1 - s) * t)
        x = (1 - s) * x0 + s * rho * eps
        if s > 0:
            x = x.repeat_interleave(copies, 0)
            x = x + s * math.sqrt(1 - rho**2) * torch.randn(x.shape, generator=g, dtype=torch.float64)
            x = x.view(chains, copies, 2)[torch.arange(chains), reward(at(x, s)).view(chains, copies).argmax(1)]
    setup = problem(PLANE, reward, times=times)
    method = SVDD(chains, copies=copies, guide=Guide(strength))
    result = search(setup, method, max_nfe=1000, generator=seeded(1))
    torch.testing.assert_close(result.best, x[reward(x).argmax()])
    assert result.nfe == chains * (1 + 2 * copies + 2 * 3) and result.gradients == 4


# A real model


@pytest.fixture(scope="module")
def prompt():
    pipe = flux.load(locate("tiny-flux/schnell"))
    return flux.FlowModel.encode(pipe, "three red circles", chunk=2)


def test_a_gradient_reaches_through_the_model_and_the_decoder(prompt):
    """Against a central difference along the gradient itself, three rows in chunks of two."""
    reward = lambda pictures: -(pictures - 0.3).square().mean((1, 2, 3)) * 100  # noqa: E731
    setup = prompt.problem(reward, ddim(), times=(0.7, 0.3, 0.0))
    run = Run(setup, max_nfe=1000, generator=seeded())
    p, h = run.start(3), 0.004
    g = run.gradient(p)
    norm = g.flatten(1).norm(dim=1)
    step = h * g / norm.view(-1, 1, 1, 1)
    up, down = (run.score(run.start(3, p.x + sign * step)).reward for sign in (1, -1))
    torch.testing.assert_close((up - down) / (2 * h), norm, rtol=0.03, atol=0)


def test_without_being_asked_the_model_keeps_no_graph(prompt):
    x = torch.randn(1, *prompt.shape, generator=seeded())
    assert not prompt(x, torch.ones(1)).requires_grad and not prompt.decode(x).requires_grad
    with torch.no_grad():
        assert not prompt(x.requires_grad_(), torch.ones(1)).requires_grad and not prompt.decode(x).requires_grad


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, None])
def test_gradients_are_the_same_whatever_the_chunk(chunk):
    sizes = []
    velocity = lambda x, t: sizes.append(len(x)) or PLANE.velocity(LINEAR)(x, t)  # noqa: E731
    runs = [opened(velocity=velocity, gradient_chunk=c, times=(0.6, 0.3, 0.0)) for c in (chunk, None)]
    p = runs[0].start(5)
    sizes.clear()
    torch.testing.assert_close(*(run.gradient(p) for run in runs))
    assert max(sizes[:-1]) == min(chunk or 5, 5) and sum(sizes) == 10
    assert [(run.gradients, run.reward_calls) for run in runs] == [(5, 5), (5, 5)]
