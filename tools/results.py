"""`python -m tools.results`: the table of the README. Resumable; rows go to data/results/start.jsonl.

Easy and hard prompts, three seeds, ten steps: plain sample, best-of-N and RBF at 100, 250 and 500 NFE. Accuracy by the
exact counter that the reward is built on, and by the held-out judge that no method sees.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import torch

from flowscale_lite import assets, experiments, kernels, schedules, shapes
from flowscale_lite.held_out import HeldOutJudge
from flowscale_lite.methods import RBF, BestOfN
from flowscale_lite.pipelines import Prompt, load
from flowscale_lite.search import Method, search

BUDGETS = (100, 250, 500)


def tasks(model: str, prompts: int, seeds: int) -> list[experiments.Task]:
    """Every run of the table."""
    cells = [("plain", 10), *(("best-of-n", n) for n in BUDGETS), *(("rbf", n) for n in BUDGETS)]
    return [
        {"model": model, "level": level, "prompt": prompt, "seed": seed, "method": method, "budget": budget}
        for level in ("easy", "hard")
        for prompt in assets.data(f"prompts/{level}.txt").read_text().splitlines()[:prompts]
        for seed in range(seeds)
        for method, budget in cells
    ]


@functools.cache
def parts(model: str) -> tuple[Any, HeldOutJudge]:
    """Pipeline and held-out judge, loaded once a process."""
    torch.set_num_threads(1)  # as many processes as cores instead
    return load(assets.data(f"tiny-flux/{model}")), HeldOutJudge.load(assets.data("judge/held_out.safetensors"))


def run(task: experiments.Task) -> experiments.Row:
    """One search and its verdicts."""
    pipe, judge = parts(task["model"])
    scene = shapes.parse(task["prompt"])
    prompt = Prompt.encode(pipe, task["prompt"], guidance=2.0)
    if task["method"] == "rbf":
        method: Method = RBF.multi_step(task["budget"])
        kernel, times = kernels.gaussian(), schedules.logit_normal(10)
    else:
        method, kernel, times = BestOfN(), kernels.ode, prompt.times(10)
    start = time.perf_counter()
    found = search(
        prompt.problem(shapes.CountReward(scene), kernel, times=times),
        method,
        max_nfe=task["budget"],
        generator=torch.Generator().manual_seed(task["seed"]),
    )
    seconds = time.perf_counter() - start
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
    lines = [
        "| prompts | method | budget | exact | held-out exact | mean RSS | NFE | reward calls | seconds |",
        "|---" * 9 + "|",
    ]
    for level, method, budget in dict.fromkeys((r["level"], r["method"], r["budget"]) for r in rows):
        cell = [r for r in rows if (r["level"], r["method"], r["budget"]) == (level, method, budget)]
        clusters = [r["prompt"] for r in cell]
        exact, held_out, rss = (
            experiments.clustered_mean([float(r[k]) for r in cell], clusters) for k in ("exact", "held_out", "rss")
        )
        nfe, calls, seconds = (sum(r[k] for r in cell) / len(cell) for k in ("nfe", "reward_calls", "seconds"))
        lines.append(
            f"| {level} | {method} | {budget} | {exact} | {held_out} | {rss} "
            f"| {nfe:.0f} | {calls:.0f} | {seconds:.2f} |"
        )
    return "\n".join(lines)


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
    parser.add_argument("--prompts", type=int, default=50, help="of each level")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    path = Path("data/results/start.jsonl")
    rows = experiments.sweep(tasks("dev", args.prompts, args.seeds), run, path, workers=args.workers, title="runs")
    text = table(rows)
    insert(
        Path("README.md"), "results", f"{args.prompts} prompts of each level, seeds a prompt: {args.seeds}.\n\n{text}"
    )
    print(text)


if __name__ == "__main__":
    main()
