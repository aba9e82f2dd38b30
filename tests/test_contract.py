"""What holds of every method, at any budget and under every look-ahead. A new method takes one line in METHODS."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import MIXTURE, Counting, drawn, never, problem, seeded, wish
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowscale_lite import (
    RBF,
    SMC,
    SVDD,
    Beam,
    BestOfEnough,
    BestOfN,
    BestOfQuota,
    Blockwise,
    Cascade,
    Draft,
    FirstImprovement,
    Guide,
    Kernel,
    Method,
    Problem,
    Refine,
    Result,
    SearchOverPaths,
    ZeroOrder,
    beyond,
    ddim,
    logit_normal,
    methods,
    ode,
    paper_vp,
    sde,
    search,
    steps,
    uniform,
)
from flowscale_lite.look_ahead import LookAhead, posterior_mean, sibling
from flowscale_lite.look_ahead import ode as ode_ahead
from flowscale_lite.methods.stopping import Rule

# What a method may leave of a budget: less than so many evaluations, on a schedule with transitions to pay for


def judging(setup: Problem) -> int:
    return setup.look_ahead.price


def steering(m: Method, setup: Problem) -> int:
    """Evaluations that the gradients of one sample cost."""
    steered = sum(t <= m.guide.below for t in setup.times[:-2]) if m.guide else 0
    return steered * setup.gradient_cost * setup.look_ahead.price


def a_sample(m: BestOfN, setup: Problem) -> int:
    look = setup.look_ahead
    noise = 1 if m.init == 1 else m.init * look.price + (0 if look.evaluates else 1)
    return noise + setup.evaluations_ahead() + steering(m, setup)


def a_particle(m: SMC, setup: Problem) -> int:
    ahead, look = setup.evaluations_ahead(), setup.look_ahead
    return (m.init + ahead) * look.price + (0 if look.evaluates else ahead + 1) + steering(m, setup)


def a_branch_each(m: Blockwise, setup: Problem) -> int:
    """Of the last block, which may be shorter, and ends in a free transition."""
    ahead = setup.evaluations_ahead()
    return m.chains * (ahead - (ahead - 1) // m.block * m.block)


def a_copy_of_each_path(m: SearchOverPaths, setup: Problem) -> int:
    """Through the last leg: up once, then down to the last time but 0, which is free."""
    i = m.down
    while (left := len(setup.times) - 1 - i) > 0:
        last, i = min(m.down, m.up + left), i + m.down - m.up
    return m.paths * last


LOOKS = ("posterior mean", "ode", "sibling")


@dataclass(frozen=True)
class Line:
    """A method, and what the tests must know of it.

    Attributes:
        method: with numbers of its own; other whole numbers are tried as well.
        spare: (method, problem) -> evaluations, of which it leaves fewer; None if its fields say how much it spends.
        noise: its candidates come from the problem's kernel, so a deterministic one is refused.
        kernel: False if it moves particles in its own way, whatever the problem's kernel.
        looks: the look-aheads that it takes.
    """

    method: Method
    spare: Callable[[Method, Problem], int] | None = None
    noise: bool = False
    kernel: bool = True
    looks: tuple[str, ...] = LOOKS


def a_child_each(m: SVDD | RBF, setup: Problem) -> int:
    return m.chains * judging(setup)


def a_child_of_each_state(m: Beam, setup: Problem) -> int:
    kept = round(m.states ** (1 / setup.evaluations_ahead())) if m.narrow else m.states
    return kept * judging(setup)


STRONG = Guide(0.5, normalised=True, below=0.7)
METHODS = [
    Line(BestOfN(), a_sample),
    Line(BestOfN(init=3), a_sample),
    Line(BestOfN(3, init=2)),
    Line(BestOfN(guide=Guide(0.5)), a_sample),
    Line(BestOfN(2, 2, guide=STRONG)),
    Line(SVDD(2, 3), a_child_each, noise=True),
    Line(SVDD(1, copies=2), noise=True),
    Line(SVDD(2, guide=STRONG), a_child_each, noise=True),
    Line(Blockwise(2, 2, 3), a_branch_each, noise=True, looks=("posterior mean",)),
    Line(Blockwise(1, copies=2), noise=True, looks=("posterior mean",)),
    Line(SearchOverPaths(2, up=1, down=2), a_copy_of_each_path, kernel=False, looks=("posterior mean",)),
    Line(SearchOverPaths(1, copies=3, init=2), kernel=False, looks=("posterior mean",)),
    Line(SMC(), a_particle, noise=True),
    Line(SMC(5, init=2, threshold=0.9), noise=True),
    Line(SMC(threshold=0.0, tempering=1.0), a_particle),
    Line(SMC(guide=Guide(), threshold=1.0, scheme="residual"), a_particle, noise=True),
    Line(ZeroOrder(), lambda m, setup: 1 + setup.evaluations_ahead(), kernel=False),
    Line(ZeroOrder(3, 1.0, init=3), lambda m, setup: 1 + setup.evaluations_ahead(), kernel=False),
    Line(Refine(), lambda m, setup: judging(setup), kernel=False),
    Line(Refine(3, 1.0, 1, 7), lambda m, setup: judging(setup), kernel=False),
    Line(Draft(), kernel=False, looks=("sibling",)),
    Line(Draft(3, 0.4, 1.0, batch=2), kernel=False, looks=("sibling",)),
    Line(Cascade(), lambda m, setup: m.steps, kernel=False, looks=("sibling",)),
    Line(Cascade(3, 0.7, level=0.5, steps=2, cells=1), lambda m, setup: m.steps, kernel=False, looks=("sibling",)),
    Line(Beam(3, 2), a_child_of_each_state, noise=True),
    Line(Beam(2, enough=3, select_below=0.6), a_child_of_each_state, noise=True),
    Line(Beam(5, narrow=True), a_child_of_each_state, noise=True),
    Line(Beam(3, guide=STRONG), a_child_of_each_state, noise=True),
    Line(RBF(), a_child_each, noise=True),
    Line(RBF(2, BestOfEnough(3), batch=3, chains=2), a_child_each, noise=True),
    Line(RBF(1, BestOfEnough(2), finish=False), a_child_each, noise=True),
    Line(RBF(2, BestOfQuota(), finish=False), a_child_each, noise=True),
    Line(RBF(3, FirstImprovement(), batch=2), a_child_each, noise=True),
    Line(RBF(3, FirstImprovement(), chains=2, finish=False), noise=True),
    Line(RBF.published(init=3), a_child_each, noise=True),
    Line(RBF(guide=STRONG), a_child_each, noise=True),
]
each_line = pytest.mark.parametrize("line", METHODS, ids=lambda line: repr(line.method))
BUDGET = 120


def setup_of(line: Line, **changes) -> Problem:
    """Of the first look-ahead that it takes."""
    look = {"look_ahead": sibling(lambda x, t: MIXTURE(x, t) / 2)} if line.looks[0] == "sibling" else {}
    return problem(6, **look | changes)


def run(line: Line, seed: int = 0, budget: int = BUDGET, **changes) -> Result:
    return search(setup_of(line, **changes), line.method, max_nfe=budget, generator=seeded(seed))


def test_every_method_has_a_line():
    public = [kind for room in (methods, beyond) for kind in vars(room).values() if isinstance(kind, type)]
    assert {type(line.method) for line in METHODS} == {kind for kind in public if hasattr(kind, "advance")}


# The account


class Judge:
    """A reward that remembers what it was asked and said."""

    def __init__(self, fn: Callable = lambda total: torch.sin(3 * total)):
        self.fn, self.asked, self.said = fn, [], []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        r = self.fn(x.reshape(len(x), -1).sum(1))
        self.asked += list(x.detach())
        self.said += r.detach().tolist()
        return r


def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * (1 + t.view(-1, *[1] * (x.ndim - 1)))


class Books:
    """A problem whose models, the look-ahead's included, and reward count their rows: to check a search's account."""

    def __init__(self, look: str = "posterior mean", judge: Callable = torch.sin, **changes):
        self.own, self.sibling, self.judge = Counting(field), Counting(lambda x, t: x / (1 + t[0])), Judge(judge)
        looks = {"posterior mean": posterior_mean, "ode": ode_ahead(3), "sibling": sibling(self.sibling)}
        self.problem = problem(velocity=self.own, reward=self.judge, **{"look_ahead": looks[look]} | changes)

    def untouched(self) -> bool:
        return self.own.rows == self.sibling.rows == len(self.judge.said) == 0

    def check(self, found: Result, budget: int) -> None:
        setup, p = self.problem, found.particles
        backward = found.gradients * (setup.gradient_cost - 1) * setup.look_ahead.price
        assert found.nfe == setup.cost * (self.own.rows + self.sibling.rows + backward)
        assert found.nfe + found.left == budget and found.left >= 0
        assert found.reward_calls == len(self.judge.said)
        assert p.t == found.trace[-1].t == 0 and found.best.shape == setup.shape
        assert found.reward == p.reward.max() and torch.equal(found.best, p.x[p.reward.argmax()])
        assert found.reward == pytest.approx(float(self.judge(found.best[None])), abs=1e-5)
        said = torch.tensor(self.judge.said[:-1])
        assert found.seen_reward == said.max() >= found.reward
        assert torch.equal(found.seen, self.judge.asked[int(said.argmax())]) and found.seen_time in setup.times


REASONS = "max_nfe >=|coincide|nothing to steer|over in one leg|no transition lands|posterior mean only|drafts need"


@st.composite
def varied(draw, method):
    """The method with other whole numbers in its fields."""
    whole = [f.name for f in fields(method) if type(getattr(method, f.name)) is int]
    try:
        return replace(method, **{n: draw(st.sampled_from([getattr(method, n), 1, 2, 3])) for n in whole})
    except ValueError:  # a path no further down than up
        assume(False)


@each_line
def test_any_budget_is_spent_to_less_than_a_unit_or_refused_before_any_compute(line):
    ran = []

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        method=varied(line.method),
        n=st.sampled_from(range(1, 9)),
        budget=st.sampled_from([*range(1, 41), *range(50, 161, 10)]),
        prices=st.sampled_from([(1, 3), (1, 1), (2, 1), (3, 2)]),
        shape=st.sampled_from([(2, 3), (), (1,), (1, 1, 3)]),
        grid=st.sampled_from([uniform, paper_vp, logit_normal]),
        kernel=st.sampled_from([*2 * [ddim(), sde(lambda t: t)], ddim(0.0)]),
        look=st.sampled_from([*line.looks[:1] * (1 if line.looks == LOOKS else 8), *LOOKS]),
        judge=st.sampled_from([lambda total: torch.sin(3 * total), torch.round, lambda total: 0 * total]),
    )
    def check(method, n, budget, prices, shape, grid, kernel, look, judge):
        prices = {"cost": prices[0], "gradient_cost": prices[1]}
        books = Books(look, judge, shape=shape, times=grid(n), kernel=kernel, **prices)
        setup = books.problem
        try:
            found = search(setup, method, max_nfe=budget, generator=seeded())
        except ValueError as error:
            assert books.untouched()
            reason = str(error)
        else:
            books.check(found, budget)
            ran.append(method)
            assert look in line.looks
            if line.spare and setup.evaluations_ahead():
                assert found.left < line.spare(method, setup) * setup.cost
            return
        assert any(why in reason for why in REASONS.split("|")), reason
        if "max_nfe >=" in reason:  # with as much as it asks for it runs, with less it does not
            least = int(reason.split("max_nfe >= ")[1].split(";")[0])
            assert budget < least
            books.check(search(setup, method, max_nfe=least, generator=seeded()), least)
            with pytest.raises(ValueError, match=f"max_nfe >= {least};"):
                method.check(setup, least - 1)

    check()
    assert len(ran) >= 10  # not all were refused


def test_evaluations_behind_the_runs_back_are_found():
    class Cheat(BestOfN):
        def advance(self, p, run):
            run.problem.velocity(p.x, p.x.new_full((len(p),), p.t))
            return super().advance(p, run)

    books = Books()
    found = search(books.problem, Cheat(), max_nfe=40, generator=seeded())
    with pytest.raises(AssertionError):
        books.check(found, 40)


@each_line
def test_twice_the_cost_is_twice_the_nfe_of_the_same_search(line):
    one, two = run(line), run(line, budget=2 * BUDGET + 1, cost=2)
    assert torch.equal(one.best, two.best) and drawn(one) == drawn(two)
    assert (two.nfe, two.left) == (2 * one.nfe, 2 * one.left + 1)


@pytest.mark.parametrize("line", [x for x in METHODS if "ode" in x.looks], ids=lambda line: repr(line.method))
def test_every_look_ahead_of_the_same_price_and_answer_gives_the_same_result(line):
    """One Euler step to t = 0 is the posterior mean, on the linear path."""
    a, b = run(line), run(line, look_ahead=ode_ahead(1))
    torch.testing.assert_close(a.best, b.best, rtol=1e-3, atol=1e-4)
    assert (a.nfe, a.reward_calls, drawn(a)) == (b.nfe, b.reward_calls, drawn(b))


# Whoever is asked may edit and reuse its tensors


class Rude:
    """A function that answers in one tensor, again and again, and then overwrites what it was given."""

    def __init__(self, function: Callable):
        self.function, self.memory = function, {}

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        answer = self.function(*given)
        if answer.requires_grad:
            return answer
        buffer = self.memory.setdefault(tuple(answer.shape), torch.empty_like(answer))
        buffer.copy_(answer)
        for tensor in given:
            tensor.fill_(7.0)
        return buffer


@each_line
@pytest.mark.parametrize("part", ["velocity", "reward", "kernel", "sibling", "look-ahead"])
def test_a_part_that_edits_and_reuses_its_tensors_changes_nothing(line, part):
    """0.1.0 went on with the edited tensors: on a toy -0.03 became -28.8."""
    few = lambda x, t: MIXTURE(x, t) / 2  # noqa: E731
    look = LookAhead("mine", estimate=lambda velocity, x, v, t: x - t * velocity(x, x.new_full((len(x),), t)), price=2)
    if {"look-ahead": "ode", "sibling": "sibling"}.get(part, line.looks[0]) not in line.looks:
        pytest.skip("it takes no such look-ahead")

    def moments(path, x, v, t, s):
        return ddim()(path, x, v, t, s)

    def rude(path, x, v, t, s):
        mean, std = ddim()(path, x, v, t, s)
        return Rude(lambda x, v: mean)(x, v), std

    def estimate(velocity, x, v, t):
        x0 = look.estimate(velocity, x, v, t)
        return Rude(lambda x: x0)(x)

    changes = {
        "velocity": ({}, {"velocity": Rude(MIXTURE)}),
        "reward": ({}, {"reward": Rude(wish)}),
        "kernel": ({"kernel": Kernel("mine", moments)}, {"kernel": Kernel("mine", rude)}),
        "sibling": ({"look_ahead": sibling(few)}, {"look_ahead": sibling(Rude(few))}),
        "look-ahead": ({"look_ahead": look}, {"look_ahead": replace(look, estimate=estimate)}),
    }
    a, b = (run(line, **change) for change in changes[part])
    assert torch.equal(a.best, b.best) and torch.equal(a.seen, b.seen) and repr(a.trace) == repr(b.trace)


# Randomness, chunks, types


@each_line
def test_same_seed_same_result_whatever_the_chunking(line):
    a, b, c = (
        run(line, seed, velocity=Counting(MIXTURE, chunk), gradient_chunk=chunk)
        for chunk, seed in ((None, 1), (2, 1), (None, 2))
    )
    torch.testing.assert_close(a.best, b.best)
    assert (a.nfe, a.reward_calls, drawn(a)) == (b.nfe, b.reward_calls, drawn(b))
    assert not torch.allclose(a.best, c.best)


@each_line
def test_global_randomness_is_neither_used_nor_touched(line):
    torch.manual_seed(0)
    a = run(line)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(a.best, run(line).best)


@each_line
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_of_the_problems_dtype(line, dtype):
    found = run(line, dtype=dtype, velocity=Counting(MIXTURE))  # which looks at the time's
    p = found.particles
    assert found.best.dtype == found.seen.dtype == p.x.dtype == p.reward.dtype == p.logw.dtype == dtype
    assert p.parent.dtype == torch.int64


# Steps


@each_line
def test_step_by_step_it_is_the_same_search(line):
    whole, found = run(line), steps(setup_of(line), line.method, max_nfe=BUDGET, generator=seeded())
    kept = next(found).kept
    for step in found:
        p = found.particles
        assert step is found.trace[-1] and step.kept == len(p)
        assert 0 <= step.parent < kept and p.parent.min() >= 0 and p.parent.max() < kept
        kept = len(p)
    assert repr(found.trace) == repr(list(whole.trace))  # as text, since nan is not itself
    assert torch.equal(found.result().best, whole.best)


@pytest.mark.parametrize("line", [x for x in METHODS if x.kernel], ids=lambda line: repr(line.method))
def test_parents_are_rows_of_the_step_before(line):
    """Under a transition that hardly moves, a particle is where its ancestor one step ago was."""
    still, judge = Kernel("still", lambda path, x, v, t, s: (x, 1e-6)), Judge()
    found = steps(problem(6, reward=judge, kernel=still), line.method, max_nfe=150, generator=seeded())
    log = [found.particles for _ in found]
    for before, after in pairwise(log):
        torch.testing.assert_close(after.x, before.x[after.parent], rtol=0, atol=1e-4)
    if not log[0].reward.isnan().any():  # those of the first step are rows of the first draws
        torch.testing.assert_close(log[0].x0, torch.stack(judge.asked)[log[0].parent])


@each_line
def test_a_deterministic_kernel_is_refused_where_candidates_would_coincide(line):
    for kernel in (ode, ddim(0.0)):
        if line.noise:
            with pytest.raises(ValueError, match="coincide"):
                run(line, velocity=never, reward=never, kernel=kernel)
        else:
            same = torch.equal(run(line, kernel=kernel).best, run(line).best)
            assert same != line.kernel


# Hyperparameters


@each_line
def test_methods_are_frozen(line):
    with pytest.raises(FrozenInstanceError):
        setattr(line.method, fields(line.method)[0].name, 1)


NOT_ZERO = [(SMC, "tau"), (Guide, "strength")]
FRACTIONS = [(ZeroOrder, "radius"), (Refine, "share"), (Beam, "select_below"), (Guide, "below"), (Guide, "floor")]
FRACTIONS += [(Draft, "drafts"), (Draft, "share"), (Cascade, "drafts"), (Cascade, "share"), (Cascade, "level")]
EDGES = [(*field, 0.0) for field in NOT_ZERO + FRACTIONS]
EDGES += [(*field, 1.1) for field in [*FRACTIONS, (SMC, "threshold")]]
KINDS = sorted({type(line.method) for line in METHODS} | {BestOfEnough, Guide}, key=lambda kind: kind.__name__)
WRONG = {int: (0, -1, 1.5, True), float: (-1.0, math.nan, math.inf), str: ("no such",)}
WRONG |= {bool: ("no", 2, None), Guide: (3, "strong", True), Rule: (3, "first", FirstImprovement)}


def wrong_values(kind: type) -> list[tuple[str, object]]:
    """(field, value out of range), by the field's type."""
    out = []
    for name, hint in get_type_hints(kind).items():
        types = {type(value) for value in get_args(hint)} | {hint, *get_args(hint)}  # of a Literal, and of a union
        out += [(name, value) for known, values in WRONG.items() if known in types for value in values]
    return out


@pytest.mark.parametrize(
    ("kind", "name", "value"), EDGES + [(kind, *wrong) for kind in KINDS for wrong in wrong_values(kind)]
)
def test_hyperparameters_out_of_range_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})
