"""`python -m tools.runs.prompts`: write the prompt lists of data/prompts, always the same ones.

easy.txt      1 to 3 objects in one group, several wordings
hard.txt      5 to 10 objects in two groups of two or more, three quarters of them with a relation
held_out.txt  as hard.txt, no scene in common with it: for a last check of whatever was tuned on hard.txt
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowscale_lite.tiny import shapes

FOLDER = Path("data/prompts")


def lists() -> dict[str, list[str]]:
    """The prompts of every list."""
    rng = np.random.default_rng(2025)
    easy: list[str] = []
    while len(easy) < 60:
        prompt = shapes.random_scene(rng, (1, 3), groups=1).wording(rng)
        easy += [prompt] if prompt not in easy else []
    hard: dict[shapes.Scene, str] = {}
    while len(hard) < 120:
        scene = shapes.random_scene(rng, (5, shapes.MAX_OBJECTS), groups=2, relation=len(hard) % 4 != 3)
        if min(group.count for group in scene.groups) >= 2:
            hard.setdefault(scene, scene.caption())
    prompts = list(hard.values())
    return {"easy": easy, "hard": prompts[:60], "held_out": prompts[60:]}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, prompts in lists().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n")
        print(f"{name}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
