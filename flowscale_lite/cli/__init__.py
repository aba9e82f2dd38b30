"""`flowscale "three red circles and two blue squares"`: a prompt, a plain picture, and what a search makes of it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .job import Job, prepare
from .saved import INTERRUPTED, clear, line_of, read_account, read_search, reserve, saved_at, say
from .searching import run, table
from .words import parser

if TYPE_CHECKING:
    from ..rewards import Reward

HELP = {
    "replay": """usage: flowscale replay out.json
       flowscale replay rows.jsonl:17 [module:function]

Search again as an account says, or run the task of the row in that line again, and say what differs. A judge's file or
a model's folder is looked for from the account's folder. Rows that the bench did not write need the function that made
them.""",
    "resume": """usage: flowscale resume out.search

Go on with a search that was stopped, to the result that it would have had.""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command, `flowscale bench`, `flowscale replay` or `flowscale resume`.

    A bad end is told in one line on standard error. Exit status 2: bad input, before anything is computed. 1: the
    search failed, or a replay differs. 130: interrupted. A search that stopped leaves its best so far with its account,
    and goes on by `flowscale resume`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:
        from ..experiments import bench

        return bench.main(argv[1:])
    word, words = "".join(argv[:1]), argv[1:]
    if word in HELP and {"-h", "--help"} & {*words}:
        return print(HELP[word])
    told_before, state = None, None
    try:
        if word == "replay" and ".jsonl:" in "".join(words[:1]):
            return replay_row(*words)
        if word == "replay":
            told_before = read_account(words)
            argv = told_before["command"]
        elif word == "resume":
            state, argv = read_search(words)
        job = prepared(parser().parse_args(argv), told_before)
    except (ValueError, OSError) as error:
        lost = isinstance(error, FileNotFoundError) and (told_before or state)
        say(line_of(error) + (f"; put it where it was, as seen from {words[0]}" if lost else ""))
        sys.exit(2)
    try:
        account = run(job, state)
    finally:
        clear(job.args.out)
    print(table(account))
    print(f"picture: {job.args.out}   account: {job.args.out.with_suffix('.json')}")
    if told_before is not None:
        sys.exit(compared(account, told_before, job.args.out))
    if "stopped" in account:
        sys.exit(ended(account, job.args))


def prepared(args: argparse.Namespace, told_before: dict[str, Any] | None) -> Job:
    """What `prepare` makes, with its warnings a line each, and room for the results.

    To replay an account of a search that stopped, it will stop there again. Raises what `prepare` and `reserve` do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_: say(str(message))
        job = prepare(args)
    reserve(args.out)
    if told_before is None or "stopped" not in told_before:
        return job
    reward = until(job.problem.reward, told_before["found"]["reward_calls"])
    return replace(job, problem=replace(job.problem, reward=reward))


def ended(account: dict[str, Any], args: argparse.Namespace) -> int:
    """The exit status of a search that stopped, with one line on what remains."""
    saved, spent = saved_at(args.out), account["found"]["nfe"]
    more = f"; go on by: flowscale resume {saved}" if saved.exists() else ""
    say(f"stopped after {spent} of {args.nfe} NFE, the best so far is saved ({account['stopped']}){more}")
    return 130 if account["stopped"] == INTERRUPTED else 1


def compared(account: dict[str, Any], told_before: dict[str, Any], out: Path) -> int:
    """The exit status of a replay, with one line on what differs."""
    saved_at(out).unlink(missing_ok=True)
    different = [key for key in ("plain", "found", "trace") if known(account, key) != known(told_before, key)]
    same = "replayed: the same picture and numbers"
    print(f"replayed; differs in: {', '.join(different)}" if different else same)
    return 1 if different else 0


def known(account: dict[str, Any], key: str) -> Any:
    """A part of an account without its seconds; of a search that stopped without its NFE too.

    It is replayed up to the reward call it had come to. It may have been stopped between two evaluations.
    """
    part = account[key]
    chance = ("seconds", "nfe", "left") if "stopped" in account else ("seconds",)
    return {name: value for name, value in part.items() if name not in chance} if isinstance(part, dict) else part


def until(reward: Reward, judged: int) -> Reward:
    """The reward, which interrupts when the search has judged so many rows: where a search stopped is found again."""
    rows = -1  # the plain sample is judged first, and alone

    def limited(x: Tensor) -> Tensor:
        nonlocal rows
        if rows >= judged:
            raise KeyboardInterrupt
        rows += len(x)
        return reward(x)

    return limited


def replay_row(place: str, runner: str = "flowscale_lite.experiments.bench:replayed", *more: str) -> None:
    """`flowscale replay rows.jsonl:17`: run the task of the row in that line again. Rows that the bench did not write
    need the function that made them, `flowscale replay rows.jsonl:17 module:function`."""
    path, _, number = place.rpartition(":")
    module, _, function = runner.partition(":")
    if more or not number.isdigit() or not function:
        raise ValueError("expected the line of a sweep's row: flowscale replay rows.jsonl:17 [module:function]")
    from ..experiments.sweep import replay

    try:
        found, different = replay(path, int(number), getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no function {runner}: {error}") from error
    print(json.dumps(found))
    print(f"replayed; differs in: {', '.join(different)}" if different else "replayed: the same numbers")
    sys.exit(1 if different else 0)
