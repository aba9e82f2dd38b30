"""The search itself: a plain picture first, then the method, and the account of both."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor

from .. import __version__, kernels
from ..methods import BestOfN
from ..search import Result, Search, search, steps
from ..tiny import counter, shapes
from .job import Job
from .saved import failure, fill, parts, save_search, saved_at, say
from .words import command

if TYPE_CHECKING:
    from ..rewards import Reward


def run(job: Job, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Draw the plain picture and search for a better one; writes picture and account, returns the account.

    A search that stops on the way is told of as far as it came, with the reason as `stopped`. `state` is that of a
    saved search to go on with.
    """
    args = job.args
    say("drawing a plain sample")
    try:
        # One sample of the deterministic flow, what the model draws without a search.
        problem = replace(job.problem, kernel=kernels.ode, times=job.model.times(args.steps))
        price = (1 + problem.evaluations_ahead()) * problem.cost
        plain = search(problem, BestOfN(1), max_nfe=price, generator=Generator().manual_seed(args.seed))
    except (KeyboardInterrupt, Exception) as error:
        say(f"stopped before the search: {failure(error)}")
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    found = steps(job.problem, job.method, max_nfe=args.nfe, generator=Generator().manual_seed(args.seed))
    if state is not None:
        found.restore(state)
    start, stopped = time.perf_counter(), watched(found, job)
    seconds = time.perf_counter() - start
    result = plain if found.run.seen is None else found.so_far()  # nothing was judged: the plain sample is the best
    before, after = (job.model.decode(each.best[None]) for each in (plain, result))
    if job.model.preview is not None:
        # The search has judged previews. What is told of a picture is of the picture.
        scores = scored(job.reward, "the judge", before, after) or [plain.reward, result.reward]
        plain, result = replace(plain, reward=scores[0]), replace(result, reward=scores[1])
    held_out = scored(job.held_out, "the held-out judge", before, after)
    spent = {"nfe": found.run.nfe, "left": found.run.left, "reward_calls": found.run.reward_calls}
    account = told(job) | stopped
    if held_out:
        account["held_out"] = [round(score, 4) for score in held_out]
    account["plain"] = summary(plain, before, job.scene)
    account["found"] = summary(result, after, job.scene) | spent | {"seconds": round(seconds, 2)}
    account["trace"] = [step._asdict() for step in found.trace]
    # As it will be read again, with null for what JSON has no number for, such as the mean of no candidates.
    account = json.loads(json.dumps(account), parse_constant=lambda _: None)
    write(account, before[0], after[0], result, args)
    return account


def watched(found: Search, job: Job) -> dict[str, str]:
    """Step the search to its end, saved before every step, under a bar or, without a terminal, a line now and then.

    What stops it is returned as `stopped`; after the end the saved search is removed.
    """
    from tqdm import tqdm

    args, said = job.args, time.monotonic()
    say(f"searching: {job.name}, {args.nfe} NFE")
    saving = save_search(found, args)
    try:
        with tqdm(total=args.nfe, unit="NFE", disable=None, leave=False) as bar:
            for step in found:
                bar.update(step.nfe - bar.n)
                saving = saving and save_search(found, args)
                if bar.disable and time.monotonic() > said + 10:
                    said = time.monotonic()
                    say(f"{step.nfe} of {args.nfe} NFE")
    except (KeyboardInterrupt, Exception) as error:
        return {"stopped": failure(error)}
    saved_at(args.out).unlink(missing_ok=True)
    return {}


def scored(judge: Reward | None, name: str, *pictures: Tensor) -> list[float]:
    """A judge's scores of single pictures (1, 3, H, W); none if there is no judge or it fails, which is said."""
    try:
        return [float(judge(picture)[0]) for picture in pictures] if judge else []
    except Exception as error:  # the search's budget is spent, so its account is written in any case
        say(f"{name} failed on the pictures: {failure(error)}")
        return []


def told(job: Job) -> dict[str, Any]:
    """What was asked for, with all that is needed to ask for it again."""
    return {
        "prompt": job.args.prompt,
        "seed": job.args.seed,
        "model": job.args.model or "tiny-flux/schnell",
        "pipeline": type(job.model.pipe).__name__,
        "draft": job.args.draft,
        "preview": job.args.preview,
        "judge": job.args.reward or "counts",
        "held_out_judge": job.args.held_out,
        "steps": job.args.steps,
        "guidance": job.args.guidance,
        "kernel": job.kernel,
        "times": list(job.problem.times),
        "look_ahead": job.problem.look_ahead.name,
        "command": command(job.args),
        "method": {"name": job.name, "settings": repr(job.method)},
        "budget": job.args.nfe,
        "version": __version__,
    }


def summary(result: Result, picture: Any, scene: shapes.Scene | None) -> dict[str, Any]:
    """What a table says about one picture; its objects only if the prompt is a scene that can be counted."""
    objects: dict[str, Any] = {}
    if scene is not None:
        counts = counter.count(picture)[0].tolist()
        objects["counts"] = {" ".join(kind): n for kind, n in zip(shapes.CLASSES, counts, strict=True) if n}
        objects["exact"] = bool(counter.exact(scene, picture)[0])
    pixels = (picture[0].detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy().tobytes()
    return {
        "reward": round(result.reward, 4),
        **objects,
        "picture": hashlib.sha256(pixels).hexdigest()[:16],
        "nfe": result.nfe,
        "left": result.left,
        "reward_calls": result.reward_calls,
    }


def write(account: dict[str, Any], before: Tensor, after: Tensor, result: Result, args: argparse.Namespace) -> None:
    """Account and picture. What cannot be written or drawn is said in one line, and the account is printed then."""
    import matplotlib.pyplot as plt

    from .. import plots

    text = json.dumps(account, indent=1, allow_nan=False) + "\n"
    try:
        fill(parts(args.out)[0], text.encode())  # first: the budget is spent, whatever drawing may meet
        figure, png = plots.before_after(before, after, result, title=args.prompt), io.BytesIO()
        figure.savefig(png, dpi=150)
        plt.close(figure)
        fill(parts(args.out)[1], png.getvalue())
    except Exception as error:
        print(text)
        say(f"the account is on standard output, for picture or account could not be written: {failure(error)}")
        sys.exit(1)


def table(account: dict[str, Any]) -> str:
    """The account in three aligned lines."""
    lines = [("", "reward", "exact", "NFE", "reward calls", "seconds", "  counts")]
    for name, entry in (("plain", account["plain"]), (account["method"]["name"], account["found"])):
        counts = right = ""
        if "counts" in entry:
            counts = ", ".join(f"{n} {kind}" for kind, n in entry["counts"].items()) or "nothing"
            right = "yes" if entry["exact"] else "no"
        seconds = str(entry.get("seconds", ""))
        numbers = (str(entry["nfe"]), str(entry["reward_calls"]), seconds)
        lines.append((name, f"{entry['reward']:z.2f}", right, *numbers, f"  {counts}"))
    told = ["{:18}{:>8}{:>7}{:>7}{:>14}{:>9}{}".format(*line).rstrip() for line in lines]
    if "held_out" in account:
        told.append("held out: plain {:z.2f}, found {:z.2f}".format(*account["held_out"]))
    return "\n".join(told)
