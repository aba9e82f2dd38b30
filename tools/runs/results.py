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
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowscale_lite import experiments, kernels, schedules
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
    Refine,
    SearchOverPaths,
    ZeroOrder,
)
from flowscale_lite.schedules import Times
from flowscale_lite.search import Method, search
from flowscale_lite.tiny import shapes
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import HeldOutJudge

PATH = Path("data/results/search.jsonl")
PROMPTS, SEEDS, BUDGETS = 50, 3, (100, 250, 500)


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
        "smc": Recipe(lambda nfe: SMC(tau=0.5), *VP),
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
MAIN = [("plain", 10), *(("best-of-n", n) for n in BUDGETS), *(("rbf", n) for n in BUDGETS)]
LARGE = [("rbf, best of enough", 500), ("rbf, equal quotas", 500)]  # which are the same up to 250
FEWER = [("rbf, enough 16", 250), ("rbf, enough 16", 500)]
APART = {*RECIPES["dev"], "rbf", "rbf, equal quotas", "rbf, enough 16"}  # which have lists of their own
DEV = [("beam" if method == "rbf" else method, n) for method, n in MAIN]  # the method that suits a multi-step model
OTHERS = [(m, 250) for m in RECIPES["schnell"] if m not in APART and "refine" not in m]
OTHERS += [("best-of-n, 4 steps", 100), ("best-of-n, 4 steps", 500), ("svdd", 100)]
CLOSE = [(method, 250) for method in ("smc", "svdd", "code", "beam, narrowing")]
REFINE = [("refine", n) for n in BUDGETS]
REGIONS = [(method, 100) for method in RECIPES["schnell"] if method.startswith("refine,")]
FIFTH = [("rbf, 2 t^2", 100)]  # against best-of-n at 500, as refine at 100 is
WIDE = [(method, n) for n in (50, 1000) for method in ("best-of-n", "rbf", "refine")]
CHECK = [("plain", 10), ("best-of-n", 250), ("rbf", 250), ("best-of-n", 500), *FIFTH, *REFINE[:2]]
AGAIN = [("best-of-n", 500), ("refine", 100)]  # CHECK is of prompts and a seed that nothing was tuned on, so is this


def tasks() -> list[experiments.Task]:
    """Every run, the most telling first, so that an unfinished sweep is of use."""
    cells = [("schnell", "hard", seed, runs) for runs in (MAIN, REFINE, FIFTH) for seed in range(SEEDS)]
    cells += [("schnell", "held_out", 7, CHECK)] + [("schnell", "held_out", seed, AGAIN) for seed in (8, 9)]
    cells += [("schnell", "hard", 0, REGIONS), ("dev", "hard", 0, REFINE[1:2])]
    cells += [("schnell", "hard", 0, OTHERS)] + [("schnell", "easy", seed, MAIN) for seed in range(SEEDS)]
    cells += [("dev", "easy", 0, DEV), ("dev", "hard", 0, DEV), ("dev", "held_out", 7, [DEV[0], DEV[2], DEV[5]])]
    cells += [("schnell", "hard", 0, WIDE)] + [("schnell", "hard", seed, CLOSE) for seed in range(1, SEEDS)]
    cells += [("dev", "hard", seed, DEV) for seed in range(1, SEEDS)]
    cells += [("schnell", "hard", seed, LARGE) for seed in range(SEEDS)]
    rest = [run for run in OTHERS if run not in CLOSE]
    cells += [("schnell", "hard", seed, rest) for seed in range(1, SEEDS)]
    cells += [("schnell", "hard", seed, FEWER) for seed in range(SEEDS)]
    return [
        {"model": model, "level": level, "prompt": prompt, "seed": seed, "method": method, "budget": budget}
        for model, level, seed, runs in cells
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
    names = {"exact": "exact", "held_out": "held-out exact", "rss": "mean RSS"}
    costs = {"nfe": ("NFE", 0), "reward_calls": ("reward calls", 0), "seconds": ("CPU s", 2)}
    lines = []
    for line in experiments.table(rows, ["model", "level", "method", "budget"], [*names, *costs]):
        shown = {k: line[k] for k in ("model", "level", "method", "budget", "runs")}
        shown |= {title: str(line[k]) for k, title in names.items()}
        lines.append(shown | {title: f"{line[k].mean:.{digits}f}" for k, (title, digits) in costs.items()})
    return experiments.markdown(lines)


def headlines(rows: list[experiments.Row]) -> str:
    """Markdown: the differences that matter most, paired by prompt and seed, on schnell."""
    pairs = [(("rbf", 250), ("best-of-n", 250)), (("refine", 100), ("best-of-n", 500)), (("refine", 250), ("rbf", 250))]
    lines: list[experiments.Row] = []
    for level in ("hard", "held_out"):
        for first, second in pairs:
            a, b = (
                {
                    (r["prompt"], r["seed"]): r
                    for r in rows
                    if (r["model"], r["level"], r["method"], r["budget"]) == ("schnell", level, *cell)
                }
                for cell in (first, second)
            )
            shared = sorted(a.keys() & b.keys())
            ours, theirs = [a[key] for key in shared], [b[key] for key in shared]
            if shared:
                name = "{} at {} minus {} at {}".format(*first, *second)
                gaps = {
                    title: experiments.paired_difference(ours, theirs, field)
                    for title, field in (("exact", "exact"), ("held-out exact", "held_out"))
                }
                lines.append({"level": level, "difference": name, "runs": len(shared)} | gaps)
    return experiments.markdown(lines)


def insert(page: Path, name: str, text: str) -> None:
    """Put text between the page's `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page lacks the marks.
    """
    before, mark, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not mark or not end:
        raise ValueError(f"{page} has no <!-- {name} --> ... <!-- /{name} --> to write between")
    page.write_text(before + mark + text.rstrip() + "\n" + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    order = [
        (m, level, *cell)
        for m in ("schnell", "dev")
        for level in ("easy", "hard", "held_out")
        for cell in MAIN + DEV[4:] + REFINE + REGIONS + FIFTH + FEWER + LARGE + OTHERS + WIDE
    ]
    rows = experiments.read(PATH)
    if not args.print:
        rows = experiments.sweep(tasks(), run, PATH, workers=args.workers, title="runs")
    rows.sort(key=lambda r: order.index((r["model"], r["level"], r["method"], r["budget"])))
    main_rows = [r for r in rows if (r["method"], r["budget"]) in MAIN + DEV + REFINE]
    insert(Path("README.md"), "results", f"{PROMPTS} prompts of each level.\n\n{headlines(rows)}\n\n{table(main_rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
