"""`python -m tools.runs.paper`: the paper's table on tiny-flux schnell; rows go to data/results/paper.jsonl. Resumable.

Every method of the paper under the ODE, the linear SDE and the VP-SDE, with the settings of `experiments.paper`: 500
NFE, 10 steps, 50 prompts of the test list, three seeds. Then controls with the same first noises, and the task of a
differentiable reward: as much ink of each colour as the objects asked for hold, with and without gradients. Seeds come
one after the other, so that an unfinished table is of use. `--print` runs nothing and writes the tables of what has
been run so far, and, once all has, which of the paper's orderings they show.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pandas as pd
import torch

from flowscale_lite import RBF, experiments
from flowscale_lite.experiments import paper
from flowscale_lite.flux import FlowModel
from flowscale_lite.search import Method, search
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

from .parts import parts
from .tables import insert, markdown

PATH, PROMPTS, SEEDS = locate("results") / "paper.jsonl", 50, (0, 1, 2)
STOCHASTIC = ("smc", "code", "svdd", "rbf")  # the others can run the ODE
OURS: dict[str, Method] = {"rbf, default": RBF(init=paper.NFE // 4), "rbf, few step": RBF.few_step(paper.NFE)}
METHODS = paper.METHODS | paper.CONTROLS | paper.GUIDED | OURS

# Reward, sampler and methods.
CELLS: list[tuple[str, str, tuple[str, ...]]] = [
    ("count", "ODE", ("best-of-n", "search over paths")),
    ("count", "VP-SDE", (*STOCHASTIC, "svdd, 25 first noises")),
    ("count", "linear SDE", STOCHASTIC),
    ("count", "VP-SDE", ("rbf, few step", "rbf, default", "best-of-n", "svdd, one chain, 50 first noises")),
    ("ink", "VP-SDE", (*paper.GUIDED, "plain", "best-of-n", "svdd, 25 first noises")),
    ("count", "VP-SDE, on VP", ("svdd, 25 first noises", "rbf")),
    ("count", "linear SDE", ("svdd, 25 first noises", "best-of-n")),
    ("count", "VP-SDE", ("code, 25 first noises",)),
]


def tasks() -> list[experiments.Task]:
    """Every run: seed by seed, cell by cell, prompt by prompt."""
    prompts = locate("prompts/test.txt").read_text().splitlines()[:PROMPTS]
    return [
        {"reward": reward, "sampler": sampler, "method": method, "prompt": prompt, "seed": seed}
        for seed in SEEDS
        for reward, sampler, methods in CELLS
        for method in methods
        for prompt in prompts
    ]


def run(task: experiments.Task) -> experiments.Row:
    """One search and its verdicts; seconds are CPU time of one thread; `drawn` are the particles drawn at each step."""
    pipe, judge = parts("schnell")
    scene, prompt = shapes.parse(task["prompt"]), FlowModel.encode(pipe, task["prompt"], guidance=2.0)
    reward: Any = counter.CountReward(scene) if task["reward"] == "count" else counter.ink_as_asked(scene)
    sampler = paper.SAMPLERS[task["sampler"]]
    problem = sampler.of(prompt.problem(reward, sampler.kernel))
    generator, start = torch.Generator().manual_seed(task["seed"]), time.process_time()
    found = search(problem, METHODS[task["method"]], max_nfe=paper.NFE, generator=generator)
    seconds = time.process_time() - start
    picture = prompt.decode(found.best[None])
    return {
        "given": round(found.reward, 5),
        "exact": bool(counter.exact(scene, picture)[0]),
        "rss": int(counter.residual(scene, picture)[0]),
        "held_out": bool(judge.exact(scene, picture)[0]),
        "nfe": found.nfe,
        "reward_calls": found.reward_calls,
        "gradients": found.gradients,
        "drawn": [step.drawn for step in found.trace],
        "seconds": round(seconds, 3),
    }


def table(rows: list[experiments.Row]) -> str:
    """Markdown: a line for every reward, method and sampler; intervals are 95 %, clustered by prompt."""
    titles = {"given": "given reward", "exact": "exact", "held_out": "held-out exact", "nfe": "NFE"}
    titles |= {"reward_calls": "reward calls", "seconds": "CPU s"}
    lines = experiments.table(rows, ["reward", "method", "sampler"], list(titles))
    for field, digits in {"nfe": 0, "reward_calls": 0, "seconds": 1}.items():
        lines[field] = [f"{cost.mean:.{digits}f}" for cost in lines[field]]
    return markdown(lines.rename(columns=titles).reset_index())


VP, LINEAR, ON_VP = "VP-SDE", "linear SDE", "VP-SDE, on VP"
ORDERINGS = {
    "the VP-SDE is ahead of the linear SDE": [
        ((method, VP), (method, LINEAR)) for method in (*STOCHASTIC, "svdd, 25 first noises", "best-of-n")
    ],
    "the linear SDE is ahead of the ODE": [(("best-of-n", LINEAR), ("best-of-n", "ODE"))],
    "RBF is first": [
        *((("rbf", VP), (method, VP)) for method in ("smc", "svdd", "code", "svdd, 25 first noises")),
        (("rbf", LINEAR), ("svdd, 25 first noises", LINEAR)),
        (("rbf", ON_VP), ("svdd, 25 first noises", ON_VP)),
    ],
    "search over paths is ahead of best-of-N": [(("search over paths", "ODE"), ("best-of-n", "ODE"))],
    "every particle method is ahead of search over paths": [
        ((method, VP), ("search over paths", "ODE")) for method in STOCHASTIC
    ],
}


def orderings(rows: list[experiments.Row]) -> str:
    """Markdown: what the paper finds, the paired differences here by both judges, and whether they show it."""
    frame = pd.DataFrame(rows)
    cells = dict(list(frame[frame.reward == "count"].groupby(["method", "sampler"])))
    lines = []
    for ordering, pairs in ORDERINGS.items():
        for ahead, behind in pairs:
            sides = cells[ahead], cells[behind]
            both = [experiments.paired_difference(*sides, judge) for judge in ("exact", "held_out")]
            shown = "yes" if min(d.low for d in both) > 0 else "reversed" if max(d.high for d in both) < 0 else "no"
            names = " - ".join(f"{method} ({sampler})" for method, sampler in (ahead, behind))
            lines.append([ordering, names, *both, shown])
    titles = ["the paper finds", "difference", "by the counter", "by the held-out judge", "shown here"]
    return markdown(pd.DataFrame(lines, columns=titles))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    rows = experiments.read(PATH)
    if not args.print:
        rows = experiments.sweep(tasks(), run, PATH, workers=args.workers, title="runs")
    names = [*METHODS]
    rows.sort(key=lambda r: (r["reward"], names.index(r["method"]), [*paper.SAMPLERS].index(r["sampler"])))
    insert(locate("results") / "README.md", "paper", table(rows))
    print(table(rows))
    if len(rows) == len(tasks()):
        insert(locate("results") / "README.md", "orderings", orderings(rows))
        print(orderings(rows))


if __name__ == "__main__":
    main()
