"""`python -m tools.runs.preview`: what tiny-flux's small decoder saves a search, and whether verdicts stay the same.

RBF at 250 NFE on schnell, on prompts of the tune list, by the full decoder and by the preview in turn, so that the
machine is as busy for both. A third search decodes every look-ahead both ways and goes on by the full one. Rows go to
data/results/preview.jsonl. Resumable. `--print` runs nothing.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from flowscale_lite import RBF, experiments
from flowscale_lite.experiments import paper
from flowscale_lite.flux import FlowModel, hub
from flowscale_lite.search import search
from flowscale_lite.tiny import shapes
from flowscale_lite.tiny.data import locate

from .results import parts
from .tables import insert, markdown

PATH, NFE, PROMPTS, SEEDS = locate("results") / "preview.jsonl", 250, 50, (0,)


def tasks() -> list[experiments.Task]:
    """Every run: seed by seed, prompt by prompt."""
    prompts = locate("prompts/tune.txt").read_text().splitlines()[:PROMPTS]
    decoders = ("full", "preview", "both")
    return [{"decoder": d, "prompt": prompt, "seed": seed} for seed in SEEDS for prompt in prompts for d in decoders]


@functools.cache
def small() -> Any:
    """The small decoder, loaded once a process."""
    return hub.preview(locate("tiny-flux/preview"))


def run(task: experiments.Task) -> experiments.Row:
    """One search and its verdicts on the full picture; seconds are CPU time of one thread.

    `looked` are the look-aheads that were decoded both ways, `same` those of the same verdict (exact or not) and
    `same_counts` those in which the same objects were counted.
    """
    pipe, judge = parts("schnell")
    scene = shapes.parse(task["prompt"])
    preview = None if task["decoder"] == "full" else small()
    model = FlowModel.encode(pipe, task["prompt"], guidance=2.0, preview=preview)
    sampler, judged = paper.SAMPLERS["VP-SDE"], shapes.CountReward(scene)
    problem = sampler.of(model.problem(judged, sampler.kernel))
    same = {"looked": 0, "same": 0, "same_counts": 0}

    def both(x: Tensor) -> Tensor:
        pictures, previews = model.decode(x), model.decode(x, preview=True)
        same["looked"] += len(x)
        same["same"] += int((shapes.exact(scene, pictures) == shapes.exact(scene, previews)).sum())
        same["same_counts"] += int((shapes.count(pictures) == shapes.count(previews)).all(1).sum())
        return judged(pictures)

    if task["decoder"] == "both":
        problem = replace(problem, reward=both)
    start = time.process_time()
    found = search(problem, RBF.few_step(NFE), max_nfe=NFE, generator=torch.Generator().manual_seed(task["seed"]))
    seconds = time.process_time() - start
    picture = model.decode(found.best[None])
    verdicts = {"exact": bool(shapes.exact(scene, picture)[0]), "held_out": bool(judge.exact(scene, picture)[0])}
    return verdicts | {"nfe": found.nfe, "seconds": round(seconds, 3)} | same


def table(rows: list[experiments.Row]) -> str:
    """Markdown: seconds and successes of a search by either decoder, and the share of look-aheads judged alike."""
    frame = pd.DataFrame(rows)
    sides = {name: frame[frame.decoder == name] for name in ("full", "preview", "both")}
    lines = []
    for name in ("full", "preview"):
        of = sides[name]
        judged = (experiments.clustered_mean(of[judge], of.prompt) for judge in ("exact", "held_out"))
        lines.append([name, len(of), f"{of.seconds.mean():.2f}", *judged])
    saved = 1 - sides["preview"].seconds.mean() / sides["full"].seconds.mean()
    differences = (
        experiments.paired_difference(sides["preview"], sides["full"], judge) for judge in ("exact", "held_out")
    )
    lines.append(["preview - full", len(sides["full"]), f"-{saved:.0%}", *differences])
    totals = sides["both"][["looked", "same", "same_counts"]].sum()
    alike, counted = totals.same / totals.looked, totals.same_counts / totals.looked
    said = f"Of {totals.looked:,} look-aheads {alike:.2%} get the same verdict by both decoders, exact or not, and in "
    said += f"{counted:.1%} the same objects are counted."
    titles = ["decoder", "runs", "CPU s", "exact", "held-out exact"]
    return f"{markdown(pd.DataFrame(lines, columns=titles))}\n\n{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    rows = experiments.read(PATH)
    if not args.print:
        rows = experiments.sweep(tasks(), run, PATH, workers=args.workers, title="runs")
    insert(locate("results") / "README.md", "preview", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
