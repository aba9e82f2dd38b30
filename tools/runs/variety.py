"""`python -m tools.runs.variety`: how different a method's finds are, and how well it looked ahead. Resumable.

Searches of 100 NFE with tiny-flux schnell on 20 prompts of the test list, five seeds each, as the bench runs them.
A row of data/results/variety.jsonl holds, for a method and a prompt, the mean distance between two of the five pictures
found (root mean squared difference of their pixels), and of every run its reward, its verdicts and the look-ahead
reward that it went on with after each step. For notebook 10.
"""

from __future__ import annotations

import argparse
from math import isnan

import torch

from flowscale_lite import experiments
from flowscale_lite.experiments import bench, paper
from flowscale_lite.methods import SMC, BestOfN
from flowscale_lite.search import search
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

from .parts import parts

PATH = locate("results") / "variety.jsonl"
TRACK, PROMPTS, SEEDS, BUDGET = bench.TRACKS["few-step"], 20, 5, 100
METHODS = {"plain": bench.Entry(lambda nfe: BestOfN(1), paper.SAMPLERS["ODE"])}
METHODS |= {"smc": bench.Entry(lambda nfe: SMC(tau=0.5, tempering=0.0))}
METHODS |= {name: TRACK.entries[name] for name in ("best-of-n", "svdd", "rbf", "refine")}


def tasks() -> list[experiments.Task]:
    """Every method on every prompt."""
    texts = locate(f"prompts/{TRACK.prompts}.txt").read_text().splitlines()[:PROMPTS]
    return [{"prompt": prompt, "method": method} for prompt in texts for method in METHODS]


def run(task: experiments.Task) -> experiments.Row:
    """Five searches."""
    scene, (_, judge) = shapes.parse(task["prompt"]), parts(TRACK.model)
    entry = METHODS[task["method"]]
    problem, model = bench.problem_of(TRACK, entry, task["prompt"])
    found = [
        search(problem, entry.method(BUDGET), max_nfe=BUDGET, generator=torch.Generator().manual_seed(seed))
        for seed in range(SEEDS)
    ]
    pictures = model.decode(torch.stack([one.best for one in found]))
    return {
        "distance": round(float(counter.apart(pictures)), 5),
        "reward": [round(one.reward, 4) for one in found],
        "exact": counter.exact(scene, pictures).tolist(),
        "held_out": judge.exact(scene, pictures).tolist(),
        "accepted": [[None if isnan(s.accepted) else round(s.accepted, 4) for s in one.trace] for one in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    experiments.sweep(tasks(), run, PATH, workers=args.workers, title="runs")


if __name__ == "__main__":
    main()
