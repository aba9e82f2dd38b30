"""Sweeps lose and repeat nothing; intervals cover."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowscale_lite import experiments

TASKS = [{"prompt": p, "seed": s} for p in ("a", "b", "c") for s in range(4)]


def square(task):
    return {"value": task["seed"] ** 2}


def test_rows_come_in_task_order_and_are_not_run_twice(tmp_path):
    path, calls = tmp_path / "deep" / "rows.jsonl", []
    rows = experiments.sweep(TASKS[:5], lambda t: calls.append(t) or square(t), path)
    assert rows == [t | square(t) for t in TASKS[:5]] and len(calls) == 5
    again = experiments.sweep(TASKS[::-1], lambda t: calls.append(t) or square(t), path)
    assert again == [t | square(t) for t in TASKS[::-1]] and len(calls) == len(TASKS)
    assert sorted(map(str, experiments.read(path))) == sorted(map(str, rows + again[:7]))


def test_a_line_cut_short_is_done_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    experiments.sweep(TASKS[:3], square, path)
    path.write_text(path.read_text()[:-9])
    assert len(experiments.read(path)) == 2
    assert experiments.sweep(TASKS[:3], square, path) == [t | square(t) for t in TASKS[:3]]
    assert len(experiments.read(path)) == 3


def test_workers_give_the_same_rows(tmp_path):
    assert experiments.sweep(TASKS, square, tmp_path / "rows.jsonl", workers=2) == [t | square(t) for t in TASKS]


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from flowscale_lite import experiments
def run(task):
    time.sleep(0.05)
    return {"value": task["seed"] ** 2}
experiments.sweep([{"seed": s} for s in range(40)], run, Path(sys.argv[1]))
"""


def test_killed_in_the_middle_it_goes_on_without_loss(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", SLOW, str(path), str(Path(__file__).parents[1])]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not path.exists() or path.read_text().count("\n") < 5:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = experiments.read(path)
    assert 5 <= len(before) < 40
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"seed": s, "value": s**2} for s in range(40)] and rows[: len(before)] == before


def test_tasks_that_cannot_be_told_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        experiments.sweep([TASKS[0], TASKS[0]], square, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="same fields"):
        experiments.sweep([TASKS[0], {"prompt": "a"}], square, tmp_path / "rows.jsonl")


def test_clustered_interval_covers_and_is_wider_than_a_naive_one():
    """40 prompts with effects of their own, 3 seeds each: 95 % intervals hold the true mean about 95 times of 100."""
    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(40), 3)
    covered, widths = [], []
    for trial in range(200):
        values = rng.normal(0, 1, 40)[clusters] + rng.normal(0, 0.3, 120)
        interval = experiments.clustered_mean(values, clusters, seed=trial, resamples=500)
        covered.append(interval.low <= 0 <= interval.high)
        widths.append(interval.high - interval.low)
    naive = 2 * 1.96 * np.sqrt((1 + 0.09) / 120)
    assert 0.88 <= np.mean(covered) <= 0.99  # binomial, 200 tries of 0.94: standard error 0.017
    assert np.mean(widths) > 1.4 * naive
