"""The method in CONTRIBUTING.md is read from there and searches: 20 lines or so are all that one takes."""

import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from conftest import Counting, never, seeded

from flowscale_lite import LINEAR, GaussianMixture, Problem, ddim, search, uniform

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


def test_it_selects(example):
    """40 searches each of 16 samples and of 1: better by more than four standard errors."""
    many, one = (
        torch.tensor([search(problem(), example[1](n), max_nfe=60, generator=seeded(i)).reward for i in range(40)])
        for n in (16, 1)
    )
    assert many.mean() - one.mean() > 4 * (many.var() / 40 + one.var() / 40).sqrt()
