"""`python -m tools.runs.interpolants`: samplers between the linear SDE and the VP-SDE, on tiny-flux. Resumable.

The rows of notebook 05. data/results/interpolants.jsonl: how far apart siblings are that part at the noise and after 3,
6 and 8 of ten steps, and what the pictures are worth without a search; both variants, twenty hard prompts.
data/results/interpolants_search.jsonl: what RBF finds with 100 NFE under each sampler; schnell, forty hard prompts.
"""

from __future__ import annotations

import argparse
import functools
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from flowscale_lite import RBF, experiments, kernels, schedules, search
from flowscale_lite.experiments import Row, Task
from flowscale_lite.flux import FlowModel, load
from flowscale_lite.interpolants import LINEAR, VP, Interpolant, Velocity, convert
from flowscale_lite.kernels import Kernel
from flowscale_lite.schedules import Times
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

from .tables import markdown

VARIETY, SEARCHES = locate("results") / "interpolants.jsonl", locate("results") / "interpolants_search.jsonl"
STEPS, PARTED, NFE = 10, (3, 6, 8), 100


class Sampler(NamedTuple):
    """A kernel, the times it is run at, and the path in whose coordinates it runs."""

    kernel: Kernel
    times: Times
    path: Interpolant = LINEAR


LOUD, VP_LOUD = kernels.sde(kernels.quadratic(3.0)), kernels.sde(kernels.vp_diffusion())
UNIFORM, PAPER = schedules.uniform(STEPS), schedules.paper_vp(STEPS)
SAMPLERS = {
    "linear SDE": Sampler(LOUD, UNIFORM),
    "+ grid": Sampler(LOUD, PAPER),
    "+ diffusion": Sampler(VP_LOUD, UNIFORM),
    "VP-SDE": Sampler(VP_LOUD, PAPER),
    "DDPM transition": Sampler(kernels.ddim(), UNIFORM),
    "DDPM transition + grid": Sampler(kernels.ddim(), PAPER),
    "VP-SDE, last step in three": Sampler(VP_LOUD, schedules.paper_vp(STEPS, finish=3)),
    "VP-SDE, on VP itself": Sampler(LOUD, tuple(math.sqrt(1 - (1 - t) ** 2) for t in UNIFORM), VP),
}


def texts(number: int) -> list[str]:
    """The first hard prompts."""
    return locate("prompts/hard.txt").read_text().splitlines()[:number]


def tasks(number: int, *models: str) -> list[Task]:
    """Every model, sampler and prompt, of the first `number`."""
    return [
        {"model": m, "sampler": name, "prompt": text} for m in models for name in SAMPLERS for text in texts(number)
    ]


@functools.cache
def pipeline(model: str) -> Any:
    """Loaded once a process."""
    torch.set_num_threads(1)  # as many processes as cores instead
    return load(locate(f"tiny-flux/{model}"))


@torch.no_grad()
def onwards(velocity: Velocity, sampler: Sampler, x: Tensor, start: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """States (T + 1, K, C, H, W) from step `start` to the data, and the posterior means (T, K, C, H, W) on the way."""
    kernel, times, path = sampler
    states, guesses = [x], []
    for t, s in pairwise(times[start:]):
        now = x.new_full((len(x),), t)
        v = velocity(x, now)
        guesses.append(path.endpoints(x, v, now)[0])
        mean, std = kernel(path, x, v, t, s)
        x = mean + std * torch.randn(x.shape, generator=generator)
        states.append(x)
    return torch.stack(states), torch.stack(guesses)


def variety(task: Task) -> Row:
    """Two noises of a prompt, four children each; three more from the first child's states on the way."""
    sampler = SAMPLERS[task["sampler"]]
    prompt = FlowModel.encode(pipeline(task["model"]), task["prompt"], guidance=2.0, chunk=64)
    reward, velocity = counter.CountReward(shapes.parse(task["prompt"])), convert(prompt, LINEAR, sampler.path)
    generator = Generator().manual_seed(texts(20).index(task["prompt"]))
    noise = sampler.path.at(sampler.times[0])[1] * torch.randn(2, *prompt.shape, generator=generator)
    states, guesses = onwards(velocity, sampler, noise.repeat_interleave(4, 0), 0, generator)
    ends = prompt.decode(states[-1])
    row = {"look-ahead": reward(prompt.decode(guesses[5])).mean(), "finished": reward(ends).mean()}
    row["strangers"] = counter.apart(ends[:4], ends[4:])
    row["part at 0"] = (counter.apart(ends[:4]) + counter.apart(ends[4:])) / 2
    for k in PARTED:
        again = states[k, ::4].repeat_interleave(3, 0)
        kin = prompt.decode(onwards(velocity, sampler, again, k, generator)[0][-1])
        row[f"part at {k}"] = (counter.apart(kin[:3]) + counter.apart(kin[3:])) / 2
    return {name: round(float(value), 4) for name, value in row.items()}


def searched(task: Task) -> Row:
    """What RBF finds; its settings are those found best for the VP-SDE."""
    kernel, times, path = SAMPLERS[task["sampler"]]
    prompt, scene = (
        FlowModel.encode(pipeline(task["model"]), task["prompt"], guidance=2.0),
        shapes.parse(task["prompt"]),
    )
    problem = prompt.problem(counter.CountReward(scene), kernel, times=times)
    problem = replace(problem, velocity=convert(prompt, LINEAR, path), path=path)
    found = search(problem, RBF.few_step(NFE), max_nfe=NFE, generator=Generator().manual_seed(11))
    return {"reward": round(found.reward, 4), "exact": int(counter.exact(scene, prompt.decode(found.best[None]))[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    rows = experiments.sweep(tasks(20, "dev", "schnell"), variety, VARIETY, workers=workers, title="variety")
    found = experiments.sweep(tasks(40, "schnell"), searched, SEARCHES, workers=workers, title="searches")
    distances = [f"part at {k}" for k in (0, *PARTED)]
    values = ["strangers", *distances, "look-ahead", "finished"]
    print(markdown(experiments.table(rows, ["model", "sampler"], values).reset_index()))
    print(markdown(experiments.table(found, ["model", "sampler"], ["reward", "exact"]).reset_index()))


if __name__ == "__main__":
    main()
