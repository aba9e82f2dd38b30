"""From the words to a job: judges, model, method and budget. What can be refused is refused here, before any search."""

from __future__ import annotations

import argparse
import math
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import look_ahead, schedules
from ..beyond import Cascade, Draft, Refine
from ..methods import RBF, Beam
from ..search import Method, Problem
from ..tiny import counter, shapes
from ..tiny.data import locate
from .saved import say
from .words import AIMED, DRAFTED, JUDGES, KERNELS, METHODS, ON_THE_ODE, check_numbers, check_output

if TYPE_CHECKING:
    from ..flux import FlowModel
    from ..rewards import Reward


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
    from .. import flux  # diffusers takes seconds to import: only once the words are right

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
    from .. import flux
    from ..flux import memory

    path = args.model or locate("tiny-flux/schnell")
    if args.memory is None:
        return [flux.load(each, args.device) for each in (path, args.draft) if each], {}
    sides = {side: getattr(args, side) for side in ("height", "width") if getattr(args, side)}
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
        from .. import judges

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
    from .. import judges

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

    from .. import judges

    try:
        layers = judges.linear_head(head)
    except SafetensorError as error:
        raise ValueError(f"{option}: {head} is damaged, or no safetensors file: {error}") from error
    return judges.aesthetic_score(judges.Clip.load("clip-l", device=args.device), layers)


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
