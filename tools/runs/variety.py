"""`python -m tools.runs.variety`: how different a method's finds are, and how well it looked ahead. Resumable.

Searches of 100 NFE with tiny-flux schnell on 20 hard prompts, five seeds each, by the recipes of `tools.runs.results`.
A row of data/results/variety.jsonl holds, for a method and a prompt, the mean distance between two of the five pictures
found (root mean squared difference of their pixels), and of every run its reward, its verdicts and the look-ahead
reward that it went on with after each step. For notebook 10.
"""

from __future__ import annotations

import argparse
from math import isnan

import torch

from flowscale_lite import experiments
from flowscale_lite.flux import FlowModel
from flowscale_lite.search import search
from flowscale_lite.tiny import shapes
from flowscale_lite.tiny.data import locate

from .results import RECIPES, parts

PATH = locate("results") / "variety.jsonl"
METHODS, PROMPTS, SEEDS, BUDGET = ("plain", "best-of-n", "smc", "svdd", "rbf", "refine"), 20, 5, 100


def tasks() -> list[experiments.Task]:
    """Every method on every prompt."""
    texts = locate("prompts/hard.txt").read_text().splitlines()[:PROMPTS]
    return [{"prompt": prompt, "method": method} for prompt in texts for method in METHODS]


def run(task: experiments.Task) -> experiments.Row:
    """Five searches."""
    pipe, judge = parts("schnell")
    scene, recipe = shapes.parse(task["prompt"]), RECIPES["schnell"][task["method"]]
    prompt = FlowModel.encode(pipe, task["prompt"], guidance=2.0)
    problem = prompt.problem(shapes.CountReward(scene), recipe.kernel, times=recipe.times or prompt.times(10))
    found = [
        search(problem, recipe.method(BUDGET), max_nfe=BUDGET, generator=torch.Generator().manual_seed(seed))
        for seed in range(SEEDS)
    ]
    pictures = prompt.decode(torch.stack([one.best for one in found]))
    return {
        "distance": round(float(shapes.apart(pictures)), 5),
        "reward": [round(one.reward, 4) for one in found],
        "exact": shapes.exact(scene, pictures).tolist(),
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
