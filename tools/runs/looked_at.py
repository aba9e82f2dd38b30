"""`python -m tools.runs.looked_at`: both judges against the eye, on 200 pictures of the models.

`--draw` writes the pictures to build/looked_at, on sheets of twenty with their prompts and no verdict, and the verdicts
of both judges to data/results/looked_at.jsonl. Whoever looks at the sheets writes the numbers of the pictures that show
exactly what the prompt asks for into data/results/looked_at.txt. Without `--draw` the three are compared.

The pictures are plain samples of both models for prompts of the tune list: a hundred that are right by the counter, and
a hundred that it finds nearly right (one object too many, too few or of another kind, or placed wrongly), shuffled.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from flowscale_lite import BestOfN, experiments, kernels, plots, search
from flowscale_lite.flux import FlowModel
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

from .parts import parts
from .tables import insert, markdown

PATH, EACH, A_SHEET, SAMPLES = locate("results") / "looked_at.jsonl", 100, 20, 16
SHEETS, EYE = Path("build/looked_at"), PATH.with_suffix(".txt")
Seen = tuple[experiments.Row, torch.Tensor]


def samples() -> Iterator[Seen]:
    """Pictures that are right or nearly right by the counter, with the verdicts of both judges."""
    for number, text in enumerate(locate("prompts/tune.txt").read_text().splitlines()):
        for model in ("schnell", "dev"):
            pipe, judge = parts(model)
            scene, prompt = shapes.parse(text), FlowModel.encode(pipe, text, guidance=2.0)
            problem = prompt.problem(counter.CountReward(scene), kernels.ode)
            generator = torch.Generator().manual_seed(1000 + number)
            found = search(problem, BestOfN(SAMPLES), max_nfe=10 * SAMPLES, generator=generator)
            pictures = prompt.decode(found.particles.x)
            verdicts: Any = zip(counter.exact(scene, pictures), judge.exact(scene, pictures), strict=True)
            for picture, (right, held_out), off in zip(
                pictures, verdicts, counter.residual(scene, pictures), strict=True
            ):
                if off <= 2:
                    row = {"model": model, "prompt": text, "counter": bool(right), "held_out": bool(held_out)}
                    yield row, picture


def draw() -> None:
    """The sheets, and a row for each picture."""
    rng, everything = np.random.default_rng(0), list(samples())
    chosen: list[Seen] = []
    for right in (True, False):
        some = [seen for seen in everything if seen[0]["counter"] == right]
        chosen += [some[i] for i in rng.permutation(len(some))[:EACH]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    SHEETS.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(chosen), A_SHEET):
        figure, axes = plt.subplots(4, 5, figsize=(15, 13))
        for i, ax in zip(range(first, first + A_SHEET), axes.flat, strict=True):
            row, picture = chosen[i]
            plots.picture(
                ax, picture, re.sub(r" (and|above|below|left of|right of) ", r"\n\1 ", f"{i}: {row['prompt']}")
            )
        figure.savefig(SHEETS / f"{first:03}.png", dpi=80, bbox_inches="tight")
        plt.close(figure)
    PATH.write_text("".join(json.dumps({"picture": i} | row) + "\n" for i, (row, _) in enumerate(chosen)))


def table() -> str:
    """Markdown: how often each judge says what the eye says."""
    rows, eye = pd.DataFrame(experiments.read(PATH)), {int(number) for number in EYE.read_text().split()}
    right = rows["picture"].isin(eye)
    lines = []
    for judge, title in {"counter": "exact counter", "held_out": "held-out judge"}.items():
        line = {
            "judge": title,
            "pictures": len(rows),
            "right by eye": right.sum(),
            "right by the judge": rows[judge].sum(),
        }
        line |= {"judge right, eye not": (rows[judge] & ~right).sum()}
        lines.append(line | {"eye right, judge not": (right & ~rows[judge]).sum()})
    return markdown(pd.DataFrame(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the sheets and judge the pictures anew")
    if parser.parse_args().draw:
        draw()
    insert(locate("results") / "README.md", "looked at", table())
    print(table())


if __name__ == "__main__":
    main()
