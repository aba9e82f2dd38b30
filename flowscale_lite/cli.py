"""`flowscale "three red circles and two blue squares"`: a prompt, a plain picture, and what a search makes of it."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import math
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Generator, Tensor

from . import __version__, kernels, look_ahead, schedules
from .beyond import Cascade, Draft, Refine
from .methods import RBF, SMC, SVDD, Beam, BestOfN, Blockwise, SearchOverPaths, ZeroOrder
from .search import Method, Problem, Result, Search, search, steps
from .tiny import counter, shapes
from .tiny.data import locate

if TYPE_CHECKING:
    from .flux import FlowModel
    from .rewards import Reward

METHODS: dict[str, Callable[[], Method]] = {
    "best-of-n": BestOfN,
    "rbf": RBF,
    "beam": Beam,
    "refine": Refine,
    "draft": Draft,
    "cascade": Cascade,
    "svdd": SVDD,
    "smc": SMC,
    "code": Blockwise,
    "search-over-paths": SearchOverPaths,
    "zero-order": ZeroOrder,
}
ON_THE_ODE = ("best-of-n", "refine", "draft", "cascade", "search-over-paths", "zero-order")
DRAFTED = ("draft", "cascade")
KERNELS = {
    "ode": kernels.ode,
    "sde": kernels.sde(kernels.quadratic()),
    "vp": kernels.sde(kernels.vp_diffusion()),
    "ddim": kernels.ddim(1.0),
}
JUDGES = ("clip", "pickscore", "vqascore")
AIMED = ("counts:2 red apple, 3 cup", "aesthetic:head.safetensors")  # judges that need more than their name
FILES = dict.fromkeys(("--model", "--draft", "--preview"), Path.is_dir)
FILES |= dict.fromkeys(("--reward", "--held-out"), Path.is_file)  # options that may name such a path
HELP = {
    "replay": """usage: flowscale replay out.json
       flowscale replay rows.jsonl:17 [module:function]

Search again as an account says, or run the task of the row in that line again, and say what differs. A judge's file or
a model's folder is looked for from the account's folder. Rows that the bench did not write need the function that made
them.""",
    "resume": """usage: flowscale resume out.search

Go on with a search that was stopped, to the result that it would have had.""",
}


@dataclass(frozen=True)
class Job:
    """All that a search needs: what was asked for, else what suits the model."""

    args: argparse.Namespace
    model: FlowModel
    problem: Problem
    reward: Reward
    kernel: str
    name: str
    method: Method
    scene: shapes.Scene | None
    held_out: Reward | None


def parser() -> argparse.ArgumentParser:
    more = "also: flowscale replay out.json, flowscale resume out.search, flowscale bench --help"
    p = argparse.ArgumentParser(prog="flowscale", description=__doc__, epilog=more)
    p.add_argument("prompt", help="what to draw, in plain English")
    p.add_argument(
        "--method", choices=METHODS, help="default: rbf; beam for models that need many steps; draft with --draft"
    )
    p.add_argument("--nfe", type=int, default=250, help="budget of velocity evaluations (default: %(default)s)")
    p.add_argument("--steps", type=int, default=10, help="steps of the time grid (default: %(default)s)")
    p.add_argument("--kernel", choices=KERNELS, help="transition (default: what suits method and model)")
    guidance = "scale, for models that have one (default: %(default)s); 0 for models distilled to do without"
    p.add_argument("--guidance", type=float, default=2.0, help=guidance)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model", help="folder or hub id of a pipeline (default: the tiny-flux of this project)")
    sibling = "folder or hub id of a few-step model of the same latents: it searches, the model finishes"
    p.add_argument("--draft", metavar="MODEL", help=sibling)
    small = "folder or hub id of a small autoencoder that decodes what the search judges, such as madebyollin/taef1"
    p.add_argument("--preview", metavar="MODEL", help=small)
    judge = f"{', '.join((*JUDGES, *AIMED))}, or path/to/file.py:function of pictures (K, 3, H, W) -> (K,)"
    judge += " (default: counts, of the coloured shapes in the prompt)"
    p.add_argument("--reward", help=judge)
    p.add_argument(
        "--held-out", help="a second judge, named like --reward, that sees the two pictures of the table only"
    )
    p.add_argument("--width", type=int, help="of the picture in pixels (default: what the model was made for)")
    p.add_argument("--height", type=int)
    gib = "plan for so many GiB of the device's memory: precision, offloading, rows at a time (default: no plan)"
    p.add_argument("--memory", type=float, metavar="GIB", help=gib)
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=Path("out.png"), help="picture; the account goes beside it as .json")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command, `flowscale bench`, `flowscale replay` or `flowscale resume`.

    A bad end is told in one line on standard error. Exit status 2: bad input, before anything is computed. 1: the
    search failed, or a replay differs. 130: interrupted. A search that stopped leaves its best so far with its account,
    and goes on by `flowscale resume`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:
        from .experiments import bench

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


def read_account(words: Sequence[str]) -> dict[str, Any]:
    """The account to replay, its command set to write beside it. Raises ValueError or OSError: there is none."""
    if len(words) != 1:
        raise ValueError("expected the account of a search: flowscale replay out.json")
    path = Path(words[0])
    if path.suffix == ".search":
        raise ValueError(f"{path} is a saved search, not an account; go on with it by: flowscale resume {path}")
    account = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(account, dict) or not {"command", "plain", "found", "trace"} <= set(account):
        raise ValueError(f"{path} is not an account that flowscale wrote")
    command = seen_from(account["command"], path.parent, Path())
    return account | {"command": [*command, "--out", str(path.with_suffix(".replay.png"))]}


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
    from .experiments.sweep import replay

    try:
        found, different = replay(path, int(number), getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no function {runner}: {error}") from error
    print(json.dumps(found))
    print(f"replayed; differs in: {', '.join(different)}" if different else "replayed: the same numbers")
    sys.exit(1 if different else 0)


# ------------------------------------------------------------------------------------------- what outlives a failure
INTERRUPTED = "interrupted"


def say(text: str) -> None:
    """One line on standard error, at once."""
    print(f"flowscale: {text}", file=sys.stderr, flush=True)


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def parts(out: Path) -> tuple[Path, Path]:
    """Where account and picture are written before they get their names."""
    return out.with_suffix(".json.part"), out.with_suffix(".png.part")


def reserve(out: Path, size: int = 2**20) -> None:
    """Room for account and picture, a mebibyte each: should the disk become full, they can be written.

    Raises OSError: it is full already, or may not be written to.
    """
    try:
        for part in parts(out):
            part.write_bytes(os.urandom(size))
    except OSError as error:
        clear(out)
        raise OSError(f"no room for account and picture in {out.parent.absolute()}: {error.strerror}") from error


def clear(out: Path) -> None:
    """Give the reserved room back."""
    for part in parts(out):
        part.unlink(missing_ok=True)


def fill(part: Path, data: bytes) -> None:
    """Write a file, whole or not at all, in the room that was reserved."""
    with part.open("r+b") as file:
        file.write(data)
        file.truncate()
    part.replace(part.with_suffix(""))


def saved_at(out: Path) -> Path:
    """Where a search under way is saved."""
    return out.with_suffix(".search")


def save_search(found: Search, args: argparse.Namespace) -> bool:
    """Save the search as it is, with its command, as safetensors. Says so if that fails, and whether it did not."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = saved_at(args.out)
    part = path.with_name(path.name + ".part")
    state = {name: tensor.cpu().clone().contiguous() for name, tensor in found.state().items()}
    try:
        save_file(state, part, {"command": json.dumps(command(args))})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        say(f"the search goes on, but can no longer be saved: {line_of(error)}")
        return False
    return True


def read_search(words: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The state of a saved search, and its command. Raises ValueError or OSError: there is none."""
    from safetensors import SafetensorError, safe_open

    if len(words) != 1:
        raise ValueError("expected a saved search: flowscale resume out.search")
    path = Path(words[0])
    if path.suffix == ".json":
        raise ValueError(f"{path} is an account, not a saved search; search again by: flowscale replay {path}")
    if not path.is_file():
        raise FileNotFoundError(f"no saved search at {path}")
    try:
        with safe_open(path, "pt") as file:
            command = json.loads((file.metadata() or {})["command"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no search that flowscale saved: {line_of(error)}") from error
    return state, [*seen_from(command, path.parent, Path()), "--out", str(path.with_suffix(".png"))]


def failure(error: BaseException) -> str:
    """What stopped a search, and where, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line_of(error)}, {Path(last.filename).name} line {last.lineno}"


def prepare(args: argparse.Namespace) -> Job:
    """Everything that can be refused is refused here: words, then model and device, then budget.

    Raises:
        ValueError, OSError: with one clear line.
    """
    try:
        scene = None if args.reward else shapes.parse(args.prompt)
    except ValueError as error:
        raise ValueError(f"{error}; for other words name a judge with --reward") from error
    check_numbers(args)
    check_output(args.out)
    reward = named_reward(args.reward, args) if scene is None else counter.CountReward(scene)
    held_out = named_reward(args.held_out, args, "--held-out") if args.held_out else None
    say(f"loading {args.model or 'tiny-flux/schnell'}")
    from . import flux  # diffusers takes seconds to import: only once the words are right

    pipes, rows = load(args)
    small = flux.hub.preview(args.preview, args.device) if args.preview else None
    sides = {"height": args.height, "width": args.width, "guidance": args.guidance, "preview": small, **rows}
    model, *drafting = (flux.FlowModel.encode(pipe, args.prompt, **sides) for pipe in pipes)
    name = args.method or ("draft" if args.draft else "beam" if model.multi_step else "rbf")
    method, kernel = suited_method(args, name, model), suited_kernel(args, name, model)
    times = suited_times(args, name, kernel, model)
    problem = model.problem(reward, KERNELS[kernel], times=times)
    for sibling in drafting:
        if sibling.shape != model.shape:
            raise ValueError(f"--draft {args.draft} has latents of {sibling.shape}, the model of {model.shape}")
        problem = replace(problem, look_ahead=look_ahead.sibling(sibling))
    method.check(problem, args.nfe)
    if name == "refine" and model.multi_step:
        say("refine is made for few-step models; on this one beam finds more")
    return Job(args, model, problem, reward, kernel, name, method, scene, held_out)


def load(args: argparse.Namespace) -> tuple[list[Any], dict[str, int]]:
    """The model's pipeline, and the draft's if there is one; with --memory by a plan, which is printed first."""
    from . import flux
    from .flux import memory

    path = args.model or locate("tiny-flux/schnell")
    if args.memory is None:
        return [flux.load(each, args.device) for each in (path, args.draft) if each], {}
    sides = {side: value for side in ("height", "width") if (value := getattr(args, side))}
    dtype = memory.best_dtype(args.device)
    plan = memory.plan(path, args.memory, dtype=dtype, guidance=args.guidance, draft=args.draft, **sides)
    print(plan)
    pipes = memory.load_planned(
        path, plan, args.device, draft=args.draft, prompts=[args.prompt], guidance=args.guidance
    )
    return list(pipes) if args.draft else [pipes], {"chunk": plan.chunk}


def named_reward(name: str, args: argparse.Namespace, option: str = "--reward") -> Reward:
    """The reward asked for by `option`: a judge's name, or a function of pictures (K, 3, H, W) -> (K,) by its file.

    Raises FileNotFoundError if there is no such file, ValueError if it cannot be run or has no such function, and what
    loading a judge raises.
    """
    if name in JUDGES:
        from . import judges

        if name == "vqascore":
            return judges.vqa_score(judges.VisionLanguage.load(device=args.device), args.prompt)
        clip = judges.Clip.load("pickscore" if name == "pickscore" else "clip-l", device=args.device)
        return (judges.pick_score if name == "pickscore" else judges.clip_score)(clip, args.prompt)
    kind, _, wanted = name.partition(":")
    if kind == "counts":
        return counts_reward(wanted, args, option)
    if kind == "aesthetic":
        return aesthetic_reward(Path(wanted), args, option)
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        choices = (
            f"one of {', '.join(JUDGES)}, counts, {', '.join(AIMED)}, or path/to/file.py:function with an existing file"
        )
        raise FileNotFoundError(f"{option} must be {choices}; got {name!r}")
    try:
        found = runpy.run_path(path).get(function)
    except Exception as error:
        raise ValueError(f"{option} {path} cannot be run: {error!r}") from error
    if not callable(found):
        raise ValueError(f"{option}: {path} has no function {function!r}")
    return found


def counts_reward(wanted: str, args: argparse.Namespace, option: str) -> Reward:
    """Minus the squared error of counts: "2 red apple, 3 cup" by GroundingDINO and SAM; "" by the prompt's shapes.

    Raises ValueError if the prompt is not of coloured shapes, or a part of `wanted` is not a number and a thing.
    """
    if not wanted:
        try:
            return counter.CountReward(shapes.parse(args.prompt))
        except ValueError as error:
            raise ValueError(f"{error}; for other things say which: {option} {AIMED[0]!r}") from error
    from . import judges

    parts = [part.strip().partition(" ") for part in wanted.split(",")]
    if not all(number.isdigit() and thing for number, _, thing in parts):
        raise ValueError(f"{option} counts takes numbers and things, as in {AIMED[0]!r}; got {wanted!r}")
    target = {thing.strip(): int(number) for number, _, thing in parts}
    return judges.grounded_counts(judges.Finder.load(device=args.device), target)


def aesthetic_reward(head: Path, args: argparse.Namespace, option: str) -> Reward:
    """The aesthetic score by a head of linear layers over CLIP, in a safetensors file.

    Raises ValueError if there is no such file, or if it holds something else.
    """
    if not head.is_file():
        raise ValueError(f"{option} aesthetic needs the file of its head, {AIMED[1]!r}; got no such file")
    from safetensors import SafetensorError

    from . import judges

    try:
        layers = judges.linear_head(head)
    except SafetensorError as error:
        raise ValueError(f"{option}: {head} is damaged, or no safetensors file: {error}") from error
    return judges.aesthetic_score(judges.Clip.load("clip-l", device=args.device), layers)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError if a number is out of range, or if options exclude one another."""
    if args.nfe < 1 or args.steps < 1:
        raise ValueError(f"--nfe and --steps must be at least 1; got {args.nfe} and {args.steps}")
    if any(side is not None and side < 1 for side in (args.width, args.height)):
        raise ValueError(f"--width and --height must be at least 1; got {args.width} and {args.height}")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed must be an integer of 64 bits; got {args.seed}")
    if args.method in ("refine", *DRAFTED) and args.kernel:
        raise ValueError(f"{args.method} redraws noise itself and takes no --kernel; got {args.kernel}")
    if args.method in DRAFTED and not args.draft:
        raise ValueError(f"{args.method} needs --draft MODEL, a few-step model of the same latents")
    if args.draft and args.method not in (None, *DRAFTED):
        raise ValueError(f"--draft is for the methods {' and '.join(DRAFTED)}; got --method {args.method}")


def check_output(out: Path) -> None:
    """Raises ValueError if picture and account cannot be written there."""
    taken = out.is_dir() or out.with_suffix(".json").is_dir()
    if out.suffix != ".png" or taken or not out.resolve().parent.is_dir():
        raise ValueError(f"--out must name a .png file in an existing folder; got {out}")


def suited_method(args: argparse.Namespace, name: str, model: FlowModel) -> Method:
    """The method of that name, with settings that suit model, budget and steps where it has such."""
    if name == "rbf" and not model.multi_step:
        return RBF.few_step(args.nfe, model.cost)
    if name == "beam" and model.multi_step:
        return Beam.multi_step(args.nfe, args.steps, model.cost)
    if name == "refine":
        return Refine.few_step(args.nfe, model.cost)
    if name in DRAFTED:
        return (Draft if name == "draft" else Cascade).multi_step(args.nfe, model.cost)
    return METHODS[name]()


def suited_kernel(args: argparse.Namespace, name: str, model: FlowModel) -> str:
    """The kernel asked for, else that which suits method and model."""
    if args.kernel:
        return args.kernel
    if name in ON_THE_ODE:
        return "ode"
    return "ddim" if model.multi_step else "vp"


def suited_times(args: argparse.Namespace, name: str, kernel: str, model: FlowModel) -> schedules.Times:
    """The time grid that suits method, kernel and model."""
    if name in ("refine", "cascade"):
        return schedules.levels(args.steps)
    if kernel == "vp":
        return schedules.paper_vp(args.steps, finish=math.ceil(args.steps / 3) if model.multi_step else 1)
    if name == "beam" and model.multi_step:
        return schedules.logit_normal(args.steps)
    return model.times(args.steps)


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
    if job.model.preview is not None and (said := scored(job.reward, "the judge", before, after)):
        # The search has judged previews. What is told of a picture is of the picture.
        plain, result = replace(plain, reward=said[0]), replace(result, reward=said[1])
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


def scored(judge: Reward | None, name: str, *pictures: Tensor) -> list[float]:
    """A judge's scores of single pictures (1, 3, H, W); none if there is no judge or it fails, which is said."""
    try:
        return [float(judge(picture)[0]) for picture in pictures] if judge else []
    except Exception as error:  # the search's budget is spent, so its account is written in any case
        say(f"{name} failed on the pictures: {failure(error)}")
        return []


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


def write(account: dict[str, Any], before: Tensor, after: Tensor, result: Result, args: argparse.Namespace) -> None:
    """Account and picture. What cannot be written or drawn is said in one line, and the account is printed then."""
    import matplotlib.pyplot as plt

    from . import plots

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


def command(args: argparse.Namespace) -> list[str]:
    """The words that ask for the same search again, all but where it is written; files as seen from there."""
    words = [args.prompt]
    for key, value in vars(args).items():
        if key not in ("prompt", "out") and value is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return seen_from(words, Path(), args.out.parent)


def seen_from(words: Sequence[str], old: Path, new: Path) -> list[str]:
    """A command's words; the files and folders that its relative paths lead to from `old` are named as from `new`."""
    moved = list(words)
    for k, (option, word) in enumerate(pairwise(words), 1):
        if option not in FILES:
            continue
        for part in (word, *word.rpartition(":")[::2]):  # a folder; path/to/file.py:function or aesthetic:file
            if part and not Path(part).is_absolute() and FILES[option](old / part):
                moved[k] = word.replace(part, os.path.relpath(old / part, new))
    return moved


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
