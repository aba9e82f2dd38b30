import math
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from conftest import Counting, gaussian_flow, never, seeded

from flowscale_lite import (
    LINEAR,
    RBF,
    BestOfN,
    BudgetExceeded,
    Particles,
    Problem,
    Run,
    ddim,
    ode,
    quadratic,
    sde,
    search,
    uniform,
)

FLOW = gaussian_flow("linear")


def first(x):
    return x[:, 0]


def make(**changes) -> Problem:
    base = Problem(FLOW, first, LINEAR, ddim(1.0), uniform(5), (2,))
    return replace(base, **changes)


METHODS = [BestOfN(), BestOfN(3), RBF(init=4), RBF(init=2, accept="best", chains=3), RBF(init=3, batch=1)]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def test_best_of_n_is_this_loop():
    g, n = seeded(3), 7
    x = torch.randn(n, 2, generator=g)
    for t, s in ((1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0)):
        v = FLOW(x, torch.full((n,), t))
        score = -(x + (1 - t) * v) / t
        x = x - (t - s) * (v - (3 * t**2) ** 2 / 2 * score if s > 0 else v)
        if s > 0:
            x = x + 3 * t**2 * math.sqrt(t - s) * torch.randn(n, 2, generator=g)
    result = search(make(kernel=sde(quadratic())), BestOfN(n), max_nfe=5 * n, generator=seeded(3))
    # The noise is the same to the bit; the arithmetic differs in its order, hence not torch.equal.
    torch.testing.assert_close(result.best, x[x[:, 0].argmax()], rtol=1e-5, atol=1e-5)


@each_method
def test_same_seed_same_result_whatever_the_chunking(method):
    a, b, c = (
        search(make(velocity=Counting(FLOW, chunk)), method, max_nfe=60, generator=seeded(s))
        for chunk, s in ((None, 1), (2, 1), (None, 2))
    )
    assert torch.equal(a.best, b.best) and torch.equal(a.seen, b.seen) and a.trace[-1] == b.trace[-1]
    assert (a.reward, a.nfe, a.reward_calls) == (b.reward, b.nfe, b.reward_calls)
    assert not torch.equal(a.best, c.best)


def test_global_randomness_is_neither_used_nor_touched():
    torch.manual_seed(0)
    a = search(make(), RBF(), max_nfe=60, generator=seeded())
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(99)
    assert torch.equal(a.best, search(make(), RBF(), max_nfe=60, generator=seeded()).best)


@each_method
def test_the_account_is_true(method):
    velocity, reward = Counting(FLOW), Counting(lambda x, _: x[:, 0])
    rewarded = lambda x: reward(x, x.new_zeros(len(x)))  # noqa: E731
    result = search(make(velocity=velocity, reward=rewarded), method, max_nfe=61, generator=seeded())
    assert velocity.rows == result.nfe <= 61 and result.nfe + result.left == 61
    assert reward.rows == result.reward_calls
    assert result.reward == pytest.approx(result.best[0].item())
    assert result.best.shape == (2,) and result.seen.shape == (2,)


@each_method
def test_the_best_posterior_mean_seen_is_the_best_the_reward_ever_saw(method):
    log = []

    def rugged(x):  # so that the best is seldom the last
        return torch.sin(20 * x[:, 0])

    def spy(x):
        log.append(x.clone())
        return rugged(x)

    for seed in range(5):
        log.clear()
        result = search(make(reward=spy), method, max_nfe=60, generator=seeded(seed))
        everything = torch.cat(log)
        assert torch.equal(result.seen, everything[rugged(everything).argmax()])
        assert result.seen_reward == pytest.approx(rugged(everything).max().item(), abs=1e-6)
        assert result.seen_reward >= result.reward
    assert result.seen_time in uniform(5)


@each_method
@pytest.mark.parametrize("cost", [1, 2, 3])
def test_cost_multiplies_every_row(method, cost):
    velocity = Counting(FLOW)
    result = search(make(velocity=velocity, cost=cost), method, max_nfe=130, generator=seeded())
    assert result.nfe == cost * velocity.rows <= 130 and result.nfe + result.left == 130


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_problem(method, dtype):
    result = search(make(dtype=dtype, velocity=Counting(FLOW)), method, max_nfe=60, generator=seeded())
    assert result.best.dtype == result.seen.dtype == dtype


def test_a_velocity_in_half_precision_is_read_in_the_states():
    result = search(make(velocity=lambda x, t: FLOW(x, t).bfloat16()), RBF(), max_nfe=60, generator=seeded())
    assert result.best.dtype == torch.float32


@each_method
def test_samples_are_finished(method):
    result = search(make(), method, max_nfe=60, generator=seeded())
    assert [step.t for step in result.trace] == list(uniform(5))


def test_the_trace_tells_what_happened():
    scores = []

    def spy(x):
        scores.append(x[:, 0].clone())
        return x[:, 0]

    result = search(make(reward=spy), RBF(init=4, batch=3, accept="best"), max_nfe=4 + 4 * 6, generator=seeded(1))
    assert [s.drawn for s in result.trace] == [4, 6, 6, 6, 6, 1]
    assert [s.nfe for s in result.trace] == [4, 10, 16, 22, 28, 28]
    assert [s.reward_calls for s in result.trace] == [4, 10, 16, 22, 28, 29]
    per_step = [torch.cat(scores[i:j]) for i, j in ((0, 1), (1, 3), (3, 5), (5, 7), (7, 9), (9, 10))]
    for step, r in zip(result.trace, per_step, strict=True):
        assert (step.best, step.mean) == pytest.approx((r.max().item(), r.mean().item()))
        assert step.accepted == step.best and step.kept == 1
    assert result.trace[0].parent == per_step[0].argmax()
    silent = search(make(), BestOfN(4), max_nfe=20, generator=seeded()).trace
    assert all(math.isnan(s.best) and math.isnan(s.accepted) for s in silent[:-1]) and silent[-1].kept == 4


@pytest.mark.parametrize("method", [RBF(), BestOfN()], ids=repr)
def test_a_trace_is_light_whatever_the_budget(method):
    for budget in (60, 6000):
        trace = search(make(), method, max_nfe=budget, generator=seeded()).trace
        assert len(trace) == 6 and all(isinstance(v, float | int) for step in trace for v in step)


def test_memory_of_a_result_does_not_hold_its_batch():
    result = search(make(), BestOfN(), max_nfe=5000, generator=seeded())
    assert result.best.untyped_storage().nbytes() == result.seen.untyped_storage().nbytes() == 2 * 4


@each_method
def test_a_watcher_cannot_change_the_result(method):
    times = []

    def meddle(p, run):
        times.append(p.t)
        torch.randn(3, generator=run.generator)
        for tensor in (p.x, p.v, p.x0, p.reward, p.logw, *p.carry.values()):
            tensor.zero_()
        p.carry.clear()
        unscored = replace(p, reward=p.reward * math.nan)
        for spend in (lambda: run.start(1), lambda: run.propose(p), lambda: run.score(unscored)):
            with pytest.raises(RuntimeError, match="on_step"):
                spend()

    plain = search(make(), method, max_nfe=60, generator=seeded())
    watched = search(make(), method, max_nfe=60, generator=seeded(), on_step=meddle)
    assert torch.equal(plain.best, watched.best) and torch.equal(plain.seen, watched.seen)
    assert (plain.reward, plain.nfe, plain.reward_calls) == (watched.reward, watched.nfe, watched.reward_calls)
    assert times == list(uniform(5))


@pytest.mark.parametrize("where", ["velocity", "reward", "on_step"])
def test_an_interrupt_comes_through(where):
    def interrupt(*_):
        raise KeyboardInterrupt

    changes = {} if where == "on_step" else {where: interrupt}
    with pytest.raises(KeyboardInterrupt):
        search(
            make(**changes), RBF(), max_nfe=60, generator=seeded(), on_step=interrupt if where == "on_step" else None
        )


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, None, math.inf])
def test_a_budget_is_a_positive_integer(budget):
    with pytest.raises(ValueError, match="max_nfe"):
        search(make(velocity=never, reward=never), BestOfN(), max_nfe=budget, generator=seeded())


def test_a_generator_is_required():
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        search(make(velocity=never, reward=never), BestOfN(), max_nfe=50, generator=0)
    with pytest.raises(TypeError):
        search(make(), BestOfN(), max_nfe=50)


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
        search(make(reward=reward), method, max_nfe=60, generator=seeded())


def test_a_counting_reward_may_be_of_integers():
    result = search(make(reward=lambda x: (x > 0).sum(1)), RBF(), max_nfe=60, generator=seeded())
    assert result.reward in (0, 1, 2)


@pytest.mark.parametrize(
    "velocity", [lambda x, t: x[:, :1], lambda x, t: x[:-1], lambda x, t: (x,), lambda x, t: x / 0]
)
def test_a_velocity_that_breaks_its_contract(velocity):
    with pytest.raises(ValueError, match="velocity must"):
        search(make(velocity=velocity), BestOfN(3), max_nfe=60, generator=seeded())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"times": (1.0, 0.5)}, "exactly 0"), ({"dtype": torch.bfloat16}, "dtype"), ({"cost": 0}, "cost")],
)
def test_what_is_no_problem(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_problems_and_methods_are_frozen():
    for thing, name in ((make(), "cost"), (RBF(), "init"), (BestOfN(), "n")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, 9)


@dataclass(frozen=True)
class Greedy:
    """A method whose check lies."""

    def check(self, problem, max_nfe):
        pass

    def start(self, run):
        return run.start(4)

    def advance(self, p, run):
        return run.propose(p, 10)


def test_overspending_is_refused_before_it_happens():
    velocity = Counting(FLOW)
    with pytest.raises(BudgetExceeded, match="40 NFE"):
        search(make(velocity=velocity), Greedy(), max_nfe=43, generator=seeded())
    assert velocity.rows == 4


def opened(max_nfe: int = 1000, **changes) -> Run:
    return Run(make(**changes), max_nfe=max_nfe, generator=seeded())


def test_a_run_counts_paid_transitions_and_rows():
    run = opened(101, cost=2)
    assert (
        run.transitions,
        run.evaluations_ahead(),
        run.evaluations_ahead(1.0),
        run.evaluations_ahead(0.4),
        run.evaluations_ahead(0.2),
    ) == (5, 4, 4, 1, 0)
    assert run.evaluations_left == 50
    p = run.propose(run.start(3), 2)
    assert (run.nfe, run.left, run.evaluations_left, p.t, len(p)) == (18, 83, 41, 0.8, 6)


def test_the_last_transition_is_free():
    run = opened(4, times=(1.0, 0.0), velocity=(velocity := Counting(FLOW)))
    p = run.propose(run.start(4))
    assert p.t == 0 and velocity.rows == run.nfe == 4
    assert torch.equal(p.x0, p.x) and not p.v.any()


def test_children_of_one_parent_lie_side_by_side():
    run = opened(kernel=ode)
    p = run.start(2)
    q = run.propose(replace(p, logw=torch.tensor([1.0, 2.0]), carry={"id": torch.tensor([7, 8])}), 3)
    assert q.parent.tolist() == [0, 0, 0, 1, 1, 1] and q.logw.tolist() == [1, 1, 1, 2, 2, 2]
    assert q.carry["id"].tolist() == [7, 7, 7, 8, 8, 8]
    torch.testing.assert_close(q.x, (p.x - 0.2 * p.v).repeat_interleave(3, 0))


def test_the_look_ahead_reward_is_that_of_the_posterior_mean_and_is_paid_once():
    run = opened()
    p = run.start(4)
    assert p.reward.isnan().all()
    scored = run.score(p)
    torch.testing.assert_close(scored.reward, (p.x - p.v)[:, 0])  # on the linear path at t = 1, x0|t = x - v
    assert run.score(scored) is scored and run.reward_calls == 4
    both = run.score(Particles.cat([scored, run.start(2)]))  # those that have a reward keep theirs
    assert run.reward_calls == 6 and torch.equal(both.reward[:4], scored.reward)
    torch.testing.assert_close(both.reward, both.x0[:, 0])


def test_a_start_below_one_has_the_noise_of_its_time():
    run, full = opened(times=(0.6, 0.3, 0.0)), opened()
    torch.testing.assert_close(run.start(5).x, 0.6 * full.start(5).x)


def test_indexing_moves_every_field_together():
    run = opened()
    p = replace(run.score(run.start(5)), logw=torch.arange(5.0), carry={"a": torch.arange(5), "b": torch.rand(5, 3)})
    rows = torch.tensor([3, 3, 0])
    for q, want in ((p[rows], rows), (p[1:3], torch.tensor([1, 2])), (p[p.logw > 2], torch.tensor([3, 4]))):
        assert len(q) == len(want) and q.t == p.t
        for name in ("x", "v", "x0", "reward", "logw", "parent"):
            assert torch.equal(getattr(q, name), getattr(p, name)[want]), name
        for name in ("a", "b"):
            assert torch.equal(q.carry[name], p.carry[name][want])
    whole = Particles.cat([p[:2], p[2:]])
    assert torch.equal(whole.x0, p.x0) and torch.equal(whole.carry["b"], p.carry["b"])
    assert p.best().reward.item() == p.reward.max()


def test_only_particles_of_one_time_are_joined():
    run = opened()
    p = run.start(2)
    with pytest.raises(ValueError, match="one time"):
        Particles.cat([p, run.propose(p)])
    with pytest.raises(ValueError, match="one time"):
        Particles.cat([])


def test_a_transition_of_ones_own():
    """Methods may leave the schedule, up or down, and come back to it."""
    run = opened()
    p = run.propose(run.start(2), s=0.5, kernel=ode)
    assert p.t == 0.5 and run.next_time(p.t) == 0.4 and run.nfe == 4


def test_a_finished_sample_goes_no_further():
    run = opened(times=(1.0, 0.0))
    with pytest.raises(ValueError, match="finished"):
        run.propose(run.propose(run.start(1)))


def test_pictures_as_states():
    def reward(x):
        return x.mean((1, 2, 3))

    problem = make(velocity=lambda x, t: x / (1 + t).view(-1, 1, 1, 1), shape=(3, 4, 4), reward=reward)
    assert search(problem, RBF(), max_nfe=60, generator=seeded()).best.shape == (3, 4, 4)
