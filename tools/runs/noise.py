"""`python -m tools.runs.noise`: does noise on the way keep the distribution of tiny-flux's pictures? Resumable.

The rows of notebook 04. Plain samples, no search: one picture a prompt from each of three samplers, which start from
the same noise. 400 random scenes, drawn with a seed of their own, for dev at guidance 1 and 2 and for schnell, which
knows no guidance, in 4, 10 and 30 steps of the grid that the model comes with. A row of data/results/noise.jsonl says
whether the three pictures, in the order of SAMPLERS, are exact by the counter and by the held-out judge.
"""

from __future__ import annotations

import argparse
import functools
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowscale_lite import LINEAR, experiments, kernels
from flowscale_lite.experiments import Row, Task
from flowscale_lite.flux import FlowModel
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

from .parts import parts
from .tables import markdown

PATH = locate("results") / "noise.jsonl"
PROMPTS, STEPS = 400, (10, 4, 30)
MODELS = (("dev", 1.0), ("dev", 2.0), ("schnell", None))
SAMPLERS = {"ODE": kernels.ode, "SDE": kernels.sde(kernels.quadratic()), "DDPM": kernels.ddim()}


@functools.cache
def prompts() -> list[str]:
    """Random scenes in plain words."""
    rng = np.random.default_rng(404)
    return [shapes.random_scene(rng).caption() for _ in range(PROMPTS)]


def tasks() -> list[Task]:
    """Every model and number of steps for every prompt; `number` is the prompt's place, for a scene may come twice."""
    return [
        {"model": model, "guidance": guidance, "steps": steps, "number": number, "prompt": text}
        for steps in STEPS
        for number, text in enumerate(prompts())
        for model, guidance in MODELS
    ]


@torch.no_grad()
def samples(prompt: FlowModel, steps: int, seed: int) -> Tensor:
    """A latent (3, C, H, W) from each sampler; they see the same start and the same noise on the way."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(prompt.shape, generator=generator).expand(len(SAMPLERS), *prompt.shape)
    for t, s in pairwise(prompt.times(steps)):
        v, noise = prompt(x, x.new_full((len(x),), t)), torch.randn(prompt.shape, generator=generator)
        moments = [kernel(LINEAR, x[k : k + 1], v[k : k + 1], t, s) for k, kernel in enumerate(SAMPLERS.values())]
        x = torch.cat([mean + std * noise for mean, std in moments])
    return x


def run(task: Task) -> Row:
    """Three pictures and their verdicts."""
    pipe, judge = parts(task["model"])
    prompt, scene = FlowModel.encode(pipe, task["prompt"], guidance=task["guidance"]), shapes.parse(task["prompt"])
    pictures = prompt.decode(samples(prompt, task["steps"], task["number"]))
    return {"exact": counter.exact(scene, pictures).tolist(), "held_out": judge.exact(scene, pictures).tolist()}


def table(rows: list[Row], judged: str) -> pd.DataFrame:
    """The share of pictures that a judge finds exact, and what a noisy sampler adds to the ODE's, paired by prompt."""
    lines = []
    for (model, guidance, steps), cell in pd.DataFrame(rows).groupby(["model", "guidance", "steps"], dropna=False):
        share = dict(zip(SAMPLERS, np.array(cell[judged].tolist(), dtype=float).T, strict=True))
        line = {"model": model, "guidance": guidance, "steps": steps, "pictures": len(cell)}
        line |= {name: experiments.clustered_mean(share[name], cell["prompt"]) for name in SAMPLERS}
        for name in list(SAMPLERS)[1:]:
            line[f"{name} - ODE"] = experiments.clustered_mean(share[name] - share["ODE"], cell["prompt"])
        lines.append(line)
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    rows = experiments.sweep(tasks(), run, PATH, workers=parser.parse_args().workers, title="pictures")
    for judged in ("exact", "held_out"):
        print(f"\n{judged}\n\n{markdown(table(rows, judged))}")


if __name__ == "__main__":
    main()
