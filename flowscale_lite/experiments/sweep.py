"""Resumable sweeps: one JSON line a run, written when the run is done, and never a run twice.

A task is a flat dict of JSON scalars that says all about one run (prompt, seed, method, budget, ...). Its row is the
task and what the run found. Killed at any point, a sweep goes on where it stopped, on one machine or on a Ray cluster.

Each local worker is a pool of one process. A pool of several, be it `concurrent.futures`' or joblib's, fails all runs
that wait or are under way when one of its processes dies.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from torch import Tensor
from tqdm.auto import tqdm

Task = dict[str, Any]
Row = dict[str, Any]
Runner = Callable[[Task], Row]


def read(path: str | Path) -> list[Row]:
    """The rows of a results file. A last line that a kill cut short is left out; without a file there are no rows.

    Raises ValueError: another line is no JSON object.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            if line.startswith(b"{") and not line.endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; mend or delete it") from None
    return rows


def replay(path: str | Path, line: int, run: Runner) -> tuple[Row, list[str]]:
    """Run the task of the row in that line of a results file, from 1, once more, by the function that made it.

    Returns what it found, and the names in which the row says otherwise; seconds aside.
    Raises ValueError: there is no such line, or the row is another function's.
    """
    rows = read(path)
    if not 1 <= line <= len(rows):
        raise ValueError(f"{path} has {len(rows)} rows, and none in line {line}")
    row = rows[line - 1]
    try:
        found = json.loads(json.dumps(run(row)))
    except KeyError as error:
        raise ValueError(f"{path}, line {line} is not a row of {run.__module__}: it has no {error}") from error
    return found, [name for name, value in found.items() if name != "seconds" and row.get(name) != value]


def sweep(
    tasks: Iterable[Task],
    run: Runner,
    path: str | Path,
    *,
    workers: int = 1,
    title: str = "",
    retries: int = 1,
    engine: Literal["local", "ray"] = "local",
    resources: Mapping[str, float] | None = None,
) -> list[Row]:
    """Run every task that has no row yet, append each row durably as it comes, and return the rows in task order.

    A run that raises, or whose process dies, is tried again when the others are done. A bar shows the time left.

    Args:
        run: task -> what was found; must not use the task's names. It should load its model once and keep it
            (`functools.cache`): a worker lives as long as the sweep. With local workers it is pickled by name.
        path: JSON-lines file; made with its folder when missing.
        workers: processes; 1 runs here. With Ray as many actors.
        retries: further tries of a run that failed.
        engine: "ray" spreads the runs over a Ray cluster: the one connected to, else RAY_ADDRESS, else one started on
            this machine, which ends with this process. Needs the extra `scale`.
        resources: what every Ray worker asks for, such as {"num_gpus": 1}; {"num_cpus": 1} by default.

    Raises:
        ValueError: tasks with different fields, or two that are the same; a file that holds other rows or is being
            written by another sweep; settings out of range; more workers than the Ray cluster has room for.
        ImportError: engine="ray" without Ray.
        ExceptionGroup: at the end, if runs failed in every try: the last error of each, with a note of its task.
    """
    tasks, path = list(tasks), Path(path)
    fields = _check(tasks, run, workers, retries, engine, resources)
    with _appending(path) as file:
        rows = _known(path, fields)
        _mend(path, file, len(rows))
        todo = [task for task in tasks if _key(task, fields) not in rows]
        failures: list[tuple[Task, Exception]] = []
        with (
            tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc=title, unit="run", disable=None) as bar,
            _started(engine, run, workers, len(todo), resources) as slots,
        ):
            for _ in range(1 + retries):
                failures = []
                for task, result in _ended(todo, run, slots):
                    try:
                        row = _joined(task, result())
                    except Exception as error:
                        error.add_note(f"This was the run of {task}.")
                        failures.append((task, error))
                    else:
                        print(json.dumps(row), file=file, flush=True)
                        os.fsync(file.fileno())
                        rows[_key(task, fields)] = row
                        bar.update()
                todo = [task for task, _ in failures]
    if failures:
        count = f"{len(failures)} of {len(tasks)} runs failed in each of {1 + retries} tries"
        raise ExceptionGroup(
            f"{count}; the same call tries them again. The first: {failures[0]}", [e for _, e in failures]
        )
    return [rows[_key(task, fields)] for task in tasks]


def _check(
    tasks: Sequence[Task], run: Runner, workers: int, retries: int, engine: str, resources: Mapping[str, float] | None
) -> list[str]:
    """The fields of all tasks, after a look at everything that can be wrong before the first run."""
    fields = sorted(tasks[0]) if tasks else []
    if any(sorted(task) != fields for task in tasks):
        raise ValueError(f"all tasks of a sweep must have the same fields; the first has {fields}")
    if len({_key(task, fields) for task in tasks}) < len(tasks):
        raise ValueError("the same task stands twice in the sweep")
    for name, value, least in (("workers", workers, 1), ("retries", retries, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if engine not in ("local", "ray"):
        raise ValueError(f'engine must be "local" or "ray"; got {engine!r}')
    if engine == "local" and resources is not None:
        raise ValueError('resources are what Ray workers ask for: use engine="ray"')
    function: Callable[..., Any] = getattr(run, "func", run)  # what a functools.partial calls
    notebook = function.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__")
    if engine == "local" and workers > 1 and notebook:
        raise ValueError("worker processes cannot import a run defined in a notebook: put it in a file and import it")
    return fields


def _key(task: Task, fields: Sequence[str]) -> str:
    return json.dumps([task[f] for f in fields])


def _joined(task: Task, found: Row) -> Row:
    """A task's row, as it will be read again. What JSON cannot hold is this run's failure, not the sweep's."""
    shared = sorted(task.keys() & found.keys())
    if shared:
        raise ValueError(f"a run must not use its task's names; it found {shared}")
    return json.loads(json.dumps(task | found))


# ---------------------------------------------------------------------------------------------------------- the file
@contextmanager
def _appending(path: Path) -> Iterator[TextIO]:
    """The file, made when missing, open for appending and locked against a second sweep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another sweep is writing {path}; wait for it, or write to a file of its own") from None
        except (ImportError, OSError):  # Windows, and some network drives, have no such locks
            pass
        yield file


def _known(path: Path, fields: Sequence[str]) -> dict[str, Row]:
    """The rows of the file by key."""
    rows = read(path)
    for row in rows:
        if not set(fields) <= set(row):
            raise ValueError(f"{path} holds rows of another sweep: {sorted(row)} lacks some of {fields}")
    known = {_key(row, fields): row for row in rows}
    if len(known) < len(rows):
        raise ValueError(f"{path} holds two rows with the same {fields}: rows of another sweep, of more fields")
    return known


def _mend(path: Path, file: TextIO, rows: int) -> None:
    """Take off a last line that was cut short, and end one that lacks nothing but its end."""
    lines = path.read_bytes().splitlines(keepends=True)[:rows]
    file.truncate(sum(len(line) for line in lines))
    if lines and not lines[-1].endswith(b"\n"):
        file.write("\n")


# ------------------------------------------------------------------------------------------------------------ workers
@contextmanager
def _started(
    engine: str, run: Runner, workers: int, tasks: int, resources: Mapping[str, float] | None
) -> Iterator[Sequence[_Process | _Actor]]:
    """As many workers as the tasks need. None at all: tasks are run here, one after another."""
    number = min(workers, tasks)
    if engine == "ray" and number:
        with _actors(run, number, resources) as actors:
            yield actors
        return
    processes = [_Process(run) for _ in range(number)] if workers > 1 else []
    try:
        yield processes
    finally:
        for process in processes:
            process.pool.shutdown(wait=False, cancel_futures=True)


def _ended(
    tasks: Sequence[Task], run: Runner, slots: Sequence[_Process | _Actor]
) -> Iterator[tuple[Task, Callable[[], Row]]]:
    """Each task, when its run has ended, with a call that returns what the run found or raises what it raised."""
    if not slots:
        yield from ((task, partial(run, task)) for task in tasks)
        return
    queue, idle = deque(tasks), list(slots)
    busy: dict[Future[Row], tuple[_Process | _Actor, Task]] = {}
    while queue or busy:
        while queue and idle:
            slot, task = idle.pop(), queue.popleft()
            busy[slot.submit(task)] = slot, task
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            slot, task = busy.pop(future)
            idle.append(slot)
            yield task, future.result


class _Process:
    """A pool of one process: if it dies, it is plain which task it died of, and no other task suffers."""

    def __init__(self, run: Runner):
        self.run, self.pool = run, self._pool()

    @staticmethod
    def _pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent)

    def submit(self, task: Task) -> Future[Row]:
        try:
            return self.pool.submit(self.run, task)
        except BrokenProcessPool:
            self.pool = self._pool()
            return self.pool.submit(self.run, task)


def _end_with_parent() -> None:
    """End this process when the sweep that started it is killed; it would wait for ever for its next task."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------------------------- Ray
def _ray(workers: int = 1) -> Any:
    """Ray, connected to a cluster: the one it is connected to, else RAY_ADDRESS, else one started on this machine."""
    try:
        import ray
    except ImportError:
        raise ImportError("this needs Ray, which the extra `scale` installs: flowscale-lite[scale]") from None
    if not ray.is_initialized():
        local = {"address": "local", "num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **({} if os.environ.get("RAY_ADDRESS") else local))
    return ray


@contextmanager
def _actors(run: Runner, number: int, resources: Mapping[str, float] | None) -> Iterator[list[_Actor]]:
    """Workers on a Ray cluster, in room reserved for all of them at once; without it some would wait for ever."""
    ray = _ray(number)
    asked = {"num_cpus": 1, **(resources or {})}
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    each = {names.get(name, name): amount for name, amount in asked.items()}
    room = ray.util.placement_group([each] * number)
    try:
        if not room.wait(10):  # seconds; what others have just given back Ray counts after a moment
            have = ray.cluster_resources()
            raise ValueError(f"no room for {number} workers of {each} in a cluster of {have}; use fewer workers")
        where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(room)
        remote = ray.remote(_Holder).options(scheduling_strategy=where, **asked)
        yield [_Actor(lambda: remote.remote(lambda: run)) for _ in range(number)]
    finally:
        ray.util.remove_placement_group(room)  # which ends the workers


class _Actor:
    """A Ray actor that runs tasks; one that died is replaced before the next task."""

    def __init__(self, make: Callable[[], Any]):
        self.make, self.actor = make, make()
        self.last: Future[Row] | None = None

    def submit(self, task: Task) -> Future[Row]:
        if self.last is not None and isinstance(self.last.exception(), _ray().exceptions.RayActorError):
            self.actor = self.make()
        self.last = self.actor.call.remote(task).future()
        return self.last


class _Holder:
    """What lives in a Ray actor: a function, made there and kept, with its model, as long as the actor lives."""

    def __init__(self, make: Callable[[], Callable[..., Any]]):
        self.function = make()

    def call(self, *args: Any) -> Any:
        return self.function(*args)


def serve(
    make: Callable[[], Callable[..., Tensor]], *, resources: Mapping[str, float] | None = None
) -> Callable[..., Tensor]:
    """Start a judge in a Ray actor of its own, on a device of its own, shared by all workers of a cluster.

    `make()` builds it there, so that it is loaded on the device Ray gives it. With resources={"num_gpus": 1} for the
    judge, and the same in `sweep` for the generators, each has its own GPU. A judge that dies is built and asked again.

    Returns:
        judge(x, *args), which sends tensors by the CPU and answers on the device of x. It reaches the workers as an
        argument of their run: sweep(tasks, functools.partial(run, judge=judge), ...).

    Raises ImportError: Ray is not installed.
    """
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 2, **(resources or {})}
    return partial(_ask, _ray().remote(_Holder).options(**options).remote(make))


def _ask(actor: Any, x: Tensor, *args: Any) -> Tensor:
    return _ray().get(actor.call.remote(x.cpu(), *args)).to(x.device)
