"""`python -m tools.runs.card`: measure both variants of tiny-flux and write the table into its card.

Random scenes the training never saw, in plain wording, one sample each by the deterministic flow; counted by the
exact counter and by the held-out judge. Rows go to data/results/tiny_flux.jsonl.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from flowscale_lite import experiments
from flowscale_lite.flux import load
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import HeldOutJudge

from .tables import insert, markdown

SETTINGS = [("dev", 4, 2.0), ("dev", 10, 1.0), ("dev", 10, 2.0), ("dev", 10, 3.5), ("dev", 40, 2.0)]
SETTINGS += [("schnell", steps, 0.0) for steps in (1, 2, 4, 10)]
SIZES = ((1, 3), (4, 6), (7, 10))


@functools.cache
def parts(variant: str) -> tuple[Any, HeldOutJudge]:
    """Pipeline and judge, loaded once a process."""
    torch.set_num_threads(1)
    return load(locate(f"tiny-flux/{variant}")), HeldOutJudge.load(locate("judge/held_out.safetensors"))


def run(task: experiments.Task) -> experiments.Row:
    """One sample and its verdicts."""
    pipe, judge = parts(task["variant"])
    scene = shapes.parse(task["prompt"])
    image = pipe(
        task["prompt"],
        height=64,
        width=64,
        num_inference_steps=task["steps"],
        guidance_scale=task["guidance"],
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(task["seed"]),
        output_type="pt",
    ).images
    return {
        "objects": scene.total,
        "exact": bool(counter.exact(scene, image)[0]),
        "held_out": bool(judge.exact(scene, image)[0]),
        "rss": int(counter.residual(scene, image)[0]),
    }


def tasks(number: int) -> list[experiments.Task]:
    """Every sample of the table."""
    rng = np.random.default_rng(7)
    prompts = [shapes.random_scene(rng).caption() for _ in range(number)]
    return [
        {"variant": variant, "steps": steps, "guidance": guidance, "prompt": prompt, "seed": seed}
        for variant, steps, guidance in SETTINGS
        for seed, prompt in enumerate(prompts)
    ]


def table(rows: list[experiments.Row]) -> str:
    """Markdown: a line for every variant, number of steps and guidance."""
    frame, fields = pd.DataFrame(rows), ["variant", "steps", "guidance"]
    lines = experiments.table(frame, fields, ["exact", "held_out", "rss"], clusters="seed")
    for low, high in SIZES:
        some = frame[frame["objects"].between(low, high)]
        lines[f"{low} to {high} objects"] = some.groupby(fields)["exact"].mean().map("{:.2f}".format)
    lines["mean RSS"] = [f"{rss.mean:.1f}" for rss in lines["rss"]]
    lines = lines.reset_index().replace({"guidance": {0.0: "none"}}).rename(columns={"held_out": "held-out exact"})
    sizes = [f"{low} to {high} objects" for low, high in SIZES]
    return markdown(lines[[*fields, "exact", *sizes, "held-out exact", "mean RSS"]])


def main() -> None:
    path = locate("results") / "tiny_flux.jsonl"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    scenes = parser.parse_args().scenes
    rows = experiments.sweep(tasks(scenes), run, path, workers=2, title="tiny-flux")
    insert(Path("data/tiny-flux/README.md"), "measured", f"Scenes: {scenes}.\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
