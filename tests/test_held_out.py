"""The held-out judge reads renders and stays apart from the counter."""

import ast
from pathlib import Path

import numpy as np
import pytest
from conftest import seeded

from flowscale_lite import BestOfN, kernels, search
from flowscale_lite.flux import FlowModel, load
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import EMPTY, HeldOutJudge
from flowscale_lite.tiny.shapes import Group, Scene
from tools.train.judge import training_batch


@pytest.fixture(scope="module")
def judge():
    return HeldOutJudge.load(locate("judge/held_out.safetensors"))


def test_judge_reads_new_renders(judge):
    rng = np.random.default_rng(123)
    scenes = [shapes.random_scene(rng) for _ in range(300)]
    counts = judge.counts(shapes.to_tensor(shapes.render(scenes, rng)))
    assert (counts == np.stack([scene.target for scene in scenes])).all(1).mean() >= 0.99


def test_judge_reads_three_groups(judge):
    rng = np.random.default_rng(7)
    scenes = [shapes.parse(prompt) for prompt in locate("prompts/compose.txt").read_text().splitlines()]
    right = [judge.exact(s, shapes.to_tensor(shapes.render([s] * 5, rng))).mean() for s in scenes]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_judge_knows_relations(judge, relation):
    scene = Scene((Group(3, "red", "circle"), Group(2, "blue", "square")), relation)
    images = shapes.to_tensor(shapes.render([scene] * 40, np.random.default_rng(0)))
    assert judge.exact(scene, images).mean() >= 0.95
    assert judge.exact(Scene(scene.groups[::-1], relation), images).mean() == 0


def test_judge_and_counter_mean_the_same_by_a_relation(judge):
    """On pictures of the model that both count right, some of which the counter would call related by any distance."""
    pipe, rng, related = load(locate("tiny-flux/dev")), np.random.default_rng(5), []
    for seed in range(40):
        scene = shapes.random_scene(rng, (3, 8), groups=2, relation=True)
        prompt = FlowModel.encode(pipe, scene.caption(), guidance=2.0)
        problem = prompt.problem(counter.CountReward(scene), kernels.ode)
        drawn = search(problem, BestOfN(8), max_nfe=80, generator=seeded(seed)).particles.x
        images = prompt.decode(drawn)
        both = (judge.counts(images) == scene.target).all(1) & (counter.residual(scene, images) == 0)
        related += zip(judge.exact(scene, images[both]), counter.exact(scene, images[both]), strict=True)
    seen, counted = np.array(related).T
    assert len(seen) > 100 and 10 < seen.sum() < len(seen) - 10
    assert (seen == counted).all()


def test_labels_say_what_was_drawn():
    images, labels = training_batch(50, seed=1)
    drawn = (labels != EMPTY).flatten(1).sum(1).numpy()
    assert (np.abs(counter.count(images.clamp(0, 1)).sum(1) - drawn) <= 2).mean() > 0.9


def test_judge_and_counter_share_no_eyes():
    """The judge imports what draws and names things, nothing that looks at pictures."""
    source = (Path(__file__).parents[1] / "flowscale_lite" / "tiny" / "judge.py").read_text()
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    used = {name.name for n in imports for name in n.names} | {getattr(n, "module", None) for n in imports}
    assert "shapes" in used and "counter" not in used
