"""Resumable sweeps: one JSON line a run, written when the run is done, and never a run twice.

A task is a flat dict of JSON scalars that says all about one run (prompt, seed, method, budget, ...); its row is the
task and what the run found. Killed at any point, a sweep goes on where it stopped, on one machine or on a Ray cluster:
the file is the same.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from torch import Tensor
from tqdm.auto import tqdm

Task = dict[str, Any]
Row = dict[str, Any]
Runner = Callable[[Task], Row]


def key(task: Task, fields: Sequence[str]) -> str:
    """What makes a run the same run."""
    return json.dumps([task[f] for f in fields])


# ------------------------------------------------------------------------------------------------------------ sweeps
def read(path: str | Path) -> list[Row]:
    """The rows of a results file; a last line cut short by a kill is left out. No file, no rows.

    Raises:
        ValueError: a line that is complete is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    whole, _, last = path.read_text().rpartition("\n")
    rows = []
    for number, line in enumerate([*whole.splitlines(), *([last] if _object(last) else [])], 1):
        row = _object(line)
        if row is None:
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; mend or delete it")
        rows.append(row)
    return rows


def _object(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class SweepFailed(RuntimeError):
    """Some runs failed in every try; all others are in the file.

    Attributes:
        failures: (task, what its last try raised, as text) of each.
    """

    def __init__(self, failures: Sequence[tuple[Task, str]], total: int, tries: int, path: Path):
        self.failures = list(failures)
        shown = "\n".join(f"{task}\n{error.rstrip()}" for task, error in self.failures[:3])
        super().__init__(
            f"{len(self.failures)} of {total} runs failed in each of {tries} tries; the others are in {path}, and the "
            f"same call tries the failed ones again. The first:\n{shown}"
        )


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

    A run that raises, or whose process dies, is tried again; one that fails for good is reported when all others are
    done. A bar shows the time left.

    Args:
        run: task -> what was found; must not use the task's names. It should load its model once and keep it
            (`functools.cache`): a worker lives as long as the sweep. With local workers it is pickled by name.
        path: JSON-lines file; made with its folder when missing.
        workers: processes; 1 runs here. With Ray as many actors.
        retries: further tries of a run that failed.
        engine: "ray" spreads the runs over a Ray cluster: the one connected to, else RAY_ADDRESS, else one started on
            this machine for the sweep. Needs the extra `scale`.
        resources: what every Ray worker asks for, such as {"num_gpus": 1}; {"num_cpus": 1} by default.

    Raises:
        ValueError: tasks with different fields, or two that are the same; a file that holds other rows or is being
            written by another sweep; settings out of range.
        ImportError: engine="ray" without Ray.
        SweepFailed: at the end, if a run failed in every try.
    """
    tasks, path = list(tasks), Path(path)
    fields = _check(tasks, run, workers, retries, engine, resources)
    path.parent.mkdir(parents=True, exist_ok=True)
    failures: list[tuple[Task, str]] = []
    with _appending(path) as file:
        _known(path, fields)  # refuses a file of other rows before anything in it is touched
        _mend(path)
        rows = _known(path, fields)
        todo = [task for task in tasks if key(task, fields) not in rows]
        done = len(tasks) - len(todo)
        with (
            tqdm(total=len(tasks), initial=done, desc=title or None, unit="run", disable=None) as bar,
            _engine(engine, run, workers, min(workers, len(todo)), resources) as slots,
        ):
            for task, row, error in _outcomes(todo, slots, 1 + retries):
                if row is None:
                    failures.append((task, error))
                else:
                    _append(file, row)
                    rows[key(task, fields)] = row
                bar.update()
    if failures:
        raise SweepFailed(failures, len(tasks), 1 + retries, path)
    return [rows[key(task, fields)] for task in tasks]


def _check(
    tasks: Sequence[Task], run: Runner, workers: int, retries: int, engine: str, resources: Mapping[str, float] | None
) -> list[str]:
    fields = sorted(tasks[0]) if tasks else []
    if any(sorted(task) != fields for task in tasks):
        raise ValueError(f"all tasks of a sweep must have the same fields; the first has {fields}")
    if len({key(task, fields) for task in tasks}) < len(tasks):
        raise ValueError("the same task stands twice in the sweep")
    if workers < 1 or retries < 0:
        raise ValueError(f"workers must be at least 1 and retries at least 0; got {workers} and {retries}")
    if engine not in ("local", "ray"):
        raise ValueError(f'engine must be "local" or "ray"; got {engine!r}')
    if resources is not None and engine != "ray":
        raise ValueError('resources are what Ray workers ask for: use engine="ray"')
    main = sys.modules["__main__"]
    if workers > 1 and engine == "local" and _home(run) == "__main__" and not _has_file(main):
        raise ValueError("worker processes cannot import a run defined in a notebook: put it in a file and import it")
    return fields


def _home(run: Runner) -> str:
    function = getattr(run, "func", run)  # a functools.partial lives where its function does
    return str(getattr(function, "__module__", ""))


def _has_file(module: object) -> bool:
    return getattr(module, "__file__", None) is not None


def _known(path: Path, fields: Sequence[str]) -> dict[str, Row]:
    rows = read(path)
    lacking = next((row for row in rows if not set(fields) <= set(row)), None)
    if lacking is not None:
        raise ValueError(f"{path} holds rows of another sweep: {sorted(lacking)} lacks some of {fields}")
    known = {key(row, fields): row for row in rows}
    if len(known) < len(rows):
        raise ValueError(f"{path} holds two rows with the same {fields}: rows of another sweep, of more fields")
    return known


def _mend(path: Path) -> None:
    """Rid a file of rows of a last line that was cut short; one that lacks nothing but its end gets that.

    Raises:
        ValueError: the last line is no beginning of a row.
    """
    whole, _, last = path.read_bytes().rpartition(b"\n")
    if _object(last.decode(errors="replace")) is not None:
        with path.open("a") as file:
            file.write("\n")
    elif last[:1] in (b"", b"{"):
        os.truncate(path, len(whole) + bool(whole))  # one call, so that a kill here loses nothing either
    else:
        raise ValueError(f"{path} ends in what is no row: {last[-60:]!r}; mend it, or write to another file")


@contextmanager
def _appending(path: Path) -> Iterator[IO[str]]:
    """The file, locked against a second sweep, open for appending."""
    new = not path.exists()
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another sweep is writing {path}; wait for it, or write to a file of its own") from None
        except (ImportError, OSError):  # Windows, and some network drives, have no such locks
            pass
        if new and hasattr(os, "O_DIRECTORY"):
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)  # the file's name is as durable as its lines
            os.close(folder)
        yield file


def _append(file: IO[str], row: Row) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------- engines
class _Slot(Protocol):
    """A place where one task runs at a time."""

    def submit(self, task: Task) -> Future[Row]:
        """Start a task. The future fails if the task raises or the place breaks; a broken place is then made anew."""
        ...

    def close(self) -> None: ...


def _outcomes(tasks: Sequence[Task], slots: Sequence[_Slot], tries: int) -> Iterator[tuple[Task, Row | None, str]]:
    """Each task with its row, or with None and its last error, as they come. What failed goes to the queue's end."""
    queue, idle = deque((task, 1) for task in tasks), list(slots)
    busy: dict[Future[Row], tuple[_Slot, Task, int]] = {}
    while queue or busy:
        while queue and idle:
            slot, (task, attempt) = idle.pop(), queue.popleft()
            busy[slot.submit(task)] = slot, task, attempt
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            slot, task, attempt = busy.pop(future)
            idle.append(slot)
            row, error = _row(task, future)
            if row is None and attempt < tries:
                queue.append((task, attempt + 1))
            else:
                yield task, row, error


def _row(task: Task, future: Future[Row]) -> tuple[Row | None, str]:
    try:
        found = future.result()
        if set(task) & set(found):
            raise ValueError(f"a run must not use its task's names; it found {sorted(set(task) & set(found))}")
        # As it will be read again; and a value that JSON cannot hold is this run's failure, not the sweep's.
        return json.loads(json.dumps(task | found)), ""
    except Exception as error:
        return None, "".join(traceback.format_exception(error))


@contextmanager
def _engine(
    name: str, run: Runner, workers: int, number: int, resources: Mapping[str, float] | None
) -> Iterator[Sequence[_Slot]]:
    with _cluster(number, resources) if name == "ray" and number else nullcontext():
        slots: list[_Slot] = []
        try:
            for _ in range(number):
                if name == "ray":
                    slots.append(_Actor(run, resources))
                else:
                    slots.append(_Here(run) if workers == 1 else _Process(run))
            yield slots
        finally:
            for slot in slots:
                slot.close()


class _Here:
    def __init__(self, run: Runner):
        self.run = run

    def submit(self, task: Task) -> Future[Row]:
        future: Future[Row] = Future()
        try:
            future.set_result(self.run(task))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


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

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Workers whose sweep was killed would wait for ever for their next task."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


# --------------------------------------------------------------------------------------------------------------- Ray
def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("this needs Ray, which the extra `scale` installs: flowscale-lite[scale]") from None
    return ray


def _connect(cpus: int = 1) -> bool:
    """Connect to a cluster, or start one on this machine; whether there was none before."""
    ray = _ray()
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init("local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
    return True


@contextmanager
def _cluster(number: int, resources: Mapping[str, float] | None) -> Iterator[None]:
    """A cluster with room for `number` workers; one started for them is shut down after them."""
    ours = _connect(number)
    try:
        _wait_for_room(number, _asked(resources))
        yield
    finally:
        if ours:
            _ray().shutdown()


def _wait_for_room(number: int, asked: Mapping[str, float], patience: float = 10.0) -> None:
    """Ray itself would wait for ever; what others have just given back it counts after a moment."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    wanted = {names.get(name, name): number * amount for name, amount in asked.items()}

    def lacking(have: Mapping[str, float]) -> bool:
        return any(have.get(name, 0) < amount for name, amount in wanted.items())

    deadline = time.monotonic() + patience
    while lacking(free := _ray().available_resources()):
        if lacking(_ray().cluster_resources()) or time.monotonic() > deadline:
            free = {name: free.get(name, 0) for name in wanted}
            raise ValueError(f"{number} workers ask for {wanted} of the cluster, which has {free} to give")
        time.sleep(0.2)


def _asked(resources: Mapping[str, float] | None) -> dict[str, float]:
    return {"num_cpus": 1, **(resources or {})}


class _Worker:
    """What runs in a Ray actor. It lives as long as the sweep, and with it whatever `run` keeps: its model, say."""

    def __init__(self, run: Callable[..., Any]):
        self.run = run

    def call(self, *args: Any) -> Any:
        return self.run(*args)


class _Actor:
    def __init__(self, run: Runner, resources: Mapping[str, float] | None):
        self.make = functools.partial(_ray().remote(_Worker).options(**_asked(resources)).remote, run)
        self.actor = self.make()
        self.last: Future[Row] | None = None

    def submit(self, task: Task) -> Future[Row]:
        if self.last is not None and isinstance(self.last.exception(), _ray().exceptions.RayActorError):
            self.actor = self.make()
        self.last = self.actor.call.remote(task).future()
        return self.last

    def close(self) -> None:
        _ray().kill(self.actor)


@dataclass(frozen=True)
class Served:
    """A judge in a Ray actor of its own, on a device of its own, shared by all workers of a cluster; see `serve`.

    It reaches the workers as an argument of their run: sweep(tasks, functools.partial(run, judge=served), ...).
    """

    actor: Any

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        """judge(x, *args), tensors on the CPU on the way; the answer is on the device of x."""
        return _ray().get(self.actor.call.remote(x.cpu(), *args)).to(x.device)


def serve(make: Callable[[], Callable[..., Tensor]], *, resources: Mapping[str, float] | None = None) -> Served:
    """Start a judge on the Ray cluster: `make()` builds it there, so that it is loaded on the device Ray gives it.

    With resources={"num_gpus": 1} for the judge, and the same in `sweep` for the generators, each has its own GPU. A
    judge that dies is built again, and asked again.

    Raises:
        ImportError: Ray is not installed.
    """
    _connect()
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 2, **(resources or {})}
    return Served(_ray().remote(_Server).options(**options).remote(make))


class _Server(_Worker):
    def __init__(self, make: Callable[[], Callable[..., Any]]):
        super().__init__(make())
