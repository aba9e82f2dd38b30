"""`flowscale "three red circles and two blue squares"`: a prompt, a plain picture, and what a search makes of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, kernels, schedules
from .methods import RBF, SMC, SVDD, BestOfN, Blockwise, Funnel, Refine, SearchOverPaths, ZeroOrder
from .search import Method, Problem, Result, search
from .tiny import shapes
from .tiny.data import locate

if TYPE_CHECKING:
    from .flux import FlowModel

METHODS: dict[str, Callable[[], Method]] = {
    "best-of-n": BestOfN,
    "rbf": RBF,
    "refine": Refine,
    "funnel": Funnel,
    "svdd": SVDD,
    "smc": SMC,
    "code": Blockwise,
    "search-over-paths": SearchOverPaths,
    "zero-order": ZeroOrder,
}
ON_THE_ODE = ("best-of-n", "refine", "search-over-paths", "zero-order")
KERNELS = {
    "ode": lambda: kernels.ode,
    "sde": lambda: kernels.sde(kernels.quadratic()),
    "vp": lambda: kernels.sde(kernels.vp_diffusion()),
    "ddim": lambda: kernels.ddim(1.0),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="flowscale", description=__doc__)
    p.add_argument("prompt", help="what to draw, in plain English")
    p.add_argument("--method", choices=METHODS, default="rbf")
    p.add_argument("--nfe", type=int, default=250, help="budget of velocity evaluations (default: %(default)s)")
    p.add_argument("--steps", type=int, default=10, help="steps of the time grid (default: %(default)s)")
    p.add_argument("--kernel", choices=KERNELS, help="transition (default: what suits method and model)")
    p.add_argument(
        "--guidance",
        type=float,
        default=2.0,
        help="scale, for models that have one (default: %(default)s); 0 for models distilled to do without",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--model", help="folder or hub id of a pipeline (default: the tiny-flux of this project)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=Path("out.png"), help="picture; the account goes beside it as .json")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input ends in one line on standard error and exit status 2, before anything is computed."""
    args = parser().parse_args(argv)
    try:
        prompt, problem, method, scene = prepare(args)
    except (ValueError, OSError) as error:
        sys.exit(_fail(error))
    account = run(args, prompt, problem, method, scene)
    print(table(account))
    print(f"picture: {args.out}   account: {args.out.with_suffix('.json')}")


def _fail(error: Exception) -> int:
    print(f"flowscale: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def prepare(args: argparse.Namespace) -> tuple[FlowModel, Problem, Any, shapes.Scene]:
    """Everything that can be refused is refused here: prompt, budget, model, device.

    Raises:
        ValueError, OSError: with one clear line.
    """
    scene = shapes.parse(args.prompt)
    if args.nfe < 1 or args.steps < 1:
        raise ValueError(f"--nfe and --steps must be at least 1; got {args.nfe} and {args.steps}")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed must be an integer of 64 bits; got {args.seed}")
    written = (args.out, args.out.with_suffix(".json"))
    if args.out.suffix != ".png" or not args.out.resolve().parent.is_dir() or any(path.is_dir() for path in written):
        raise ValueError(f"--out must name a .png file in an existing folder; got {args.out}")
    if args.method == "refine" and args.kernel:
        raise ValueError(f"refine redraws noise itself and takes no --kernel; got {args.kernel}")
    from . import flux  # diffusers takes seconds to import: only once the words are right

    model = args.model or locate("tiny-flux/schnell")
    prompt = flux.FlowModel.encode(flux.load(model, args.device), args.prompt, guidance=args.guidance)
    method, kernel, times = suited(args, prompt)
    problem = prompt.problem(shapes.CountReward(scene), KERNELS[kernel](), times=times)
    method.check(problem, args.nfe)
    if args.method == "refine" and prompt.multi_step:
        print("flowscale: refine is made for few-step models; on this one rbf finds more", file=sys.stderr)
    return prompt, problem, method, scene


def suited(args: argparse.Namespace, prompt: FlowModel) -> tuple[Method, str, schedules.Times]:
    """Method, name of the kernel and time grid: what was asked for, else what suits the model."""
    kernel = args.kernel or ("ode" if args.method in ON_THE_ODE else "ddim" if prompt.multi_step else "vp")
    method, times = METHODS[args.method](), prompt.times(args.steps)
    if args.method == "rbf":
        method = RBF.few_step(args.nfe, prompt.cost)
        if prompt.multi_step:
            method = RBF.multi_step(args.nfe, args.steps, prompt.cost)
    if args.method == "refine":
        method = Refine.few_step(args.nfe, prompt.cost)
        times = schedules.levels(args.steps)
    elif kernel == "vp":
        times = schedules.paper_vp(args.steps, finish=-(-args.steps // 3) if prompt.multi_step else 1)
    elif args.method == "rbf" and prompt.multi_step:
        times = schedules.logit_normal(args.steps)
    return method, kernel, times


def run(
    args: argparse.Namespace, prompt: FlowModel, problem: Problem, method: Any, scene: shapes.Scene
) -> dict[str, Any]:
    """Draw the plain picture and search for a better one; writes picture and account, returns the account."""
    import matplotlib.pyplot as plt
    from torch import Generator
    from tqdm import tqdm

    from . import plots

    plain = plain_sample(replace(problem, times=prompt.times(args.steps)), Generator().manual_seed(args.seed))
    start = time.perf_counter()
    with tqdm(total=args.nfe, unit="NFE", disable=None, leave=False) as bar:
        found = search(
            problem,
            method,
            max_nfe=args.nfe,
            generator=Generator().manual_seed(args.seed),
            on_step=lambda _, run: bar.update(run.nfe - bar.n),
        )
    seconds = time.perf_counter() - start
    before, after = (prompt.decode(result.best[None]) for result in (plain, found))
    account = told(args, problem, method) | {
        "plain": summary(plain, before, scene),
        "found": summary(found, after, scene) | {"seconds": round(seconds, 2)},
        "trace": [step._asdict() for step in found.trace],
    }
    text = json.dumps(finite(account), indent=1, allow_nan=False) + "\n"
    args.out.with_suffix(".json").write_text(text)  # first: the budget is spent, whatever drawing may meet
    figure = plots.before_after(before[0], after[0], found, title=args.prompt)
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


def told(args: argparse.Namespace, problem: Problem, method: Any) -> dict[str, Any]:
    """What was asked for, with all that is needed to ask for it again."""
    return {
        "prompt": args.prompt,
        "seed": args.seed,
        "model": str(args.model or "tiny-flux/schnell"),
        "steps": args.steps,
        "guidance": args.guidance,
        "kernel": problem.kernel.name,
        "method": {"name": args.method, **asdict(method)},
        "budget": args.nfe,
        "version": __version__,
    }


def plain_sample(problem: Problem, generator: Any) -> Result:
    """One sample of the deterministic flow, what the model draws without a search."""
    problem = replace(problem, kernel=kernels.ode)
    return search(problem, BestOfN(1), max_nfe=(1 + problem.evaluations_ahead()) * problem.cost, generator=generator)


def summary(result: Result, picture: Any, scene: shapes.Scene) -> dict[str, Any]:
    """What a table says about one picture."""
    return {
        "reward": round(result.reward, 4),
        "counts": {" ".join(shapes.CLASSES[k]): int(n) for k, n in enumerate(shapes.count(picture)[0]) if n},
        "exact": bool(shapes.exact(scene, picture)[0]),
        "nfe": result.nfe,
        "left": result.left,
        "reward_calls": result.reward_calls,
    }


def table(account: dict[str, Any]) -> str:
    """The account in four aligned lines."""
    rows = [("", "reward", "exact", "NFE", "reward calls", "seconds", "counts")]
    for name, key in (("plain", "plain"), (account["method"]["name"], "found")):
        entry = account[key]
        counts = ", ".join(f"{n} {kind}" for kind, n in entry["counts"].items()) or "nothing"
        rows.append(
            (
                name,
                f"{entry['reward']:.2f}",
                "yes" if entry["exact"] else "no",
                str(entry["nfe"]),
                str(entry["reward_calls"]),
                f"{entry.get('seconds', ''):}",
                counts,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
