"""`python -m tools.runs.bench`: the stored runs of the bench, data/results/bench.jsonl. Resumable.

Every method of every track at 50, 100, 250 and 500 NFE, some at 1,000, on 50 prompts of the test list with three seeds.
`--print` runs nothing and writes the tables of what has been run so far into BENCH.md and README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from flowscale_lite import experiments
from flowscale_lite.experiments import bench
from flowscale_lite.tiny.data import locate

from .tables import insert, markdown

PATH = locate("results") / "bench.jsonl"
FIRST = [  # the most telling come first, so that an unfinished sweep is of use
    ("multi-step", ("best-of-n", "draft", "cascade"), (250, 100)),
    ("multi-step", ("best-of-n",), (500,)),
    ("few-step", ("best-of-n",), (500,)),
    ("few-step", ("refine",), (100,)),
    ("multi-step", ("draft", "cascade"), (50,)),
    ("few-step", ("refine",), (50,)),
    ("few-step", ("rbf", "refine", "svdd", "best-of-n"), (250,)),
    ("few-step", ("rbf", "svdd", "best-of-n"), (100,)),
    ("multi-step", ("refine",), (250, 100, 50)),
    ("multi-step", ("beam",), (250, 100)),
    ("few-step", ("rbf", "svdd", "best-of-n"), (50,)),
    ("compose", tuple(bench.TRACKS["compose"].entries), (100,)),
    ("differentiable", tuple(bench.TRACKS["differentiable"].entries), (100,)),
    ("few-step", ("best-of-n, 4 steps", "zero-order"), (250, 100)),
    ("few-step", ("best-of-n, 4 steps",), (500, 50)),
    ("multi-step", ("beam",), (500,)),
    ("few-step", ("rbf", "refine"), (500,)),
    ("few-step", ("best-of-n, 4 steps", "best-of-n"), (1000,)),
    ("few-step", ("refine, all regions", "refine, one region", "refine, 3 x 3 regions"), (100,)),
    ("multi-step", ("best-of-n", "beam"), (50,)),
    ("few-step", ("svdd", "zero-order"), (500,)),
    ("few-step", ("rbf", "refine"), (1000,)),
    ("few-step", ("rbf, published",), (250,)),
    ("multi-step", ("draft", "cascade", "refine"), (500,)),
    ("compose", tuple(bench.TRACKS["compose"].entries), (250,)),
    ("differentiable", tuple(bench.TRACKS["differentiable"].entries), (250,)),
]


def tasks() -> list[experiments.Task]:
    """Every run, those of FIRST first, each of its lines seed by seed."""
    wanted = [
        task
        for track, methods, budgets in FIRST
        for seed in bench.SEEDS
        for task in bench.tasks(track, methods, budgets, bench.PROMPTS, (seed,))
    ]
    for name, track in bench.TRACKS.items():
        wanted += bench.tasks(name, tuple(track.entries), bench.BUDGETS, bench.PROMPTS, bench.SEEDS)
    return list({tuple(task.values()): task for task in wanted}.values())


def table(rows: list[experiments.Row]) -> str:
    """Markdown: a line for every track, budget and method; intervals are 95 %, clustered by prompt."""
    tracks = [*bench.TRACKS]
    names = {name: i for track in bench.TRACKS.values() for i, name in enumerate(track.entries)}
    rows = sorted(rows, key=lambda r: (tracks.index(r["track"]), r["budget"], names[r["method"]]))
    titles = {"exact": "exact", "held_out": "held-out exact", "nfe": "NFE spent"}
    titles |= {"reward_calls": "reward calls", "seconds": "CPU s"}
    lines = experiments.table(rows, ["track", "budget", "method"], list(titles))
    for field, digits in {"nfe": 0, "reward_calls": 0, "seconds": 2}.items():
        lines[field] = [f"{cost.mean:.{digits}f}" for cost in lines[field]]
    return markdown(lines.rename(columns=titles).reset_index())


HEADLINE = [("few-step", "best-of-n, 4 steps", 500), ("few-step", "rbf", 250), ("few-step", "refine", 100)]
HEADLINE += [("multi-step", "best-of-n", 250), ("multi-step", "draft", 250)]


def headline(rows: list[experiments.Row]) -> str:
    """Markdown: the five rows of the README."""
    frame, lines = pd.DataFrame(rows), []
    for track, method, budget in HEADLINE:
        cell = frame.query("track == @track and method == @method and budget == @budget")
        line = {"model": f"tiny-flux {bench.TRACKS[track].model}", "method": method, "NFE": budget, "runs": len(cell)}
        for field, title in {"exact": "by the counter", "held_out": "by the held-out judge"}.items():
            line[title] = experiments.clustered_mean(cell[field], cell["prompt"]) if len(cell) else ""
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    rows = experiments.read(PATH)
    if not args.print:
        rows = experiments.sweep(tasks(), bench.run, PATH, workers=args.workers, title="runs")
    insert(Path("BENCH.md"), "bench", table(rows))
    insert(Path("README.md"), "headline", headline(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
