"""Resumable sweeps: one JSON line a run, written when the run is done, and never a run twice.

A task is a flat dict of JSON scalars that says all about one run (prompt, seed, method, budget, ...); its row is the
task and what the run found. Killed at any point, a sweep goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

Task = dict[str, Any]
Row = dict[str, Any]


def key(task: Task, fields: Sequence[str]) -> str:
    """What makes a run the same run."""
    return json.dumps([task[f] for f in fields])


def read(path: str | Path) -> list[Row]:
    """The rows of a results file; a last line cut short by a kill is left out. No file, no rows."""
    path = Path(path)
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def sweep(
    tasks: Iterable[Task], run: Callable[[Task], Row], path: str | Path, *, workers: int = 1, title: str = ""
) -> list[Row]:
    """Run every task that has no row yet, append each row durably as it comes, and return the rows in task order.

    Args:
        run: task -> what was found; must not use the task's names. With workers > 1 it is pickled by name.
        path: JSON-lines file; made with its folder when missing.
        workers: processes; each starts with its own copy of nothing, so `run` should load and cache its model.

    Raises:
        ValueError: tasks with different fields, or two that are the same.
    """
    tasks, path = list(tasks), Path(path)
    fields = sorted(tasks[0]) if tasks else []
    if any(sorted(task) != fields for task in tasks):
        raise ValueError(f"all tasks of a sweep must have the same fields; the first has {fields}")
    if len({key(task, fields) for task in tasks}) < len(tasks):
        raise ValueError("the same task stands twice in the sweep")
    rows = {key(row, fields): row for row in read(path)}
    todo = [task for task in tasks if key(task, fields) not in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    with (
        path.open("a") as file,
        tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc=title, disable=None) as bar,
    ):
        for task, found in _outcomes(todo, run, workers):
            row = task | found
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            rows[key(task, fields)] = row
            bar.update()
    return [rows[key(task, fields)] for task in tasks]


def _drop_torn_line(path: Path) -> None:
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


class _Named:
    """A function whose outcome travels with its task, so that a pool may finish in any order."""

    def __init__(self, run: Callable[[Task], Row]):
        self.run = run

    def __call__(self, task: Task) -> tuple[Task, Row]:
        return task, self.run(task)


def _outcomes(tasks: Sequence[Task], run: Callable[[Task], Row], workers: int) -> Iterable[tuple[Task, Row]]:
    if workers <= 1:
        yield from map(_Named(run), tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_Named(run), tasks)


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Any], *, seed: int = 0, resamples: int = 4000
) -> Interval:
    """Mean and 95 % percentile-bootstrap interval, drawing whole clusters: runs of one prompt are not independent.

    Raises:
        ValueError: lengths differ, or no values.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"as many clusters as values, at least one, are needed; got {len(clusters)} and {len(values)}")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    total, number = np.bincount(index, np.asarray(values, dtype=float)), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(total), size=(resamples, len(total)))
    means = total[draws].sum(1) / number[draws].sum(1)
    return Interval(float(np.mean(values)), *map(float, np.quantile(means, [0.025, 0.975])))
