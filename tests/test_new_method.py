"""The method in CONTRIBUTING.md is read from there and searches: 20 lines or so are all that one takes."""

import re
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path

import pytest
import test_contract as contract
import torch
from conftest import Counting, never, seeded
from matplotlib import pyplot as plt

from flowscale_lite import LINEAR, GaussianMixture, Problem, ZeroOrder, ddim, ode, plots, renoise, search, uniform
from flowscale_lite.methods._common import require_posterior_mean

GUIDE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FLOW = GaussianMixture([[-1.0], [1.0]], 0.4).velocity(LINEAR)


@pytest.fixture(scope="module")
def example():
    """(source, the one method that it defines)"""
    section = re.search(r"^## A new method\n(.*?)^## ", GUIDE, re.M | re.S)[1]
    (source,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    names: dict = {"__name__": "example"}
    exec(compile(source, "CONTRIBUTING.md", "exec"), names)
    (method,) = (value for value in names.values() if is_dataclass(value) and value.__module__ == "example")
    return source, method


def problem(steps=6, velocity=FLOW, reward=lambda x: -(x[:, 0] - 0.8).square(), **rest) -> Problem:
    return Problem(velocity, reward, LINEAR, ddim(1.0), uniform(steps), (1,), **rest)


def test_it_is_short(example):
    code = [line for line in example[0].splitlines() if line.strip() and "import" not in line]
    assert len(code) <= 20


@pytest.mark.parametrize(("n", "steps", "rows"), [(8, 6, 17), (5, 3, 8), (1, 4, 4), (7, 1, 7)])
@pytest.mark.parametrize("cost", [1, 2])
def test_it_spends_what_it_says(example, n, steps, rows, cost):
    velocity = Counting(FLOW)
    setup = problem(steps, velocity, cost=cost)
    result = search(setup, example[1](n), max_nfe=rows * cost, generator=seeded())
    assert velocity.rows == rows and result.nfe == rows * cost and result.left == 0 and result.trace[-1].t == 0
    refused = problem(steps, never, never, cost=cost)
    with pytest.raises(ValueError, match=f"max_nfe >= {rows * cost}"):
        search(refused, example[1](n), max_nfe=rows * cost - 1, generator=seeded())


def test_it_passes_the_tests_of_every_method(example):
    """The guide says that a line in METHODS is all that these tests want."""
    line = contract.Line(example[1](8), looks=("posterior mean",))
    contract.test_any_budget_is_spent_to_less_than_a_unit_or_refused_before_any_compute(line)
    contract.test_twice_the_cost_is_twice_the_nfe_of_the_same_search(line)
    contract.test_same_seed_same_result_whatever_the_chunking(line)
    contract.test_step_by_step_it_is_the_same_search(line)
    contract.test_parents_are_rows_of_the_step_before(line)
    contract.test_a_deterministic_kernel_is_refused_where_candidates_would_coincide(line)
    contract.test_methods_are_frozen(line)


@dataclass(frozen=True)
class Yoyo:
    """Goes up a level and down two, again and again: a method that moves in its own way."""

    n: int = 3

    def check(self, problem, max_nfe):
        require_posterior_mean(problem)
        need = problem.cost * self.n * (2 * problem.evaluations_ahead() + 1)
        if need > max_nfe:
            raise ValueError(f"need max_nfe >= {need}; got {max_nfe}")

    def start(self, run):
        return replace(run.start(self.n), carry={"up": torch.zeros(self.n)})

    def advance(self, p, run):
        if p.carry["up"].any() or p.t == run.problem.times[0] or run.next_time(p.t) == 0:
            p = run.propose(p, kernel=ode)
            return replace(p, carry={"up": torch.zeros(len(p))})
        down = run.next_time(run.next_time(p.t))
        p = run.propose(run.propose(p, s=run.next_time(p.t), kernel=ode), s=p.t, kernel=renoise)
        q = run.propose(p, s=down, kernel=ode) if down > 0 else run.propose(p, kernel=ode)
        return replace(q, carry={"up": torch.ones(len(q))})


def test_the_tests_of_every_method_fit_one_that_moves_up():
    line = contract.Line(Yoyo(), kernel=False, looks=("posterior mean",))
    contract.test_any_budget_is_spent_to_less_than_a_unit_or_refused_before_any_compute(line)
    contract.test_twice_the_cost_is_twice_the_nfe_of_the_same_search(line)
    contract.test_same_seed_same_result_whatever_the_chunking(line)
    contract.test_step_by_step_it_is_the_same_search(line)
    contract.test_a_deterministic_kernel_is_refused_where_candidates_would_coincide(line)


def test_a_method_that_starts_anew_every_round_has_a_trace():
    """Its particles are not judged between rounds, but what was found is told and drawn."""
    result = search(problem(), ZeroOrder(3), max_nfe=60, generator=seeded())
    figure, ax = plt.subplots()
    plots.reward_trace(ax, result)
    drawn = ax.lines[0].get_ydata()
    plt.close(figure)
    assert len(drawn) == len(result.trace) - 1 > 2 and (drawn[1:] >= drawn[:-1]).all()
    assert drawn[-1] == pytest.approx(result.reward)


def test_it_selects(example):
    """40 searches each of 16 samples and of 1: better by more than four standard errors."""
    many, one = (
        torch.tensor([search(problem(), example[1](n), max_nfe=60, generator=seeded(i)).reward for i in range(40)])
        for n in (16, 1)
    )
    assert many.mean() - one.mean() > 4 * (many.var() / 40 + one.var() / 40).sqrt()
