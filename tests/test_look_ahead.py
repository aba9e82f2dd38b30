"""Look-aheads against Euler's rule by hand, the closed form of Gaussian data, and what they cost."""

import math

import pytest
import torch
from conftest import MEAN, MIXTURE, PLANE, STD, Counting, flat, gaussian_flow, problem, seeded, wish

from flowscale_lite import LINEAR, RBF, SMC, SVDD, VP, Beam, BestOfN, BestOfQuota, Run, ZeroOrder, search
from flowscale_lite.look_ahead import LookAhead, ode, posterior_mean, sibling

FLOW = gaussian_flow("linear")


def opened(look: LookAhead, velocity=MIXTURE, times=(0.6, 0.3, 0.0), **changes) -> Run:
    return Run(problem(velocity=velocity, times=times, look_ahead=look, **changes), max_nfe=1000, generator=seeded())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ode_is_eulers_rule(k):
    velocity = Counting(MIXTURE)
    run = opened(ode(k), velocity, cost=2)
    p = run.score(run.start(4))
    x = p.x
    for i in range(k):
        x = x - 0.6 / k * MIXTURE(x, torch.full((4,), 0.6 * (1 - i / k)))
    torch.testing.assert_close(p.x0, x)
    torch.testing.assert_close(p.reward, wish(x))
    assert torch.equal(p.v, MIXTURE(p.x, torch.full((4,), 0.6)))  # the next transition starts from the state itself
    assert velocity.rows == 4 * k and run.nfe == 2 * 4 * k


def test_ode_in_many_steps_is_where_the_flow_ends():
    """In closed form for Gaussian data. Euler's rule is of order one: twice the steps, half the error."""
    errors = []
    for k in (100, 200):
        run = opened(ode(k), FLOW, dtype=torch.float64)
        p = run.score(run.start(3))
        end = MEAN + STD * (p.x - 0.4 * MEAN) / math.sqrt((0.4 * STD) ** 2 + 0.6**2)
        errors.append((p.x0 - end).abs().max().item())
    assert errors[1] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_a_state_that_is_evaluated_pays_for_the_other_steps_only():
    velocity = Counting(MIXTURE)
    run = opened(ode(3), velocity)
    p = run.score(run.evaluate(run.start(2)))
    assert velocity.rows == run.nfe == 6
    run.score(run.propose(run.propose(p)))  # to 0.3, which is evaluated for the way on, and to 0, judged as it is
    assert velocity.rows == run.nfe == 8


def test_sibling_is_the_other_models_posterior_mean():
    """On the path that it belongs to; in half precision it is read in the states' own. The own model rests."""
    for path in (LINEAR, VP):
        own, other = Counting(MIXTURE), Counting(lambda x, t: torch.sin(x).bfloat16())
        run = opened(sibling(other, path), own, path=path, cost=3)
        p = run.score(run.start(4))
        a, s, da, ds = path.at(0.6)
        v = torch.sin(p.x).bfloat16().float()
        torch.testing.assert_close(p.x0, (ds * p.x - s * v) / (a * ds - da * s))
        assert p.v.isnan().all() and (own.rows, other.rows, run.nfe) == (0, 4, 12)
        run.propose(p)
        assert (own.rows, other.rows, run.nfe) == (4, 4, 24)


# 5 steps, 4 of them to pay for: rows of the own model, and of both
@pytest.mark.parametrize(
    ("method", "own", "both"),
    [
        (BestOfN(2), 2 * 5, 2 * 5),
        (BestOfN(2, init=3), 2 * 5, 2 * (5 + 3)),
        (SVDD(2, 3, copies=4), 2 * 5, 2 * (5 + 3 + 4 * 4)),
        (SMC(6, init=2, threshold=1.0), 6 * 5, 6 * (5 + 2 + 4)),
        (Beam(3, init=2), 3 * 5, 198),
        (Beam(4, narrow=True), 4 + 3 + 2 + 1 + 1, 200),
        (RBF(3, BestOfQuota(), chains=2), 2 * 5, 200),
        (ZeroOrder(3, init=2), 39 * 5, 2 + 39 * 5),
    ],
    ids=repr,
)
def test_the_own_model_is_evaluated_for_states_kept_only(method, own, both):
    rows = Counting(MIXTURE), Counting(lambda x, t: x / 2)
    setup = problem(velocity=rows[0], reward=flat, look_ahead=sibling(rows[1]))
    result = search(setup, method, max_nfe=200, generator=seeded())
    assert (rows[0].rows, rows[1].rows, result.nfe) == (own, both - own, both)


@pytest.mark.parametrize("method", [SVDD(2, 3, copies=4), SMC(6, init=2, threshold=1.0), BestOfN(2, init=3)], ids=repr)
def test_a_model_that_is_its_own_sibling_finds_the_same_at_a_higher_price(method):
    plain, twin = (
        search(setup, method, max_nfe=500, generator=seeded())
        for setup in (problem(), problem(look_ahead=sibling(MIXTURE)))
    )
    assert torch.equal(plain.best, twin.best) and twin.nfe > plain.nfe


@pytest.mark.parametrize("look", [posterior_mean, ode(4), sibling(PLANE.velocity(LINEAR))], ids=lambda look: look.name)
def test_a_gradient_goes_through_every_evaluation(look):
    """Against central differences; 12 rows at the price of 3 an evaluation."""
    run = opened(look, dtype=torch.float64, gradient_chunk=5)
    p, h = run.start(12), 1e-5
    g = run.gradient(p)
    assert run.nfe == 12 * 3 * look.price and run.gradients == run.reward_calls == 12
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        up, down = (run.score(run.start(12, p.x + sign * step)).reward for sign in (1, -1))
        torch.testing.assert_close(g[:, i], (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


def test_a_sibling_that_is_not_differentiable_is_named():
    run = opened(sibling(torch.no_grad()(lambda x, t: x / 2)))
    with pytest.raises(ValueError, match="sibling's velocity is not differentiable"):
        run.gradient(run.start(2))


def test_a_look_ahead_has_a_step_at_least():
    with pytest.raises(ValueError, match="at least 1 step"):
        ode(0)
