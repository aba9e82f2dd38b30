"""Particles, the run that owns budget, clock and noise, and the search as an iterator of steps."""

import math
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from conftest import Counting, drawn, gaussian_flow, never, problem, seeded

from flowscale_lite import (
    RBF,
    BestOfN,
    BestOfQuota,
    BudgetExceeded,
    Particles,
    Run,
    Search,
    ode,
    search,
    steps,
    uniform,
)

FLOW = gaussian_flow("linear")


def opened(max_nfe: int = 1000, **changes) -> Run:
    return Run(problem(**{"velocity": FLOW} | changes), max_nfe=max_nfe, generator=seeded())


# Particles


def test_indexing_moves_every_field_together():
    run = opened()
    p = replace(
        run.evaluate(run.start(5)),
        reward=torch.tensor([3.0, 1.0, 5.0, 2.0, 5.0]),
        logw=torch.arange(5.0),
        carry={"a": torch.arange(5), "b": torch.rand(5, 3)},
    )
    for q, want in (
        (p[torch.tensor([3, 3, 0])], torch.tensor([3, 3, 0])),
        (p[1:3], torch.tensor([1, 2])),
        (p[p.logw > 2], torch.tensor([3, 4])),
        (p.top(4)[2:], torch.tensor([0, 3])),
        (p.best(), torch.tensor([2])),  # the first among equals
        (Particles.cat([p[:2], p[2:]]), torch.arange(5)),
    ):
        assert len(q) == len(want) and q.t == p.t
        for name in ("x", "v", "x0", "reward", "logw", "parent"):
            assert torch.equal(getattr(q, name), getattr(p, name)[want]), name
        for name in ("a", "b"):
            assert torch.equal(q.carry[name], p.carry[name][want])


def test_only_particles_of_one_time_are_joined():
    run = opened()
    p = run.start(2)
    for parts in ([p, run.propose(p)], []):
        with pytest.raises(ValueError, match="one time"):
            Particles.cat(parts)


# The run: what is paid, and when


def test_transitions_to_pay_for_and_evaluations_left():
    run = opened(101, cost=2)
    assert [run.problem.evaluations_ahead(t) for t in (None, 1.0, 0.5, 0.4, 0.2)] == [4, 4, 2, 1, 0]
    assert [run.next_time(t) for t in (1.0, 0.5, 0.4, 0.2)] == [0.8, 0.4, 0.2, 0.0]
    assert (run.left, run.evaluations_left) == (101, 50)


def test_what_is_drawn_is_paid_for_when_its_velocity_is_needed():
    run = opened(velocity=(velocity := Counting(FLOW)), cost=2)
    p = run.start(3)
    assert run.nfe == 0 and p.v.isnan().all() and p.x0.isnan().all() and p.reward.isnan().all()
    q = run.propose(p, 2)  # pays for the parents
    assert run.nfe == 2 * 3 and (q.t, len(q)) == (0.8, 6)
    q = run.evaluate(q)
    assert run.nfe == 2 * 9 and run.evaluate(q) is q
    torch.testing.assert_close(q.x0, q.x - 0.8 * q.v)  # on the linear path x = x0 + t v
    run.propose(run.score(q))
    assert run.nfe == 2 * velocity.rows == 2 * 9 and run.reward_calls == 6


def test_rows_that_are_known_are_not_paid_for_again():
    run = opened()
    known, fresh = run.score(run.start(4)), run.start(2)
    assert run.score(known) is known
    both = run.score(Particles.cat([known[:1], fresh, known[1:]]))
    assert (run.nfe, run.reward_calls) == (6, 6)
    assert torch.equal(both.x[1:3], fresh.x) and torch.equal(both.reward[3:], known.reward[1:])
    torch.testing.assert_close(both.x0, both.x - both.v)
    torch.testing.assert_close(both.reward, run.problem.reward(both.x - both.v))
    evaluated = run.evaluate(Particles.cat([run.evaluate(run.start(2)), run.start(3)]))
    assert run.nfe == 6 + 5 and not evaluated.v.isnan().any()


def test_the_last_transition_is_free():
    run = opened(4, times=(1.0, 0.0))
    p = run.propose(run.start(4))
    assert p.t == 0 and run.nfe == 4
    assert torch.equal(p.x0, p.x) and not p.v.any()
    assert torch.equal(run.score(p).reward, run.problem.reward(p.x)) and run.nfe == 4
    with pytest.raises(ValueError, match="finished"):
        run.propose(p)


@dataclass(frozen=True)
class Greedy:
    """A method whose check lies."""

    def check(self, problem, max_nfe):
        pass

    def start(self, run):
        return run.start(4)

    def advance(self, p, run):
        return run.score(run.propose(p, 10))


def test_overspending_is_refused_before_it_happens():
    velocity = Counting(FLOW)
    with pytest.raises(BudgetExceeded, match="40 NFE"):
        search(problem(velocity=velocity), Greedy(), max_nfe=43, generator=seeded())
    assert velocity.rows == 4


# The run: states


def test_a_start_has_the_noise_of_its_time():
    run, full = opened(times=(0.6, 0.3, 0.0)), opened()
    assert torch.equal(full.start(5).x, torch.randn(5, 2, generator=seeded()))
    torch.testing.assert_close(run.start(5).x, 0.6 * torch.randn(5, 2, generator=seeded()))
    x = torch.rand(3, 2)
    assert torch.equal(run.start(3, x).x, x)
    with pytest.raises(ValueError, match="x must have shape"):
        run.start(2, x)


def test_children_of_one_parent_lie_side_by_side():
    run = opened(kernel=ode)
    p = run.evaluate(run.start(2))
    q = run.propose(replace(p, logw=torch.tensor([1.0, 2.0]), carry={"id": torch.tensor([7, 8])}), 3)
    assert q.parent.tolist() == [0, 0, 0, 1, 1, 1] and q.logw.tolist() == [1, 1, 1, 2, 2, 2]
    assert q.carry["id"].tolist() == [7, 7, 7, 8, 8, 8]
    torch.testing.assert_close(q.x, (p.x - 0.2 * p.v).repeat_interleave(3, 0))


def test_parents_go_through_any_number_of_proposals_and_choices():
    run = opened()
    q = run.propose(run.start(3), 2)[torch.tensor([5, 0, 3])]
    assert run.propose(q, 2).parent.tolist() == [2, 2, 0, 0, 1, 1]
    assert run.place(q, q.x, 0.3).parent.tolist() == [2, 0, 1]


def test_a_transition_told_is_the_one_drawn_from_with_a_noise_for_every_child():
    run = opened()
    p = run.evaluate(run.start(3))
    state = run.generator.get_state()
    mean, std = run.transition(p, s=0.4)
    assert torch.equal(run.generator.get_state(), state) and run.nfe == 3
    z = torch.randn(6, 2, generator=seeded().set_state(state))
    assert torch.equal(run.propose(p, 2, s=0.4).x, mean.repeat_interleave(2, 0) + std * z)


def test_a_transition_of_ones_own():
    """Methods may leave the schedule, up or down, and come back to it."""
    run = opened()
    p = run.evaluate(run.start(2))
    q = run.propose(p, s=0.5, kernel=ode)
    torch.testing.assert_close(q.x, p.x - 0.5 * p.v)
    assert q.t == 0.5 and run.propose(q).t == 0.4


# The search, step by step


FOUR = BestOfN(4)


def begun(method=FOUR, max_nfe=100, **changes) -> Search:
    return steps(problem(**changes), method, max_nfe=max_nfe, generator=seeded())


def test_a_search_can_be_stopped_and_gone_on_with():
    whole, found, other = search(problem(), RBF(), max_nfe=100, generator=seeded()), begun(RBF()), begun(RBF())
    first = [next(found) for _ in range(2)]
    assert found.run.nfe == first[-1].nfe < 100 and found.particles.t == first[-1].t == 0.8
    for _ in other:  # another search meanwhile
        pass
    rest = list(found)
    assert found.trace == [*first, *rest] and [step.t for step in found.trace] == list(uniform(5))
    assert torch.equal(found.result().best, whole.best)
    with pytest.raises(StopIteration):
        next(found)


def test_whoever_steps_may_choose():
    """Of four noises the third, followed by hand: five evaluations of one row instead of twenty."""
    velocity = Counting(FLOW)
    found = begun(velocity=velocity, kernel=ode)
    next(found)
    x = found.particles.x[2:3]
    found.particles = found.particles[torch.tensor([2])]
    for t in (1.0, 0.8, 0.6, 0.4, 0.2):
        next(found)
        x = x - 0.2 * FLOW(x, torch.tensor([t]))
    result = found.result()
    torch.testing.assert_close(result.particles.x, x)
    assert velocity.rows == result.nfe == 5 and [step.kept for step in result.trace] == [4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("method", [FOUR, RBF()], ids=repr)
def test_a_search_not_finished_has_no_result(method):
    found = begun(method)
    for _ in range(6):
        with pytest.raises(ValueError, match="not finished"):
            found.result()
        next(found)
    assert found.result().nfe == found.run.nfe


# What a search tells


def test_the_trace_tells_what_happened():
    scores = []
    reward = lambda x: scores.append(x[:, 0].clone()) or x[:, 0]  # noqa: E731
    method = RBF(init=4, batch=3, rule=BestOfQuota())
    result = search(problem(reward=reward), method, max_nfe=4 + 4 * 6, generator=seeded(1))
    assert drawn(result) == [4, 6, 6, 6, 6, 1]
    assert [s.nfe for s in result.trace] == [4, 10, 16, 22, 28, 28]
    assert [s.reward_calls for s in result.trace] == [4, 10, 16, 22, 28, 29]
    per_step = [torch.cat(scores[i:j]) for i, j in ((0, 1), (1, 3), (3, 5), (5, 7), (7, 9), (9, 10))]
    for step, r in zip(result.trace, per_step, strict=True):
        assert (step.best, step.mean) == pytest.approx((r.max().item(), r.mean().item()))
        assert step.accepted == step.best and step.kept == 1
    assert result.trace[0].parent == per_step[0].argmax()
    silent = search(problem(), BestOfN(4), max_nfe=20, generator=seeded()).trace
    assert all(math.isnan(s.best) and math.isnan(s.accepted) for s in silent[:-1]) and silent[-1].kept == 4


@pytest.mark.parametrize("method", [RBF(), BestOfN()], ids=repr)
def test_a_result_is_light_whatever_the_budget(method):
    for budget in (60, 5000):
        result = search(problem(), method, max_nfe=budget, generator=seeded())
        assert len(result.trace) == 6 and all(isinstance(v, float | int) for step in result.trace for v in step)
        assert result.best.untyped_storage().nbytes() == result.seen.untyped_storage().nbytes() == 2 * 4


# What is refused


@pytest.mark.parametrize("where", ["velocity", "reward"])
def test_an_interrupt_comes_through(where):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(problem(**{where: interrupt}), RBF(), max_nfe=60, generator=seeded())


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, None, math.inf])
def test_a_budget_is_a_positive_integer(budget):
    with pytest.raises(ValueError, match="max_nfe"):
        begun(velocity=never, reward=never, max_nfe=budget)


def test_a_generator_is_required():
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        search(problem(velocity=never, reward=never), BestOfN(), max_nfe=50, generator=0)
    with pytest.raises(TypeError):
        search(problem(), BestOfN(), max_nfe=50)


@pytest.mark.parametrize(
    "reward",
    [
        lambda x: x,
        lambda x: x[:, 0].sum(),
        lambda x: x[:1, 0],
        lambda x: x[:, 0].tolist(),
        lambda x: x[:, 0] * math.nan,
        lambda x: x[:, 0].clone().fill_(-math.inf),
    ],
)
@pytest.mark.parametrize("method", [BestOfN(3), RBF()], ids=repr)
def test_a_reward_that_breaks_its_contract(reward, method):
    with pytest.raises(ValueError, match="reward must"):
        search(problem(reward=reward), method, max_nfe=60, generator=seeded())


@pytest.mark.parametrize(
    "velocity", [lambda x, t: x[:, :1], lambda x, t: x[:-1], lambda x, t: (x,), lambda x, t: x / 0]
)
def test_a_velocity_that_breaks_its_contract(velocity):
    with pytest.raises(ValueError, match="velocity must"):
        search(problem(velocity=velocity), BestOfN(3), max_nfe=60, generator=seeded())


def test_models_of_other_types_are_read_in_the_states():
    """A reward that counts may answer in integers, a velocity in half precision."""
    half = problem(velocity=lambda x, t: FLOW(x, t).bfloat16(), reward=lambda x: (x > 0).sum(1))
    result = search(half, RBF(), max_nfe=60, generator=seeded())
    assert result.best.dtype == torch.float32 and result.reward in (0, 1, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("times", (1.0, 0.5)), ("dtype", torch.bfloat16), ("shape", (2, 0))]
    + [(name, value) for name in ("cost", "gradient_cost", "gradient_chunk") for value in (0, -1, 1.5, True)]
    + [("cost", None), ("gradient_cost", None), ("shape", (2, 1.5))],
)
def test_what_is_no_problem(field, value):
    with pytest.raises(ValueError, match={"times": "exactly 0"}.get(field, field)):
        problem(**{field: value})


def test_problems_are_frozen():
    with pytest.raises(FrozenInstanceError):
        problem().cost = 9
