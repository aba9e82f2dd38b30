"""`flowscale "three red circles and two blue squares"`: a prompt, a plain picture, and what a search makes of it."""

from __future__ import annotations

import argparse
import json
import math
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, kernels, look_ahead, schedules
from .beyond import Cascade, Draft, Refine
from .methods import RBF, SMC, SVDD, Beam, BestOfN, Blockwise, SearchOverPaths, ZeroOrder
from .search import Method, Problem, Result, search, steps
from .tiny import shapes
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
KERNELS: dict[str, Callable[[], kernels.Kernel]] = {
    "ode": lambda: kernels.ode,
    "sde": lambda: kernels.sde(kernels.quadratic()),
    "vp": lambda: kernels.sde(kernels.vp_diffusion()),
    "ddim": lambda: kernels.ddim(1.0),
}


JUDGES = ("clip", "pickscore", "vqascore")


@dataclass(frozen=True)
class Job:
    """All that a search needs: what was asked for, else what suits the model."""

    args: argparse.Namespace
    model: FlowModel
    problem: Problem
    kernel: str
    name: str
    method: Method
    scene: shapes.Scene | None
    held_out: Reward | None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="flowscale", description=__doc__)
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
    judge = f"{', '.join(JUDGES)}, or path/to/file.py:function of pictures (K, 3, H, W) -> (K,) (default: a counter)"
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
    """Run the command, `flowscale bench` or `flowscale replay`. Bad input ends in one line on standard error and exit
    status 2, before anything is computed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:
        from .experiments import bench

        return bench.main(argv[1:])
    told_before = None
    try:
        if argv[:1] == ["replay"]:
            told_before = read_account(argv[1:])
            argv = told_before["command"]
    except (ValueError, OSError) as error:
        print(f"flowscale replay: {error}", file=sys.stderr)
        sys.exit(2)
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"flowscale: {message}", file=sys.stderr)
            job = prepare(args)
    except (ValueError, OSError) as error:
        print(f"flowscale: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    account = run(job)
    print(table(account))
    print(f"picture: {args.out}   account: {args.out.with_suffix('.json')}")
    if told_before is not None:
        different = [key for key in ("plain", "found", "trace") if known(account[key]) != known(told_before[key])]
        print(f"replayed; differs in: {', '.join(different)}" if different else "replayed: the same numbers")
        sys.exit(1 if different else 0)


def read_account(argv: Sequence[str]) -> dict[str, Any]:
    """The account to replay, its command set to write beside it. Raises ValueError or OSError: there is none."""
    if len(argv) != 1:
        raise ValueError("expected the account of a search: flowscale replay out.json")
    path = Path(argv[0])
    account = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(account, dict) or not {"command", "plain", "found", "trace"} <= set(account):
        raise ValueError(f"{path} is not an account that flowscale wrote")
    account["command"] += ["--out", str(path.with_suffix(".replay.png"))]
    return account


def known(part: Any) -> Any:
    """A part of an account without its seconds."""
    return {key: value for key, value in part.items() if key != "seconds"} if isinstance(part, dict) else part


def prepare(args: argparse.Namespace) -> Job:
    """Everything that can be refused is refused here: words, then model and device, then budget.

    Raises:
        ValueError, OSError: with one clear line.
    """
    scene = None if args.reward else shapes.parse(args.prompt)
    check_numbers(args)
    check_output(args.out)
    reward = named_reward(args.reward, args) if scene is None else shapes.CountReward(scene)
    held_out = named_reward(args.held_out, args) if args.held_out else None
    from . import flux  # diffusers takes seconds to import: only once the words are right

    pipes, rows = load(args)
    sides = {"height": args.height, "width": args.width, "guidance": args.guidance, **rows}
    model, *drafting = (flux.FlowModel.encode(pipe, args.prompt, **sides) for pipe in pipes)
    name = args.method or ("draft" if args.draft else "beam" if model.multi_step else "rbf")
    method, kernel = suited_method(args, name, model), suited_kernel(args, name, model)
    times = suited_times(args, name, kernel, model)
    problem = model.problem(reward, KERNELS[kernel](), times=times)
    for sibling in drafting:
        if sibling.shape != model.shape:
            raise ValueError(f"--draft {args.draft} has latents of {sibling.shape}, the model of {model.shape}")
        problem = replace(problem, look_ahead=look_ahead.sibling(sibling))
    method.check(problem, args.nfe)
    if name == "refine" and model.multi_step:
        print("flowscale: refine is made for few-step models; on this one beam finds more", file=sys.stderr)
    return Job(args, model, problem, kernel, name, method, scene, held_out)


def load(args: argparse.Namespace) -> tuple[list[Any], dict[str, int]]:
    """The model's pipeline, and the draft's if there is one; with --memory by a plan, which is printed first."""
    from .flux import hub, memory

    path = args.model or locate("tiny-flux/schnell")
    if args.memory is None:
        return [hub.load(each, args.device) for each in (path, args.draft) if each], {}
    sides = {side: value for side in ("height", "width") if (value := getattr(args, side))}
    dtype = memory.best_dtype(args.device)
    plan = memory.plan(path, args.memory, dtype=dtype, guidance=args.guidance, draft=args.draft, **sides)
    print(plan)
    pipes = memory.load_planned(
        path, plan, args.device, draft=args.draft, prompts=[args.prompt], guidance=args.guidance
    )
    return list(pipes) if args.draft else [pipes], {"chunk": plan.chunk}


def named_reward(name: str, args: argparse.Namespace) -> Reward:
    """The reward asked for: a judge by its name, or a function of pictures (K, 3, H, W) -> (K,) by its file.

    Raises ValueError if there is no such file or function, or the file cannot be run; what loading a judge raises.
    """
    if name in JUDGES:
        from . import judges

        if name == "vqascore":
            return judges.vqa_score(judges.VisionLanguage.load(device=args.device), args.prompt)
        clip = judges.Clip.load("pickscore" if name == "pickscore" else "clip-l", device=args.device)
        return (judges.pick_score if name == "pickscore" else judges.clip_score)(clip, args.prompt)
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        choices = f"one of {', '.join(JUDGES)}, or path/to/file.py:function with an existing file"
        raise ValueError(f"--reward must be {choices}; got {name!r}")
    try:
        found = runpy.run_path(path).get(function)
    except Exception as error:
        raise ValueError(f"--reward {path} cannot be run: {error!r}") from error
    if not callable(found):
        raise ValueError(f"--reward: {path} has no function {function!r}")
    return found


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


def run(job: Job) -> dict[str, Any]:
    """Draw the plain picture and search for a better one; writes picture and account, returns the account."""
    import matplotlib.pyplot as plt
    from torch import Generator
    from tqdm import tqdm

    from . import plots

    args = job.args
    plain = plain_sample(replace(job.problem, times=job.model.times(args.steps)), Generator().manual_seed(args.seed))
    start = time.perf_counter()
    found = steps(job.problem, job.method, max_nfe=args.nfe, generator=Generator().manual_seed(args.seed))
    with tqdm(total=args.nfe, unit="NFE", disable=None, leave=False) as bar:
        for step in found:
            bar.update(step.nfe - bar.n)
    seconds, result = time.perf_counter() - start, found.result()
    before, after = (job.model.decode(each.best[None]) for each in (plain, result))
    account = told(job) | {
        "plain": summary(plain, before, job.scene),
        "found": summary(result, after, job.scene) | {"seconds": round(seconds, 2)},
        **(
            {} if job.held_out is None else {"held_out": [round(float(job.held_out(p)[0]), 4) for p in (before, after)]}
        ),
        "trace": [step._asdict() for step in result.trace],
    }
    account = finite(account)
    text = json.dumps(account, indent=1, allow_nan=False) + "\n"
    args.out.with_suffix(".json").write_text(text)  # first: the budget is spent, whatever drawing may meet
    figure = plots.before_after(before[0], after[0], result, title=args.prompt)
    figure.savefig(args.out, dpi=150)
    plt.close(figure)
    return account


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for, such as the mean of no candidates."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(job: Job) -> dict[str, Any]:
    """What was asked for, with all that is needed to ask for it again."""
    return {
        "prompt": job.args.prompt,
        "seed": job.args.seed,
        "model": str(job.args.model or "tiny-flux/schnell"),
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
    """The options that ask for the same search again, all but where it is written."""
    named = {
        key.replace("_", "-"): value
        for key, value in vars(args).items()
        if key not in ("prompt", "out") and value is not None
    }
    return [args.prompt, *(word for key, value in named.items() for word in (f"--{key}", str(value)))]


def plain_sample(problem: Problem, generator: Any) -> Result:
    """One sample of the deterministic flow, what the model draws without a search."""
    max_nfe = (1 + problem.evaluations_ahead()) * problem.cost
    return search(replace(problem, kernel=kernels.ode), BestOfN(1), max_nfe=max_nfe, generator=generator)


def summary(result: Result, picture: Any, scene: shapes.Scene | None) -> dict[str, Any]:
    """What a table says about one picture; its objects only if the prompt is a scene that can be counted."""
    objects: dict[str, Any] = {}
    if scene is not None:
        counts = shapes.count(picture)[0].tolist()
        objects["counts"] = {" ".join(kind): n for kind, n in zip(shapes.CLASSES, counts, strict=True) if n}
        objects["exact"] = bool(shapes.exact(scene, picture)[0])
    return {
        "reward": round(result.reward, 4),
        **objects,
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
        lines.append((name, f"{entry['reward']:.2f}", right, *numbers, f"  {counts}"))
    told = ["{:18}{:>8}{:>7}{:>7}{:>14}{:>9}{}".format(*line).rstrip() for line in lines]
    if "held_out" in account:
        told.append("held out: plain {:.2f}, found {:.2f}".format(*account["held_out"]))
    return "\n".join(told)
