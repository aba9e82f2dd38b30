"""The words of the command: its options, what they may be, and how they are written down to be asked for again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from .. import __version__, kernels
from ..beyond import Cascade, Draft, Refine
from ..methods import RBF, SMC, SVDD, Beam, BestOfN, Blockwise, SearchOverPaths, ZeroOrder
from ..search import Method

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


def parser() -> argparse.ArgumentParser:
    """The options of a search."""
    about = '`flowscale "three red circles and two blue squares"`: a plain picture, and what a search makes of it.'
    more = "also: flowscale replay out.json, flowscale resume out.search, flowscale bench --help"
    p = argparse.ArgumentParser(prog="flowscale", description=about, epilog=more)
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
