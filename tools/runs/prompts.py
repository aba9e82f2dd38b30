"""`python -m tools.runs.prompts`: write the prompt lists of data/prompts, always the same ones.

easy.txt      1 to 3 objects in one group, several wordings
hard.txt      5 to 10 objects in two groups of two or more, three quarters of them with a relation
held_out.txt  as hard.txt, no scene in common with it: for a last check of whatever was tuned on hard.txt
tune.txt      as hard.txt, no scene in common with the others: for choosing settings
test.txt      the same: for the stored tables. Nothing is tuned on it.
compose.txt   three groups of one or two objects; one colour and one shape come twice, half with a relation. The models
              were trained on no more than two groups. Nothing is tuned on it either.
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
    later = np.random.default_rng(2026)  # what was added later leaves the first lists as they are
    while len(hard) < 240:
        scene = shapes.random_scene(later, (5, shapes.MAX_OBJECTS), groups=2, relation=len(hard) % 4 != 3)
        if min(group.count for group in scene.groups) >= 2:
            hard.setdefault(scene, scene.caption())
    prompts = list(hard.values())
    names = ("hard", "held_out", "tune", "test")
    lists = {name: prompts[60 * k : 60 * (k + 1)] for k, name in enumerate(names)}
    return {"easy": easy, **lists, "compose": compose()}


def compose() -> list[str]:
    """Prompts that mix colours and shapes up, such as "a red circle left of two red squares and a blue circle"."""
    rng = np.random.default_rng(2027)
    scenes: dict[shapes.Scene, str] = {}
    while len(scenes) < 60:
        colours, kinds = rng.permutation(shapes.COLOURS)[:2], rng.permutation(shapes.SHAPES)[:2]
        pairs = [(colours[0], kinds[0]), (colours[0], kinds[1]), (colours[1], kinds[0])]
        groups = tuple(shapes.Group(int(rng.integers(1, 3)), *map(str, pairs[k])) for k in rng.permutation(3))
        relation = str(rng.choice(shapes.RELATIONS)) if len(scenes) % 2 else None
        scene = shapes.Scene(groups, relation)
        scenes.setdefault(scene, scene.caption())
    return list(scenes.values())


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, prompts in lists().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n")
        print(f"{name}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
