"""The bench: search methods on three tracks of tiny-flux, at equal NFE, by an exact counter and a held-out judge.

`flowscale bench few-step my_method.py:MyMethod` runs a method of yours on a track and puts it beside the stored runs.
BENCH.md tells the protocol.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from .. import kernels, look_ahead, schedules
from ..beyond import Cascade, Draft, Refine
from ..look_ahead import LookAhead, posterior_mean
from ..methods import RBF, SVDD, Beam, BestOfN, Guide, ZeroOrder
from ..problem import Problem
from ..search import Method, search
from ..tiny import counter, shapes
from ..tiny.data import locate
from .paper import SAMPLERS, Sampler
from .stats import paired_difference, table
from .sweep import Row, Task, read, sweep

PROMPTS, SEEDS, BUDGETS = 50, (0, 1, 2), (50, 100, 250, 500)
GUIDANCE = 2.0
VALUES = ("exact", "held_out", "nfe", "reward_calls", "seconds")


class Entry(NamedTuple):
    """A method for a budget, its sampler (None: the track's), and its look-ahead: schnell for dev if `sibling`."""

    method: Callable[[int], Method]
    sampler: Sampler | None = None
    sibling: bool = False
    look_ahead: LookAhead = posterior_mean


class Track(NamedTuple):
    """A model, what is rewarded, the sampler of a method that names none, and the list of prompts."""

    model: str
    reward: Callable[[shapes.Scene], Any]
    sampler: Sampler
    entries: dict[str, Entry]
    prompts: str = "test"


_ODE, _LEVELS = SAMPLERS["ODE"], Sampler(kernels.ode, schedules.levels(10))
_FIVE_LEVELS = Sampler(kernels.ode, schedules.levels(5))
_MULTI = Sampler(kernels.ddim(), schedules.logit_normal(10))
_GUIDE = Guide(0.1, normalised=True, below=0.9)


def _refine_by_ode(nfe: int) -> Refine:
    """Refine for tries of five evaluations: two fifths of the budget on first noises. A first guess, not tuned."""
    return Refine(init=round(0.4 * nfe / 5), batch=2)


_FEW_STEP = {
    "best-of-n": Entry(lambda nfe: BestOfN(), _ODE),
    "svdd": Entry(lambda nfe: SVDD(init=max(1, nfe // 20))),
    "rbf, published": Entry(lambda nfe: RBF.published(init=max(1, nfe // 20))),
    "rbf": Entry(RBF.few_step),
    "refine": Entry(Refine.few_step, _LEVELS),
}
_ALSO = {  # on the main track only: a fairer best-of-n, hill climbing, and what Refine's choice of regions gains
    "best-of-n, 4 steps": Entry(lambda nfe: BestOfN(), Sampler(kernels.ode, schedules.uniform(4))),
    "zero-order": Entry(lambda nfe: ZeroOrder(init=nfe // 4), _ODE),
    "refine, all regions": Entry(lambda nfe: Refine(init=nfe // 4, share=1.0), _LEVELS),
    "refine, one region": Entry(lambda nfe: Refine(init=nfe // 4, share=1 / 16), _LEVELS),
    "refine, 3 x 3 regions": Entry(lambda nfe: Refine(init=nfe // 4, cells=3), _LEVELS),
}
TRACKS = {
    "few-step": Track("schnell", counter.CountReward, SAMPLERS["VP-SDE"], _FEW_STEP | _ALSO),
    "compose": Track("schnell", counter.CountReward, SAMPLERS["VP-SDE"], _FEW_STEP, "compose"),
    "multi-step": Track(
        "dev",
        counter.CountReward,
        _MULTI,
        {
            "best-of-n": Entry(lambda nfe: BestOfN(), _ODE),
            "beam": Entry(Beam.multi_step),
            "refine": Entry(_refine_by_ode, _FIVE_LEVELS, look_ahead=look_ahead.ode(5)),
            "draft": Entry(Draft.multi_step, _ODE, sibling=True),
            "cascade": Entry(Cascade.multi_step, _LEVELS, sibling=True),
        },
    ),
    "differentiable": Track(
        "dev",
        counter.ink_as_asked,
        _MULTI,
        {
            "best-of-n": Entry(lambda nfe: BestOfN()),
            "dps": Entry(lambda nfe: BestOfN(guide=_GUIDE)),
            "svdd": Entry(lambda nfe: SVDD()),
            "svdd + dps": Entry(lambda nfe: SVDD(guide=_GUIDE)),
        },
    ),
}


def tasks(track: str, methods: Sequence[str], budgets: Sequence[int], prompts: int, seeds: Sequence[int]) -> list[Task]:
    """Every method at every budget on the first prompts of the track's list."""
    texts = locate(f"prompts/{TRACKS[track].prompts}.txt").read_text(encoding="utf-8").splitlines()[:prompts]
    return [
        {"track": track, "method": method, "budget": budget, "prompt": text, "seed": seed}
        for budget in budgets
        for method in methods
        for seed in seeds
        for text in texts
    ]


@functools.cache
def _pipeline(model: str) -> Any:
    from ..flux import load

    torch.set_num_threads(1)  # last digits, and so some verdicts, depend on it
    return load(locate(f"tiny-flux/{model}"))


@functools.cache
def _judge() -> Any:
    from ..tiny.judge import HeldOutJudge

    return HeldOutJudge.load(locate("judge/held_out.safetensors"))


def problem_of(track: Track, entry: Entry, text: str) -> tuple[Problem, Any]:
    """The problem of a prompt, and the model that decodes its samples."""
    from ..flux import FlowModel

    model = FlowModel.encode(_pipeline(track.model), text, guidance=GUIDANCE)
    sampler = entry.sampler or track.sampler
    problem = sampler.of(model.problem(track.reward(shapes.parse(text)), sampler.kernel))
    problem = replace(problem, look_ahead=entry.look_ahead)
    if entry.sibling:
        few_step = FlowModel.encode(_pipeline("schnell"), text, guidance=GUIDANCE)
        problem = replace(problem, look_ahead=look_ahead.sibling(few_step))
    return problem, model


def replayed(row: Row) -> Row:
    """The row's search once more. Raises ValueError: the file of its method has changed since, or is not there."""
    if row.get("source") is None:
        return run(row)
    entry, digest = imported(row["source"])
    if digest != row["digest"]:
        raise ValueError(f"{row['source']} has changed since the row was made")
    return run(row, entry, row["source"])


def run(task: Task, entry: Entry | None = None, source: str | None = None) -> Row:
    """One search and its verdicts; seconds are CPU time of one thread. The entry is the stored one of that name.

    `source` is where an entry that is not stored comes from, which its row tells.
    """
    track = TRACKS[task["track"]]
    entry = entry or track.entries[task["method"]]
    problem, model = problem_of(track, entry, task["prompt"])
    generator, start = torch.Generator().manual_seed(task["seed"]), time.process_time()
    found = search(problem, entry.method(task["budget"]), max_nfe=task["budget"], generator=generator)
    seconds = time.process_time() - start
    scene, picture = shapes.parse(task["prompt"]), model.decode(found.best[None])
    return {
        "given": round(found.reward, 5),
        "exact": bool(counter.exact(scene, picture)[0]),
        "held_out": bool(_judge().exact(scene, picture)[0]),
        "nfe": found.nfe,
        "reward_calls": found.reward_calls,
        "seconds": round(seconds, 3),
        **({"source": source} if source else {}),
    }


def imported(name: str) -> tuple[Entry, str]:
    """The method `path/to/file.py:Name`, and a digest of its file.

    Name is a method, its class, or a function of the budget that returns one. If the file has a `SAMPLER`, a
    `bench.Sampler`, it is used in place of the track's; so is a `LOOK_AHEAD`, such as `look_ahead.ode(5)`; with
    `SIBLING = True` schnell looks ahead for dev. Raises ValueError: no such file or name.
    """
    path, _, attribute = name.rpartition(":")
    if not attribute or not Path(path).is_file():
        raise ValueError(f"expected path/to/file.py:MyMethod, with an existing file; got {name!r}")
    names = runpy.run_path(path)
    found = names.get(attribute)
    if not callable(getattr(found, "advance", found)):
        raise ValueError(f"{path} has no method, class or function {attribute!r}")
    of_budget = not hasattr(found, "advance")
    make: Any = found if of_budget else (lambda nfe: found() if inspect.isclass(found) else found)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    ahead = names.get("LOOK_AHEAD", posterior_mean)
    return Entry(make, names.get("SAMPLER"), names.get("SIBLING", False), ahead), digest


def compared(rows: Sequence[Row], stored: Sequence[Row], name: str) -> pd.DataFrame:
    """A line for the method and each stored one, on the same budgets, prompts and seeds.

    `counter` and `held out` are the method's share of exact pictures minus that line's, paired, with 95 % intervals.
    """
    keys = ("budget", "prompt", "seed")
    wanted = {tuple(row[key] for key in keys) for row in rows}
    others = [row for row in stored if tuple(row[key] for key in keys) in wanted]
    lines = table([*others, *rows], ["budget", "method"], VALUES)
    for cost in ("nfe", "reward_calls", "seconds"):
        lines[cost] = [f"{interval.mean:.3g}" for interval in lines[cost]]
    for value, title in (("exact", "counter"), ("held_out", "held out")):
        gains = []
        for budget, method in lines.index:
            theirs = [row for row in others if (row["budget"], row["method"]) == (budget, method)]
            ours = [row for row in rows if row["budget"] == budget]
            gains.append(_verdict(ours, theirs, value) if theirs and method != name else "")
        lines[f"{name}, {title}"] = gains
    return lines


def _verdict(ours: Sequence[Row], theirs: Sequence[Row], value: str) -> str:
    known = {(row["prompt"], row["seed"]) for row in theirs}
    gain = paired_difference([row for row in ours if (row["prompt"], row["seed"]) in known], theirs, value)
    word = "better" if gain.low > 0 else "worse" if gain.high < 0 else "level"
    return f"{word} {gain}"


def main(argv: Sequence[str]) -> None:
    """`flowscale bench`: exit status 2 and one line for bad input, 1 for a method that fails."""
    parser = argparse.ArgumentParser(prog="flowscale bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("method", help="a stored method's name, or path/to/file.py:MyMethod")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS), help="budgets (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ten prompts, one seed, 100 NFE: a minute")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="rows; an interrupted run goes on")
    args = parser.parse_args(argv)
    prompts, seeds, budgets = (10, SEEDS[:1], [100]) if args.quick else (PROMPTS, SEEDS, args.nfe)
    try:
        stored = [row for row in read(locate("results/bench.jsonl")) if row["track"] == args.track]
        known = args.method in TRACKS[args.track].entries
        entry, digest = (None, "stored") if known else imported(args.method)
        name = args.method if known else args.method.rpartition(":")[2]
        todo = [task | {"digest": digest} for task in tasks(args.track, [name], budgets, prompts, seeds)]
        source = None if known else args.method
        rows = sweep(todo, functools.partial(run, entry=entry, source=source), args.out, retries=0, title=name)
    except KeyboardInterrupt:
        print(
            f"flowscale bench: interrupted; the rows done are in {args.out}: the same command goes on", file=sys.stderr
        )
        sys.exit(130)
    except ExceptionGroup as group:
        error = group.exceptions[0]
        print(f"flowscale bench: {name} failed: {type(error).__name__}: {error}", *error.__notes__, file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"flowscale bench: {error}", file=sys.stderr)
        sys.exit(2)
    print(compared(rows, [row for row in stored if row["method"] != name], name).to_string())
