"""SVDD, CoDe, Search over Paths and zero-order search against loops written without the package; every account."""

import ast
import math
import sys
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import Counting, never, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

import flowscale_lite
from flowscale_lite import (
    DPS,
    LINEAR,
    SMC,
    SVDD,
    BestOfN,
    Blockwise,
    Funnel,
    GaussianMixture,
    Guide,
    Kernel,
    Problem,
    Refine,
    Run,
    SearchOverPaths,
    ZeroOrder,
    ddim,
    ode,
    paper_vp,
    search,
    uniform,
)
from flowscale_lite.methods.refine import regions

MIXTURE = GaussianMixture([[-1.0, 0.5], [1.0, -0.5], [0.3, 1.4]], [0.3, 0.4, 0.2], [0.5, 0.3, 0.2]).velocity(LINEAR)


def reward(x):
    return -(x - x.new_tensor([1.2, 1.2])).square().sum(1)


def problem(steps=5, velocity=MIXTURE, reward=reward, kernel=None, **rest) -> Problem:
    return Problem(velocity, reward, LINEAR, kernel or ddim(1.0), uniform(steps), (2,), **rest)


def drawn(result) -> list[int]:
    return [step.drawn for step in result.trace]


def at(x, t):
    return MIXTURE(x, torch.full((len(x),), t))


def ancestral(x, v, t, s, g):
    """The exact Gaussian transition on the linear path, by hand."""
    rho = s * (1 - t) / ((1 - s) * t)
    z = torch.randn(x.shape, generator=g) if s > 0 else 0.0
    return (1 - s) * (x - t * v) + s * rho * (x + (1 - t) * v) + s * math.sqrt(1 - rho**2) * z


def best_rows(x, t, groups):
    """The best of each of `groups` runs of neighbouring rows, by look-ahead reward."""
    look = reward(x - t * at(x, t)).view(groups, -1)
    return x.view(groups, -1, 2)[torch.arange(groups), look.argmax(1)]


def plain_blockwise(steps, chains, init, block, copies, g):
    times = uniform(steps)
    x = torch.randn(chains * init, 2, generator=g)
    x = best_rows(x, 1.0, chains) if init > 1 else x
    for k, (t, s) in enumerate(pairwise(times)):
        if k % block == 0 and t > times[-2]:
            x = x.repeat_interleave(copies, 0)
        x = ancestral(x, at(x, t), t, s, g)
        if (k + 1) % block == 0 or s == 0:
            x = best_rows(x, s, chains) if s > 0 else x
    return x[reward(x).argmax()]


@pytest.mark.parametrize(("chains", "init", "copies"), [(1, 1, 4), (2, 3, 5), (3, 1, 1)])
def test_svdd_is_this_loop(chains, init, copies):
    for seed in range(5):
        x = plain_blockwise(6, chains, init, 1, copies, seeded(seed))
        result = search(problem(6), SVDD(chains, init, copies), max_nfe=200, generator=seeded(seed))
        torch.testing.assert_close(result.best, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 6, 9])
def test_blockwise_is_this_loop(block):
    for seed in range(5):
        x = plain_blockwise(6, 2, 2, block, 4, seeded(seed))
        result = search(problem(6), Blockwise(2, 2, block, 4), max_nfe=200, generator=seeded(seed))
        torch.testing.assert_close(result.best, x, rtol=1e-4, atol=1e-4)


def plain_paths(steps, paths, copies, up, down, g):
    times = uniform(steps)
    x = torch.randn(paths, 2, generator=g)
    i, rows = 0, paths
    while True:
        for _ in range(down):
            if i < steps:
                x = x + (times[i + 1] - times[i]) * at(x, times[i])
                i += 1
                rows += len(x) * (i < steps)
        if len(x) > paths:
            x = x[reward(x - times[i] * at(x, times[i]) if i < steps else x).topk(paths).indices]
        if i == steps:
            return x[reward(x).argmax()], rows
        t, s = times[i], times[i - up]
        b = (1 - s) / (1 - t)
        x = x.repeat_interleave(copies, 0)
        x = b * x + math.sqrt(s**2 - (b * t) ** 2) * torch.randn(x.shape, generator=g)
        i, rows = i - up, rows + len(x)


@pytest.mark.parametrize(("up", "down"), [(1, 2), (1, 3), (2, 3), (3, 4), (1, 5)])
def test_search_over_paths_is_this_loop(up, down):
    for seed in range(5):
        x, rows = plain_paths(6, 2, 5, up, down, seeded(seed))
        method = SearchOverPaths(paths=2, copies=5, up=up, down=down)
        result = search(problem(6, kernel=ode), method, max_nfe=500, generator=seeded(seed))
        assert result.nfe == rows
        torch.testing.assert_close(result.best, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [SVDD(), Blockwise(), SMC()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kernel", [ode, ddim(0.0)], ids=lambda k: k.name)
def test_a_deterministic_kernel_is_refused_where_candidates_would_coincide(method, kernel):
    with pytest.raises(ValueError, match="coincide"):
        search(problem(velocity=never, reward=never, kernel=kernel), method, max_nfe=100, generator=seeded())


@pytest.mark.parametrize("init", [1, 3])
@pytest.mark.parametrize("radius", [0.3, 1.0])
def test_zero_order_is_this_loop(init, radius):
    def sample(x):
        for t, s in pairwise(uniform(4)):
            x = x + (s - t) * at(x, t)
        return x

    for seed in range(5):
        g = seeded(seed)
        noise = torch.randn(init, 2, generator=g)
        pivot = best_rows(noise, 1.0, 1) if init > 1 else noise
        best, left, rounds = sample(pivot), 50 - init - 3, [init]
        while left >= 4:
            n = min(3, left // 4)
            noise = math.sqrt(1 - radius**2) * pivot + radius * torch.randn(n, 2, generator=g)
            x = sample(noise)
            i = reward(x).argmax()
            if reward(x)[i] > reward(best)[0]:
                pivot, best = noise[i : i + 1], x[i : i + 1]
            left -= 4 * n
            rounds.append(n)
        result = search(problem(4, kernel=ode), ZeroOrder(3, radius, init), max_nfe=50, generator=seeded(seed))
        torch.testing.assert_close(result.best, best[0], rtol=1e-4, atol=1e-4)
        # every step draws its round's samples at 4 times and the next round's noises
        assert result.left == left and drawn(result) == [init, *(4 * n + m for n, m in pairwise([1, *rounds[1:], 0]))]


@pytest.mark.parametrize(("init", "batch"), [(1, 1), (3, 2), (5, 4)])
def test_refine_is_this_loop(init, batch):
    for seed in range(5):
        g = seeded(seed)
        noise = torch.randn(init, 2, generator=g)
        eps = best_rows(noise, 1.0, 1)
        x0 = eps - at(eps, 1.0)
        levels, rows, spent, rounds = uniform(4)[1:-1], 50 - init, 0, [init]
        for k, s in enumerate(levels):
            while spent < (k + 1) * rows / len(levels):
                n = min(batch, math.ceil((k + 1) * rows / len(levels)) - spent)
                first = torch.rand(n, 2, generator=g).argsort(1)[:, :1] == 0  # which of the two numbers is redrawn
                where = torch.cat([first, ~first], 1)
                x = (1 - s) * x0 + s * torch.where(where, torch.randn(n, 2, generator=g), eps)
                v = at(x, s)
                i = reward(x - s * v).argmax()
                if reward(x - s * v)[i] > reward(x0)[0]:
                    x0, eps = (x - s * v)[i : i + 1], (x + (1 - s) * v)[i : i + 1]
                spent += n
                rounds.append(n)
        result = search(problem(4), Refine(init, 0.5, 4, batch), max_nfe=50, generator=seeded(seed))
        torch.testing.assert_close(result.best, x0[0], rtol=1e-4, atol=1e-4)
        assert drawn(result) == [*rounds, 1] and result.left == 0


@pytest.mark.parametrize(("init", "states"), [(4, 4), (9, 5), (16, 8)])
def test_funnel_is_this_loop(init, states):
    for seed in range(5):
        g, times, left = seeded(seed), uniform(5), 200 - init
        x, rounds = torch.randn(init, 2, generator=g), [init]
        x = x[reward(x - at(x, 1.0)).topk(states).indices]
        for k, (t, s) in enumerate(pairwise(times)):
            if s > 0:
                n = left // ((4 - k) * len(x))
                x = x.repeat_interleave(n, 0)
            x = ancestral(x, at(x, t), t, s, g)
            rounds.append(len(x))
            if s > 0:
                left -= len(x)
                x = x[reward(x - s * at(x, s)).topk(round(states ** (1 - (k + 1) / 4))).indices]
        result = search(problem(5), Funnel(init, states), max_nfe=200, generator=seeded(seed))
        torch.testing.assert_close(result.best, x[reward(x).argmax()], rtol=1e-4, atol=1e-4)
        assert drawn(result) == rounds and result.left == left


def test_a_funnel_opens_where_it_was_filled():
    with pytest.raises(ValueError, match="at least states"):
        Funnel(3, 4)


@pytest.mark.parametrize(
    ("shape", "whole", "part"),
    [
        ((3, 8, 8), (1, 8, 8), 4 / 16),
        ((2, 3), (2, 3), 2 / 6),
        ((8,), (8,), 2 / 8),
        ((4, 2, 4, 8), (1, 2, 4, 8), 8 / 32),
    ],
)
def test_regions_are_blocks_of_the_share_asked_for(shape, whole, part):
    """Every region is chosen equally often: 4,000 choices, the largest deviation of the shares below 4.5 SE."""
    where = regions(4000, shape, 0.25, 4, seeded())
    assert where.shape == (4000, *whole) and where.dtype == torch.bool
    assert (where.float().mean(0) - part).abs().max() < 4.5 * math.sqrt(part * (1 - part) / 4000)
    assert (where.flatten(1).sum(1) == round(part * math.prod(whole))).all()
    if shape == (3, 8, 8):
        blocks = where.view(4000, 4, 2, 4, 2).float().mean((2, 4))
        assert ((blocks == 0) | (blocks == 1)).all(), "a region is redrawn as a whole"


def test_refine_leaves_the_other_regions_alone():
    """Under a velocity that acts entry by entry, an accepted try changes no more than the share."""
    seen = []
    setup = replace(problem(5, lambda x, t: x / 2), shape=(3, 8, 8), reward=lambda x: x.flatten(1).sum(1))
    search(setup, Refine(share=0.25, batch=1), max_nfe=60, generator=seeded(), on_step=lambda p, _: seen.append(p))
    holders = [p for p, q in pairwise(seen[1:]) if p.t == q.t]
    changed = [((b.x - a.x).abs() > 1e-4).any(1).float().mean() for a, b in pairwise(holders) if a.t == b.t]
    assert len(changed) > 20 and max(changed) <= 0.25 and max(changed) > 0


def test_noises_of_neighbours_keep_their_size():
    """In 1,000 dimensions, when every round moves on: |x|^2/1000 is 1, spread 0.045; sums would have grown to 6."""
    calls, last = [], []

    def ever_better(x):
        calls.append(len(x))
        return x.new_full((len(x),), float(len(calls)))

    setup = replace(problem(1, lambda x, t: x / 2, ever_better), shape=(1000,))
    search(setup, ZeroOrder(5, 0.5), max_nfe=101, generator=seeded(), on_step=lambda p, _: last.append(p.x))
    assert len(calls) == 21 and (last[-2].square().mean(1) - 1).abs().max() < 4 * 0.045
    first, second = last[0], last[1]
    along = (second * first).mean(1) / first.square().mean()
    assert (along - math.sqrt(0.75)).abs().max() < 4 * 0.5 / math.sqrt(1000)


def test_neighbours_descend_from_the_row_that_became_their_pivot():
    log = []
    search(problem(4), ZeroOrder(3), max_nfe=100, generator=seeded(), on_step=lambda p, _: log.append(p))
    rounds = list(pairwise(log[:-1]))
    moved = [(a, b) for a, b in rounds if b.carry["record"][0] > a.carry["record"][0]]
    assert all((b.parent == b.parent[0]).all() and b.parent[0] < len(a) for a, b in rounds)
    assert all(torch.equal(b.carry["pivot"][0], a.x[b.parent[0]]) for a, b in moved)
    assert any(b.parent[0] > 0 for _, b in moved)


# What holds for every method


METHODS = [
    BestOfN(),
    BestOfN(3, init=4),
    SVDD(2, 3),
    SVDD(1, copies=2),
    Blockwise(2, 2, 3),
    Blockwise(1, copies=2),
    SearchOverPaths(2, up=1, down=2),
    SearchOverPaths(1, copies=3, init=2),
    SMC(),
    SMC(5, init=2, threshold=0.9),
    ZeroOrder(),
    DPS(),
    DPS(Guide(0.5, normalised=True), 2, 2),
    SVDD(2, guide=Guide(below=0.6)),
    SMC(guide=Guide(), threshold=0.9),
    Refine(),
    Refine(3, 1.0, 1, 7),
    Funnel(),
    Funnel(5, 3),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def unit(method, setup: Problem) -> float:
    """NFE of the least that a method can spend more; infinite where its own fields say how much it spends."""
    if getattr(method, "copies", None) or getattr(method, "n", None) or getattr(method, "particles", None):
        return math.inf
    paid, steered = setup.evaluations_ahead(), method.guide.cost(setup) if getattr(method, "guide", None) else 0
    if isinstance(method, SVDD | Blockwise):
        block = getattr(method, "block", 1)
        rows = method.chains * (paid - (paid - 1) // block * block)  # those of the last block
        rows = rows if paid else math.inf
    elif isinstance(method, Refine | Funnel):
        rows = 1 if paid else math.inf
        if isinstance(method, Funnel):  # the last candidates are those of this many states
            rows *= round(method.states ** (1 / max(1, paid)))
    elif isinstance(method, SearchOverPaths):
        last = method.down + 1 - (setup.evaluations_ahead() - method.down) % (method.down - method.up)
        rows = method.paths * (last if last > method.up else method.down + 1)
    else:
        rows = getattr(method, "init", 1) * (not isinstance(method, ZeroOrder)) + isinstance(method, ZeroOrder)
        rows += paid + steered
    return rows * setup.cost


class Watched(Counting):
    """Counts rows, and who asks."""

    def __call__(self, x, t):
        assert sys._getframe(1).f_code is Run._look_ahead.__code__, "evaluated behind Run's back"
        return super().__call__(x, t)


@st.composite
def any_method(draw):
    few, some = st.integers(1, 3), st.one_of(st.none(), st.integers(1, 4))
    guide = Guide(0.5, normalised=draw(st.booleans()), below=draw(st.sampled_from([0.4, 1.0])))
    maybe = draw(st.sampled_from([None, guide]))
    down = draw(st.integers(2, 5))
    return draw(
        st.sampled_from(
            [
                BestOfN(draw(some), draw(few)),
                SVDD(draw(few), draw(few), draw(some), maybe),
                Blockwise(draw(few), draw(few), draw(st.integers(1, 4)), draw(some)),
                SearchOverPaths(draw(few), draw(some), draw(few), draw(st.integers(1, down - 1)), down),
                SMC(draw(some), init=draw(few), threshold=draw(st.sampled_from([0.0, 0.5, 1.0])), guide=maybe),
                ZeroOrder(draw(st.integers(1, 5)), draw(st.sampled_from([0.2, 1.0])), draw(few)),
                DPS(guide, draw(some), draw(few)),
                Funnel(draw(few) + 2, draw(few)),
                Refine(draw(few), draw(st.sampled_from([0.01, 0.4, 1.0])), draw(st.integers(1, 4)), draw(few)),
            ]
        )
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    method=any_method(),
    steps=st.integers(1, 8),
    budget=st.integers(1, 40),
    prices=st.sampled_from([(1, 3), (1, 3), (2, 1), (3, 2)]),
    shape=st.sampled_from([(), (1,), (2,), (1, 1, 3), (2, 3)]),
    grid=st.sampled_from([uniform, paper_vp]),
)
def test_any_budget_is_spent_to_less_than_a_unit_or_refused_before_any_compute(
    method, steps, budget, prices, shape, grid
):
    velocity = Watched(lambda x, t: torch.tanh(x) * (1 + t.view(-1, *[1] * len(shape))))
    judged = Counting(lambda x, _: torch.sin(3 * x.reshape(len(x), -1).sum(1)))
    setup = Problem(
        velocity, lambda x: judged(x, x.new_zeros(len(x))), LINEAR, ddim(1.0), grid(steps), shape,
        cost=prices[0], gradient_cost=prices[1],
    )  # fmt: skip
    try:
        method.check(setup, budget)
    except ValueError as error:
        assert any(why in str(error) for why in ("max_nfe >=", "nothing to steer", "over in one leg"))
        with pytest.raises(ValueError):
            search(setup, method, max_nfe=budget, generator=seeded())
        assert velocity.rows == judged.rows == 0
        if "max_nfe >=" in str(error):  # and with what it asks for, it runs
            least = int(str(error).split("max_nfe >= ")[1].split(";")[0])
            method.check(setup, least)
            assert search(setup, method, max_nfe=least, generator=seeded()).nfe <= least
        return
    result = search(setup, method, max_nfe=budget, generator=seeded())
    assert result.nfe == prices[0] * (velocity.rows + (prices[1] - 1) * result.gradients) == budget - result.left
    assert 0 <= result.left < unit(method, setup), (method, result)
    assert result.reward_calls == judged.rows and result.best.shape == shape
    p = result.particles
    assert p.t == 0 and result.reward == p.reward.max() and torch.equal(result.best, p.x[p.reward.argmax()])
    assert result.seen_reward >= result.reward


@each_method
def test_same_seed_same_result_whatever_the_chunking(method):
    a, b, c = (
        search(problem(velocity=Counting(MIXTURE, chunk)), method, max_nfe=120, generator=seeded(s))
        for chunk, s in ((None, 1), (2, 1), (None, 2))
    )
    torch.testing.assert_close(a.best, b.best)
    assert (a.nfe, a.reward_calls, drawn(a)) == (b.nfe, b.reward_calls, drawn(b))
    assert not torch.allclose(a.best, c.best)


@each_method
def test_a_watcher_changes_nothing(method):
    def meddle(p, run):
        torch.randn(3, generator=run.generator)
        for tensor in (p.x, p.v, p.x0, p.reward, p.logw, p.parent, *p.carry.values()):
            tensor.zero_()
        for spend in (lambda: run.start(1), lambda: run.noise(1)):
            with pytest.raises(RuntimeError, match="on_step"):
                spend()

    plain = search(problem(), method, max_nfe=120, generator=seeded())
    watched = search(problem(), method, max_nfe=120, generator=seeded(), on_step=meddle)
    assert torch.equal(plain.best, watched.best) and repr(plain.trace) == repr(watched.trace)  # nan is not itself


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_problem(method, dtype):
    p = search(problem(dtype=dtype), method, max_nfe=120, generator=seeded()).particles
    assert p.x.dtype == p.reward.dtype == p.logw.dtype == dtype and p.parent.dtype == torch.int64


@pytest.mark.parametrize(
    "method", [m for m in METHODS if not isinstance(m, SearchOverPaths | ZeroOrder | Refine)], ids=repr
)
def test_parents_are_rows_of_the_step_before(method):
    """Under a transition that hardly moves, a particle is where its ancestor one step ago was."""
    still = Kernel("still", lambda path, x, v, t, s: (x, 1e-6))
    log, first = [], []
    setup = problem(6, kernel=still, reward=lambda x: first.append(x) or 3 * x[:, 0])
    search(setup, method, max_nfe=150, generator=seeded(), on_step=lambda p, _: log.append(p))
    for before, after in pairwise(log):
        torch.testing.assert_close(after.x, before.x[after.parent], rtol=0, atol=1e-4)
    if getattr(method, "init", 1) > 1:  # at the start they are rows of the initial draws
        torch.testing.assert_close(log[0].x0, first[0][log[0].parent])


def test_parents_go_through_any_number_of_proposals_and_choices():
    run = Run(problem(), max_nfe=100, generator=seeded())
    q = run.propose(run.start(3), 2)[torch.tensor([5, 0, 3])]
    assert run.propose(q, 2).parent.tolist() == [2, 2, 0, 0, 1, 1]


def test_a_run_starts_from_states_given():
    run = Run(problem(), max_nfe=100, generator=seeded())
    x = run.noise(3)
    assert torch.equal(x, torch.randn(3, 2, generator=seeded())) and run.nfe == 0
    p = run.start(3, x)
    assert torch.equal(p.x, x) and run.nfe == 3
    with pytest.raises(ValueError, match="x must have shape"):
        run.start(2, x)


def test_a_transition_told_is_the_one_drawn_from():
    run = Run(problem(), max_nfe=100, generator=seeded())
    p = run.start(3)
    state = run.generator.get_state()
    mean, std = run.transition(p, s=0.4)
    assert torch.equal(run.generator.get_state(), state) and run.nfe == 3
    assert torch.equal(run.propose(p, s=0.4).x, mean + std * torch.randn(3, 2, generator=seeded().set_state(state)))


@each_method
def test_methods_are_frozen(method):
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, 1)


@pytest.mark.parametrize(
    ("method", "name"),
    [(SVDD, n) for n in ("chains", "init", "copies")]
    + [(Blockwise, n) for n in ("chains", "init", "block", "copies")]
    + [(SearchOverPaths, n) for n in ("paths", "copies", "init", "up", "down")]
    + [(ZeroOrder, n) for n in ("neighbours", "init", "radius")]
    + [(Funnel, n) for n in ("init", "states")]
    + [(Refine, n) for n in ("init", "share", "cells", "batch")]
    + [(DPS, n) for n in ("n", "init")],
)
def test_hyperparameters_out_of_range_are_refused(method, name):
    with pytest.raises(ValueError, match=name):
        method(**{name: 0})


@pytest.mark.parametrize(("up", "down"), [(2, 2), (3, 2)])
def test_paths_that_never_end_are_refused(up, down):
    with pytest.raises(ValueError, match="further down than up"):
        SearchOverPaths(up=up, down=down)


def test_a_schedule_may_have_no_time_below_its_start():
    """One transition, free: nothing to select, so only the initial draws are spent."""
    for method in (SVDD(2, 3), Blockwise(2, 3)):
        result = search(problem(1), method, max_nfe=40, generator=seeded())
        assert drawn(result) == [6, 2] and result.left == 34


# Run is the only way to the velocity


def reads(source: str) -> set[str]:
    """What a method must leave alone: a problem's velocity and reward, private parts of others, and getattr."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            private = node.attr.startswith("_") and not node.attr.startswith("__") and owner not in ("self", "cls")
            if private or (node.attr == "velocity" and owner != "path") or (node.attr, owner) == ("reward", "problem"):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in ("vars", "getattr"):
            found.add(node.id)
    return found


FILES = sorted(Path(flowscale_lite.__file__).parent.glob("methods/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_methods_see_the_velocity_through_run_only(path):
    allowed = {"getattr"} if path.stem == "_common" else set()  # it checks fields by name
    assert reads(path.read_text(encoding="utf-8")) <= allowed


@pytest.mark.parametrize(
    "cheat",
    [
        "run.problem.velocity(x, t)",
        "setup = run.problem; setup.velocity",
        "run.problem.reward(x)",
        "v = run._look_ahead(x, t)",
        "getattr(run.problem, name)",
    ],
)
def test_a_look_behind_run_is_found(cheat):
    assert reads(cheat)


def test_a_velocity_called_behind_runs_back_is_found():
    class Cheat(BestOfN):
        def advance(self, p, run):
            run.problem.velocity(p.x, p.x.new_full((len(p),), p.t))
            return super().advance(p, run)

    with pytest.raises(AssertionError, match="behind"):
        search(problem(velocity=Watched(MIXTURE)), Cheat(), max_nfe=40, generator=seeded())
