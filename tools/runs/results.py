"""`python -m tools.runs.results`: searches with tiny-flux on easy and hard prompts. Rows go to data/results/.

Plain sample, best-of-N and RBF at 100, 250 and 500 NFE, with both variants; and on the hard prompts with schnell every
other search method, and RBF with other kernels and rules, at 250 NFE. Three seeds a prompt, ten steps, and a quarter of
the budget on the first noises for every method that looks at them. Accuracy is by the exact counter that the reward is
built on, and by the held-out judge that no method sees. `--print` shows the tables of what has been run so far.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
import torch

from flowscale_lite import experiments, kernels, schedules
from flowscale_lite.beyond import Refine
from flowscale_lite.flux import FlowModel, load
from flowscale_lite.kernels import Kernel
from flowscale_lite.methods import (
    RBF,
    SMC,
    SVDD,
    Beam,
    BestOfEnough,
    BestOfN,
    BestOfQuota,
    Blockwise,
    SearchOverPaths,
    ZeroOrder,
)
from flowscale_lite.schedules import Times
from flowscale_lite.search import Method, search
from flowscale_lite.tiny import shapes
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import HeldOutJudge

from .tables import insert, markdown

PATH = locate("results") / "search.jsonl"
PROMPTS, BUDGETS = 50, (100, 250, 500)


class Recipe(NamedTuple):
    """A method for a budget, with its kernel and time grid; no grid is the pipeline's own."""

    method: Callable[[int], Method]
    kernel: Kernel
    times: Times | None = None


VP = kernels.sde(kernels.vp_diffusion()), schedules.paper_vp(10, finish=1)
LINEAR = kernels.sde(kernels.quadratic()), schedules.uniform(10)
COMMON = {"plain": Recipe(lambda nfe: BestOfN(1), kernels.ode), "best-of-n": Recipe(lambda nfe: BestOfN(), kernels.ode)}
RECIPES: dict[str, dict[str, Recipe]] = {
    "dev": COMMON
    | {
        "beam": Recipe(Beam.multi_step, kernels.ddim(), schedules.logit_normal(10)),
        "refine": Recipe(Refine.few_step, kernels.ode, schedules.levels(10)),  # which is not made for it
    },
    "schnell": COMMON
    | {
        "rbf": Recipe(RBF.few_step, *VP),
        "refine": Recipe(Refine.few_step, kernels.ode, schedules.levels(10)),
        "refine, all regions": Recipe(lambda nfe: Refine(nfe // 4, share=1.0), kernels.ode, schedules.levels(10)),
        "refine, one region": Recipe(lambda nfe: Refine(nfe // 4, share=1 / 16), kernels.ode, schedules.levels(10)),
        "refine, 3 x 3 regions": Recipe(lambda nfe: Refine(nfe // 4, cells=3), kernels.ode, schedules.levels(10)),
        "best-of-n, 4 steps": Recipe(lambda nfe: BestOfN(), kernels.ode, schedules.uniform(4)),
        "svdd": Recipe(lambda nfe: SVDD(init=nfe // 8), *VP),
        "beam, narrowing": Recipe(lambda nfe: Beam(init=nfe // 32, narrow=True), *VP),
        "code": Recipe(lambda nfe: Blockwise(init=nfe // 8), *VP),
        "smc": Recipe(lambda nfe: SMC(tau=0.5, tempering=0.0), *VP),
        "search over paths": Recipe(lambda nfe: SearchOverPaths(init=nfe // 8), kernels.ode),
        "zero-order": Recipe(lambda nfe: ZeroOrder(init=nfe // 4), kernels.ode),
        "rbf, published": Recipe(lambda nfe: RBF.published(), *VP),
        "rbf, best of enough": Recipe(lambda nfe: RBF(init=nfe // 4), *VP),
        "rbf, enough 16": Recipe(lambda nfe: RBF(init=nfe // 4, rule=BestOfEnough(16)), *VP),
        "rbf, equal quotas": Recipe(lambda nfe: RBF(init=nfe // 4, rule=BestOfQuota()), *VP),
        "rbf, 2 t^2": Recipe(
            lambda nfe: RBF(init=nfe // 4), kernels.sde(kernels.quadratic(2.0)), schedules.uniform(10)
        ),
        "beam, two states": Recipe(lambda nfe: Beam(states=2, init=nfe // 8), *VP),
        "rbf, linear SDE": Recipe(RBF.few_step, *LINEAR),
        "rbf, DDPM transition": Recipe(RBF.few_step, kernels.ddim(), schedules.uniform(10)),
        "rbf, best of enough, linear SDE": Recipe(lambda nfe: RBF(init=nfe // 4), *LINEAR),
    },
}


def at(budget: int, *methods: str) -> list[tuple[str, int]]:
    """Runs of these methods with one budget."""
    return [(method, budget) for method in methods]


MAIN = at(10, "plain") + [("best-of-n", n) for n in BUDGETS] + [("rbf", n) for n in BUDGETS]
DEV = at(10, "plain") + [("best-of-n", n) for n in BUDGETS] + [("beam", n) for n in BUDGETS]
REFINE = [("refine", n) for n in BUDGETS]
REGIONS = at(100, "refine, all regions", "refine, one region", "refine, 3 x 3 regions")
FIFTH = at(100, "rbf, 2 t^2")  # against best-of-n at 500, as refine at 100 is
CLOSE = at(250, "svdd", "beam, narrowing", "code", "smc")
REST = [
    *at(250, "search over paths", "zero-order", "rbf, published", "rbf, best of enough", "rbf, 2 t^2"),
    *at(250, "beam, two states", "rbf, linear SDE", "rbf, DDPM transition", "rbf, best of enough, linear SDE"),
    *[("best-of-n, 4 steps", 100), ("best-of-n, 4 steps", 500), ("svdd", 100)],
]
FOUR = at(250, "best-of-n, 4 steps")
WIDE = at(50, "best-of-n", "rbf", "refine") + at(1000, "best-of-n", "rbf", "refine")
LARGE = at(500, "rbf, best of enough", "rbf, equal quotas")  # which are the same up to 250
FEWER = [("rbf, enough 16", 250), ("rbf, enough 16", 500)]
# On the prompts and seeds on which nothing was tuned:
TOLD = at(10, "plain") + at(250, "best-of-n", "rbf")
CHECK = [*TOLD, ("best-of-n", 500), *FIFTH, ("refine", 100), ("refine", 250)]
AGAIN = [("best-of-n", 500), ("refine", 100)]

# Model, prompts, seeds and runs. The most telling come first, so that an unfinished sweep is of use.
CELLS: list[tuple[str, str, tuple[int, ...], list[tuple[str, int]]]] = [
    ("schnell", "hard", (0, 1, 2), MAIN),
    ("schnell", "hard", (0, 1, 2), REFINE),
    ("schnell", "hard", (0, 1, 2), FIFTH),
    ("schnell", "held_out", (7,), CHECK),
    ("schnell", "held_out", (8, 9), AGAIN),
    ("schnell", "hard", (0,), REGIONS),
    ("dev", "hard", (0,), at(250, "refine")),
    ("schnell", "hard", (0,), FOUR + CLOSE + REST),
    ("schnell", "easy", (0, 1, 2), MAIN),
    ("dev", "easy", (0,), DEV),
    ("dev", "hard", (0,), DEV),
    ("dev", "held_out", (7,), at(10, "plain") + at(250, "best-of-n", "beam")),
    ("schnell", "hard", (0,), WIDE),
    ("schnell", "hard", (1, 2), CLOSE),
    ("dev", "hard", (1, 2), DEV),
    ("schnell", "hard", (0, 1, 2), LARGE),
    ("schnell", "hard", (1, 2), FOUR + REST),
    ("schnell", "hard", (0, 1, 2), FEWER),
]


def tasks() -> list[experiments.Task]:
    """Every run: those of a cell seed by seed, of a seed prompt by prompt."""
    return [
        {"model": model, "level": level, "prompt": prompt, "seed": seed, "method": method, "budget": budget}
        for model, level, seeds, runs in CELLS
        for seed in seeds
        for prompt in locate(f"prompts/{level}.txt").read_text().splitlines()[:PROMPTS]
        for method, budget in runs
    ]


@functools.cache
def parts(model: str) -> tuple[Any, HeldOutJudge]:
    """Pipeline and held-out judge, loaded once a process."""
    torch.set_num_threads(1)  # as many processes as cores instead
    return load(locate(f"tiny-flux/{model}")), HeldOutJudge.load(locate("judge/held_out.safetensors"))


def run(task: experiments.Task) -> experiments.Row:
    """One search and its verdicts; seconds are CPU time, of one thread."""
    pipe, judge = parts(task["model"])
    scene = shapes.parse(task["prompt"])
    prompt = FlowModel.encode(pipe, task["prompt"], guidance=2.0)
    recipe = RECIPES[task["model"]][task["method"]]
    problem = prompt.problem(shapes.CountReward(scene), recipe.kernel, times=recipe.times or prompt.times(10))
    start = time.process_time()
    found = search(
        problem,
        recipe.method(task["budget"]),
        max_nfe=task["budget"],
        generator=torch.Generator().manual_seed(task["seed"]),
    )
    seconds = time.process_time() - start
    picture = prompt.decode(found.best[None])
    return {
        "reward": round(found.reward, 5),
        "exact": bool(shapes.exact(scene, picture)[0]),
        "rss": int(shapes.residual(scene, picture)[0]),
        "held_out": bool(judge.exact(scene, picture)[0]),
        "nfe": found.nfe,
        "left": found.left,
        "reward_calls": found.reward_calls,
        "seconds": round(seconds, 3),
    }


def table(rows: list[experiments.Row]) -> str:
    """Markdown: a line for every level, method and budget; intervals are 95 %, clustered by prompt."""
    titles = {"exact": "exact", "held_out": "held-out exact", "rss": "mean RSS", "nfe": "NFE"}
    titles |= {"reward_calls": "reward calls", "seconds": "CPU s"}
    lines = experiments.table(rows, ["model", "level", "method", "budget"], list(titles))
    for field, digits in {"nfe": 0, "reward_calls": 0, "seconds": 2}.items():
        lines[field] = [f"{cost.mean:.{digits}f}" for cost in lines[field]]
    return markdown(lines.rename(columns=titles).reset_index())


def headlines(rows: list[experiments.Row]) -> str:
    """Markdown: the differences that matter most, paired by prompt and seed, on schnell."""
    frame, lines = pd.DataFrame(rows), []
    for level in ("hard", "held_out"):
        cells = dict(list(frame.query("model == 'schnell' and level == @level").groupby(["method", "budget"])))
        for first, second in (
            (("rbf", 250), ("best-of-n", 250)),
            (("refine", 100), ("best-of-n", 500)),
            (("refine", 250), ("rbf", 250)),
        ):
            if first not in cells or second not in cells:
                continue
            pairs = cells[first].merge(cells[second], on=["prompt", "seed"])
            difference = "{} at {} minus {} at {}".format(*first, *second)
            line: dict[str, Any] = {"level": level, "difference": difference, "runs": len(pairs)}
            for field, title in {"exact": "exact", "held_out": "held-out exact"}.items():
                gains = pairs[f"{field}_x"].astype(float) - pairs[f"{field}_y"].astype(float)
                line[title] = experiments.clustered_mean(gains, pairs["prompt"])
            lines.append(line)
    return markdown(pd.DataFrame(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    order = [
        (model, level, *run)
        for model in ("schnell", "dev")
        for level in ("easy", "hard", "held_out")
        for run in MAIN + DEV[4:] + REFINE + REGIONS + FIFTH + FEWER + LARGE + FOUR + CLOSE + REST + WIDE
    ]
    rows = experiments.read(PATH)
    if not args.print:
        rows = experiments.sweep(tasks(), run, PATH, workers=args.workers, title="runs")
    rows.sort(key=lambda r: order.index((r["model"], r["level"], r["method"], r["budget"])))
    main_rows = [r for r in rows if (r["method"], r["budget"]) in MAIN + DEV + REFINE]
    text = f"{PROMPTS} prompts of each level.\n\n{headlines(rows)}\n\n{table(main_rows)}"
    insert(locate("results") / "README.md", "results", text)
    print(table(rows))


if __name__ == "__main__":
    main()
