"""`python -m tools.runs.gradients`: guidance by gradients on tiny-flux dev; rows go to data/results/gradients.jsonl.

Two differentiable rewards, neither of which says all that is wanted: `counter.ink_as_asked`, as much ink of each colour
as the objects asked for hold, and `counter.colourful`, the more colour the better. First guided samples over strength,
kernel and the time from which they are guided, and in 40 steps in place of ten; then methods with and without guidance
at the same budget. Every picture is judged by the counter and by the held-out judge. For notebook 09. Resumable; half
an hour of CPU time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any

import torch

from flowscale_lite import experiments
from flowscale_lite.flux import FlowModel, load
from flowscale_lite.kernels import ddim, ode
from flowscale_lite.methods import SVDD, Beam, BestOfN, Guide
from flowscale_lite.schedules import logit_normal
from flowscale_lite.search import Method, search
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import HeldOutJudge

PROMPTS = (
    "three yellow circles and two blue triangles",
    "four blue squares and three red triangles",
    "five red triangles and two green circles",
    "two green squares and four yellow triangles",
    "three red circles and four blue triangles",
    "three green triangles and three red squares",
    "two blue circles and five yellow triangles",
    "four green circles and two red triangles",
    "five red squares and four green circles",
    "six blue circles and three yellow squares",
    "four yellow squares and five blue triangles",
    "three green triangles and six red circles",
    "five green circles and three red squares",
    "four red triangles and four yellow circles",
    "two yellow circles and six blue squares",
    "seven green squares and two blue triangles",
)  # five to seven objects, then eight or nine
STRENGTHS, SAMPLES, BUDGET, SEEDS = (0.05, 0.1, 0.2, 0.4, 0.8), 8, 250, 3
REWARDS = {"ink as asked": counter.ink_as_asked, "colourful": lambda scene: counter.colourful}


def method_of(task: experiments.Task) -> Method:
    """The method a task names; strength 0 is without guidance."""
    guide = Guide(task["strength"], normalised=True, below=task["below"]) if task["strength"] else None
    if task["method"] == "svdd":
        return SVDD(guide=guide)
    if task["method"] == "beam":
        return Beam(states=2, select_below=0.8, guide=guide)
    n = SAMPLES if task["method"].startswith("samples") else None
    return BestOfN(n, guide=guide)


@functools.cache
def parts() -> tuple[Any, HeldOutJudge]:
    """Pipeline and held-out judge, loaded once a process."""
    torch.set_num_threads(1)  # as many processes as cores instead
    return load(locate("tiny-flux/dev")), HeldOutJudge.load(locate("judge/held_out.safetensors"))


def run(task: experiments.Task) -> experiments.Row:
    """One search and its verdicts; for plain samples those of every one."""
    pipe, judge = parts()
    scene = shapes.parse(task["prompt"])
    prompt = FlowModel.encode(pipe, task["prompt"], guidance=2.0)
    kernel = {"DDPM": ddim(), "ode": ode}[task["kernel"]]
    samples = task["method"].startswith("samples")
    steps = 40 if task["method"] == "samples in 40 steps" else 10
    problem = prompt.problem(REWARDS[task["reward"]](scene), kernel, times=logit_normal(steps))
    generator = torch.Generator().manual_seed(task["seed"])
    found = search(problem, method_of(task), max_nfe=task["budget"], generator=generator)
    latents = found.particles.x if samples else found.best[None]
    picture = prompt.decode(latents)
    return {
        "given": [round(value, 5) for value in problem.reward(latents).tolist()],
        "exact": counter.exact(scene, picture).tolist(),
        "held_out": judge.exact(scene, picture).tolist(),
        "nfe": found.nfe,
        "gradients": found.gradients,
    }


def tasks() -> list[experiments.Task]:
    """Every run, those of the sweep over strengths first. Samples have a budget that is more than enough."""
    plain, late = [(s, 0.9) for s in (0.0, *STRENGTHS)], [(s, 0.6) for s in STRENGTHS]
    cells = [("samples", 100 * SAMPLES, "DDPM", *setting, 1) for setting in plain + late]
    cells += [("samples", 100 * SAMPLES, "ode", *setting, 1) for setting in plain]
    cells += [("samples in 40 steps", 160 * SAMPLES, "DDPM", s, 0.9, 1) for s in (0.0, 0.1, 0.4)]
    methods = itertools.product(("best-of-n", "svdd", "beam"), (0.0, 0.1))
    cells += [(method, BUDGET, "DDPM", s, 0.9, SEEDS) for method, s in methods]
    names = ("reward", "method", "budget", "kernel", "strength", "below", "prompt", "seed")
    return [
        dict(zip(names, (reward, method, budget, kernel, strength, below, prompt, seed), strict=True))
        for method, budget, kernel, strength, below, seeds in cells
        for reward in REWARDS
        for prompt in PROMPTS
        for seed in range(seeds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    experiments.sweep(tasks(), run, locate("results") / "gradients.jsonl", workers=args.workers, title="gradients")


if __name__ == "__main__":
    main()
