"""`python -m tools.toy_table`: every method on a flow known exactly. Resumable; rows go to data/results/toy.jsonl.

Eight modes on a circle, one of them rare, and a reward that peaks beside the rare one; the same flow perfectly
distilled; the reward as it is and rounded to integers; 100 and 500 NFE, ten steps, 40 seeds; every method with every
kernel that it can use. All searches start from the best of four noises, except where a method has its own way
(best-of-N, SMC) or is shown as published. One cell has its first places within two standard errors: there the
contenders run again with 200 seeds of their own, into data/results/toy_fresh.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from flowscale_lite import (
    DPS,
    LINEAR,
    RBF,
    SMC,
    SVDD,
    BestOfN,
    Blockwise,
    GaussianMixture,
    Guide,
    Kernel,
    Method,
    Problem,
    QuadraticReward,
    Reward,
    SearchOverPaths,
    Velocity,
    ZeroOrder,
    experiments,
    gaussian,
    ode,
    paper_vp,
    quadratic,
    rounded,
    sde,
    search,
    uniform,
    vp_diffusion,
)

PATH = Path("data/results/toy.jsonl")
FRESH = Path("data/results/toy_fresh.jsonl")
BUDGETS, SEEDS, STEPS = (100, 500), 40, 10
KERNELS: dict[str, tuple[Kernel, tuple[float, ...]]] = {
    "ODE": (ode, uniform(STEPS)),
    "linear SDE": (sde(quadratic()), uniform(STEPS)),
    "VP-SDE": (sde(vp_diffusion()), paper_vp(STEPS, finish=3)),  # three steps for a last interval that is too long
    "exact": (gaussian(), uniform(STEPS)),
}
SEARCHES: dict[str, Method] = {
    "RBF": RBF(),
    "RBF, reserve": RBF(accept="reserve", batch=4),
    "RBF, competing": RBF(init=2, chains=2, compete=True),
    "RBF, published": RBF.published(init=4, chains=1),
    "SVDD": SVDD(init=2),
    "CoDe": Blockwise(init=2),
    "SMC": SMC(tau=0.1),
    "SVDD, guided": SVDD(init=2, guide=Guide()),
    "RBF, guided": RBF(guide=Guide()),
}
WITHOUT_NOISE: dict[str, Method] = {
    "best-of-N": BestOfN(),
    "zero-order": ZeroOrder(init=4),
    "search over paths": SearchOverPaths(init=2),
    "DPS": DPS(Guide(), init=4),
}


def tasks() -> list[experiments.Task]:
    """Every run of the table. A rounded reward has no gradient, so guided methods sit that one out."""
    cells = [(m, k) for m in SEARCHES for k in KERNELS if k != "ODE"]
    cells += [(m, "ODE") for m in WITHOUT_NOISE] + [("DPS", "linear SDE"), ("DPS", "exact")]
    return [
        {"world": world, "reward": reward, "budget": budget, "method": method, "kernel": kernel, "seed": seed}
        for world in ("exact", "distilled")
        for reward in ("smooth", "rounded")
        for budget in BUDGETS
        for method, kernel in cells
        if reward == "smooth" or not ("guided" in method or method == "DPS")
        for seed in range(SEEDS)
    ]


def fresh() -> list[experiments.Task]:
    """The contenders on the exact flow with the smooth reward and 500 NFE."""
    cell = {"world": "exact", "reward": "smooth", "budget": 500}
    methods = ("RBF", "RBF, competing", "RBF, guided", "SVDD", "SVDD, guided")
    return [cell | {"method": m, "kernel": "exact", "seed": seed} for m in methods for seed in range(1000, 1200)]


@functools.cache
def worlds() -> tuple[dict[str, Velocity], dict[str, Reward]]:
    """The velocities and rewards by name."""
    torch.set_num_threads(1)
    ring, reward = GaussianMixture.ring(), QuadraticReward((2.4, 0.0), curvature=10.0)
    velocities: dict[str, Callable] = {"exact": ring.velocity(LINEAR), "distilled": ring.distilled(steps=16)}
    return velocities, {"smooth": reward, "rounded": rounded(reward)}


def run(task: experiments.Task) -> experiments.Row:
    """One search."""
    velocities, rewards = worlds()
    kernel, times = KERNELS[task["kernel"]]
    problem = Problem(velocities[task["world"]], rewards[task["reward"]], LINEAR, kernel, times, (2,))
    start = time.perf_counter()
    found = search(
        problem,
        (SEARCHES | WITHOUT_NOISE)[task["method"]],
        max_nfe=task["budget"],
        generator=torch.Generator().manual_seed(task["seed"]),
    )
    return {
        "found": round(found.reward, 6),
        "nfe": found.nfe,
        "left": found.left,
        "reward_calls": found.reward_calls,
        "drawn": [step.drawn for step in found.trace],
        "seconds": round(time.perf_counter() - start, 4),
    }


def cell_lines(rows: list[experiments.Row]) -> list[experiments.Row]:
    """A line for every method and kernel of one world, reward and budget, the best first; intervals are 95 %."""
    z, lines = NormalDist().inv_cdf(0.975), []
    for method, kernel in dict.fromkeys((r["method"], r["kernel"]) for r in rows):
        cell = [r for r in rows if (r["method"], r["kernel"]) == (method, kernel)]
        found = np.array([r["found"] for r in cell])
        error = found.std(ddof=1) / len(found) ** 0.5
        drawn = np.mean([r["drawn"] for r in cell], axis=0)
        lines.append(
            {
                "method": method,
                "kernel": kernel,
                "mean reward": f"{found.mean():.4f} ± {z * error:.4f}",
                "NFE": f"{np.mean([r['nfe'] for r in cell]):.0f}",
                "reward calls": f"{np.mean([r['reward_calls'] for r in cell]):.0f}",
                "draws per step": " ".join(f"{d:.0f}" for d in drawn),
                "_mean": found.mean(),
                "_error": error,
            }
        )
    return sorted(lines, key=lambda line: -line["_mean"])


def standing(lines: list[experiments.Row]) -> str:
    """How RBF's default, with its best kernel, stands against the first of the lines, which are sorted."""
    place, ours = next((i, line) for i, line in enumerate(lines, 1) if line["method"] == "RBF")
    gap, error = lines[0]["_mean"] - ours["_mean"], (lines[0]["_error"] ** 2 + ours["_error"] ** 2) ** 0.5
    behind = f", {gap / error:.1f} standard errors behind the first" if gap > 0 else ""
    return f"RBF with its default and the kernel {ours['kernel']}: place {place} of {len(lines)}{behind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rows = experiments.sweep(tasks(), run, PATH, workers=args.workers, title="runs")
    for world, reward, budget in dict.fromkeys((r["world"], r["reward"], r["budget"]) for r in rows):
        print(f"\n{world} flow, {reward} reward, {budget} NFE")
        lines = cell_lines([r for r in rows if (r["world"], r["reward"], r["budget"]) == (world, reward, budget)])
        print(experiments.markdown([{k: v for k, v in line.items() if not k.startswith("_")} for line in lines]))
        print(standing(lines))
    lines = cell_lines(experiments.sweep(fresh(), run, FRESH, workers=args.workers, title="fresh seeds"))
    print("\nexact flow, smooth reward, 500 NFE, 200 fresh seeds")
    print(experiments.markdown([{k: v for k, v in line.items() if not k.startswith("_")} for line in lines]))
    print(standing(lines))


if __name__ == "__main__":
    main()
