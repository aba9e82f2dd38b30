"""`python -m tools.runs.defaults`: what RBF's defaults rest on. Rows go to data/results/defaults.jsonl. Resumable.

RBF with several shares of the budget for first noises, numbers of chains and stopping rules, beside SVDD with the same
chains and first noises. tiny-flux schnell under the VP-SDE, as in the paper's table. Prompts of the tune list, so that
what is chosen on them can be reported on the test list: with `--test` the defaults and their SVDD run on that one, and
rows go to defaults_test.jsonl. `--print` runs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pandas as pd
import torch

from flowscale_lite import RBF, SVDD, BestOfEnough, FirstImprovement, experiments
from flowscale_lite.experiments import paper
from flowscale_lite.flux import FlowModel
from flowscale_lite.search import Method, search
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

from .parts import parts
from .tables import insert, markdown

PROMPTS = 50
FIRST = FirstImprovement()
METHODS: dict[str, Callable[[int], Method]] = {  # of the budget
    "rbf, a quarter, first improvement": lambda nfe: RBF(init=nfe // 4, rule=FIRST),
    "rbf, a tenth, first improvement": lambda nfe: RBF(init=nfe // 10, rule=FIRST),
    "rbf, a quarter, enough": lambda nfe: RBF(init=nfe // 4),
    "rbf, a tenth, enough": lambda nfe: RBF(init=nfe // 10),
    "rbf, a tenth, enough 12": lambda nfe: RBF(init=nfe // 10, rule=BestOfEnough(12)),
    "rbf, a tenth, two chains, enough": lambda nfe: RBF(init=nfe // 20, chains=2),
    "svdd, a quarter": lambda nfe: SVDD(chains=1, init=nfe // 4),
    "svdd, a tenth": lambda nfe: SVDD(chains=1, init=nfe // 10),
    "svdd, a tenth, two chains": lambda nfe: SVDD(init=nfe // 20),
}
DEFAULTS: dict[str, Callable[[int], Method]] = {
    "rbf, few step": RBF.few_step,
    "svdd, first noises of few step": lambda nfe: SVDD(chains=1, init=nfe // 4),
    "rbf": lambda nfe: RBF(),
    "svdd, first noises of rbf": lambda nfe: SVDD(chains=1, init=RBF().init),
}
PAIRS = [("rbf, few step", "svdd, first noises of few step"), ("rbf", "svdd, first noises of rbf")]
BUDGETS = (250, 500, 100)


def tasks(seeds: int, test: bool) -> list[experiments.Task]:
    """Every run: budget by budget, method by method."""
    prompts = locate("prompts/test.txt" if test else "prompts/tune.txt").read_text().splitlines()[:PROMPTS]
    return [
        {"budget": budget, "method": method, "prompt": prompt, "seed": seed}
        for seed in range(seeds)
        for budget in BUDGETS
        for method in (DEFAULTS if test else METHODS)
        for prompt in prompts
    ]


def run(task: experiments.Task) -> experiments.Row:
    """One search and its verdicts."""
    pipe, judge = parts("schnell")
    scene, prompt = shapes.parse(task["prompt"]), FlowModel.encode(pipe, task["prompt"], guidance=2.0)
    sampler = paper.SAMPLERS["VP-SDE"]
    problem = sampler.of(prompt.problem(counter.CountReward(scene), sampler.kernel))
    method = (METHODS | DEFAULTS)[task["method"]](task["budget"])
    found = search(problem, method, max_nfe=task["budget"], generator=torch.Generator().manual_seed(task["seed"]))
    picture = prompt.decode(found.best[None])
    return {
        "given": round(found.reward, 5),
        "exact": bool(counter.exact(scene, picture)[0]),
        "held_out": bool(judge.exact(scene, picture)[0]),
        "nfe": found.nfe,
    }


def table(rows: list[experiments.Row]) -> str:
    """Markdown: a line for every budget and method; intervals are 95 %, clustered by prompt."""
    titles = {"given": "given reward", "exact": "exact", "held_out": "held-out exact"}
    lines = experiments.table(rows, ["budget", "method"], list(titles))
    return markdown(lines.rename(columns=titles).reset_index())


def pairs(rows: list[experiments.Row]) -> str:
    """Markdown: each default minus SVDD with the same chains and first noises, paired by prompt and seed."""
    frame, lines = pd.DataFrame(rows), []
    for budget in sorted(BUDGETS):
        for names in PAIRS:
            ours, theirs = (frame[(frame.budget == budget) & (frame.method == name)] for name in names)
            judged = [experiments.paired_difference(ours, theirs, judge) for judge in ("exact", "held_out")]
            lines.append([budget, " - ".join(names), len(ours), *judged])
    titles = ["budget", "difference", "pairs", "by the counter", "by the held-out judge"]
    return markdown(pd.DataFrame(lines, columns=titles))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test", action="store_true", help="the defaults, on the test list")
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    name = "defaults_test" if args.test else "defaults"
    path = locate("results") / f"{name}.jsonl"
    rows = experiments.read(path)
    if not args.print:
        rows = experiments.sweep(tasks(args.seeds, args.test), run, path, workers=args.workers, title="runs")
    rows.sort(key=lambda r: (r["budget"], [*METHODS, *DEFAULTS].index(r["method"])))
    text = f"{table(rows)}\n\n{pairs(rows)}" if args.test else table(rows)
    insert(locate("results") / "README.md", name.replace("_", " "), text)
    print(text)


if __name__ == "__main__":
    main()
