"""`python -m tools.runs.schedulers`: schedulers for flow models on a flow known in closed form.

Each draws 4,096 samples of a two-mode Gaussian mixture from its exact velocity, at 10, 30 and 200 steps and 20 seeds.
Resumable; rows go to data/results/schedulers.jsonl and hold the sliced Wasserstein distance to as many exact draws and
the mass of the smaller mode, which is 0.3. The row "exact draws" is the distance that perfect sampling would show.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LTXEulerAncestralRFScheduler
from torch import Generator, Tensor

from flowscale_lite import LINEAR, GaussianMixture
from flowscale_lite.experiments import Row, Task, sweep
from flowscale_lite.flux import FlowSDEScheduler
from flowscale_lite.tiny.data import locate

from .tables import markdown

MIXTURE = GaussianMixture([[-2.0, -1.0], [1.5, 1.0]], [0.3, 0.5], [0.3, 0.7])
SCHEDULERS = {
    "FlowMatchEuler (ODE)": FlowMatchEulerDiscreteScheduler,
    "FlowMatchEuler, stochastic_sampling": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "LTXEulerAncestralRF": LTXEulerAncestralRFScheduler,
    "DPMSolver, sde-dpmsolver++": lambda: DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="sde-dpmsolver++"
    ),
    "ours, ode": lambda: FlowSDEScheduler(kernel="ode"),
    "ours, sde, g = 3 t^2": lambda: FlowSDEScheduler(kernel="sde"),
    "ours, ddim": lambda: FlowSDEScheduler(kernel="ddim"),
    "ours, sde on vp": lambda: FlowSDEScheduler(kernel="sde", interpolant="vp"),
    "ours, sde on vp, finish = 1": lambda: FlowSDEScheduler(kernel="sde", interpolant="vp", finish=1),
    "exact draws": None,
}
ROWS, STEPS, SEEDS = 4096, (10, 30, 200), 20


def distance(x: Tensor, y: Tensor, directions: int = 16) -> float:
    """Sliced Wasserstein-1 distance of two samples (K, 2) of one size."""
    angle = math.pi / directions * torch.arange(directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean())


def sample(name: str, steps: int, generator: Generator) -> Tensor:
    """Samples (ROWS, 2) by one scheduler, noise first, as a pipeline would run it."""
    if SCHEDULERS[name] is None:
        return MIXTURE.sample(ROWS, generator)
    scheduler, velocity = SCHEDULERS[name](), MIXTURE.velocity(LINEAR)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        scheduler.set_timesteps(steps)  # takes no sigmas; its flow sigmas are nearly uniform
    else:
        last = [0.0] if isinstance(scheduler, LTXEulerAncestralRFScheduler) else []  # the only one that wants the end
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)] + last)
    x = torch.randn(ROWS, 2, generator=generator)
    for t, sigma in zip(scheduler.timesteps[:steps], scheduler.sigmas, strict=False):
        v = velocity(x, torch.full((ROWS,), float(sigma)))
        x = scheduler.step(v, t, x, generator=generator, return_dict=False)[0]
    return x


def run(task: Task) -> Row:
    x = sample(task["scheduler"], task["steps"], Generator().manual_seed(task["seed"]))
    exact = MIXTURE.sample(ROWS, Generator().manual_seed(1000 + task["seed"]))
    return {"distance": round(distance(x, exact), 5), "mass": round(float((x.sum(1) < -0.5).float().mean()), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=locate("results") / "schedulers.jsonl")
    path = parser.parse_args().out
    tasks = [{"scheduler": s, "steps": n, "seed": k} for s in SCHEDULERS for n in STEPS for k in range(SEEDS)]
    rows = sweep(tasks, run, path, title="schedulers")
    means = pd.DataFrame(rows).groupby(["scheduler", "steps"], sort=False)[["distance", "mass"]].mean().unstack()
    table = means["distance"].add_suffix(" steps").assign(**{"mass of small mode": means["mass"][STEPS[-1]]})
    print("Mean distance to exact draws")
    print(markdown(table.loc[list(SCHEDULERS)].map("{:.3f}".format).reset_index()))


if __name__ == "__main__":
    main()
