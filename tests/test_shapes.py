"""Drawing, captions, the exact counter and the smooth reward."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.counter import CountReward
from flowscale_lite.tiny.shapes import Group, Scene
from tools.runs import prompts


def scenes(number: int, seed: int = 0, **kwargs) -> tuple[list[Scene], np.random.Generator]:
    rng = np.random.default_rng(seed)
    return [shapes.random_scene(rng, **kwargs) for _ in range(number)], rng


def targets(items: list[Scene]) -> np.ndarray:
    return np.stack([scene.target for scene in items])


@pytest.mark.parametrize("blur", [0.0, 0.9])
def test_counter_is_exact_on_renders_also_after_a_slight_blur(blur):
    items, rng = scenes(400)
    pictures = shapes.render(items, rng).astype(float)
    pictures = ndimage.gaussian_filter(pictures, (0, blur, blur, 0)).round().astype(np.uint8)
    right = (counter.count(shapes.to_tensor(pictures)) == targets(items)).all(1)
    assert right.mean() >= 0.995


def test_objects_never_touch():
    items, rng = scenes(200, objects=(10, 10))
    ink = shapes.render(items, rng).min(3) < 200
    assert [ndimage.label(picture, np.ones((3, 3)))[1] for picture in ink] == [10] * 200


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_every_wording_is_read_back(seed):
    rng = np.random.default_rng(seed)
    scene = shapes.random_scene(rng)
    read = shapes.parse(scene.wording(rng))
    assert (read.target == scene.target).all() and read.relation == scene.relation
    assert shapes.parse(scene.caption()) == scene


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a sunny day", "no known object"),
        ("two red cats", "no known object"),
        ("six red circles and five blue squares", "at most 10"),
        ("a red circle and a blue square and a green square and a red square", "one to three groups"),
        ("a red circle and two blue squares left of a green square", "only stand between the first two"),
        ("one red circle and two red circles", "different kinds"),
        ("three red circles and two purple squares", "not understood: two, purple, squares"),
        ("eleven red circles and two blue squares", "not understood: eleven, red, circles"),
        ("three light red circles and one blue square", "not understood: three, light, red, circles"),
        ("1.5 red circles and a blue square", "not understood: 1.5, red, circles"),
        ("-3 red circles and a blue square", "not understood: -3, red, circles"),
        ("twenty one red circles", "not understood: twenty"),
        ("two red squares not left of two blue circles", "not understood: not"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        shapes.parse(prompt)


def test_groups_and_pictures_that_cannot_be_are_refused():
    for group in ((0, "red", "circle"), (11, "red", "circle"), (1, "pink", "circle")):
        with pytest.raises(ValueError, match="a group is 1 to 10 objects"):
            Group(*group)
    for judge in (counter.count, CountReward(Scene((Group(3, "red", "circle"),)))):
        with pytest.raises(ValueError, match="pictures must be finite"):
            judge(torch.full((1, 3, 64, 64), torch.nan))


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_relations_are_drawn_and_judged(relation):
    scene = Scene((Group(3, "red", "circle"), Group(2, "blue", "square")), relation)
    images = shapes.to_tensor(shapes.render([scene] * 50, np.random.default_rng(0)))
    assert counter.exact(scene, images).all()
    assert (CountReward(scene)(images) > -0.01).all()
    opposite = shapes.to_tensor(shapes.render([Scene(scene.groups[::-1], relation)] * 50, np.random.default_rng(0)))
    assert (counter.residual(scene, opposite) == 0).all() and not counter.exact(scene, opposite).any()
    assert (CountReward(scene)(opposite) < -0.5).all()


def test_three_groups_are_read_drawn_and_judged():
    for prompt in prompts.lists()["compose"]:
        scene = shapes.parse(prompt)
        assert len(scene.groups) == 3 and scene.caption() == prompt
        assert shapes.parse(scene.wording(np.random.default_rng(0))).relation == scene.relation
        images = shapes.to_tensor(shapes.render([scene] * 4, np.random.default_rng(0)))
        assert counter.exact(scene, images).all()
        if scene.relation:
            first, second, third = scene.groups
            other = Scene((second, first, third), scene.relation)
            assert not counter.exact(other, images).any() and counter.exact(Scene(scene.groups), images).all()


@pytest.mark.parametrize(("pixels", "cost"), [(3.2, 0.6), (0.0, 1.0), (-3.2, 1.4), (16.0, 0.0)])
def test_a_relation_costs_each_object_what_its_distance_lacks_of_half_a_cell(pixels, cost):
    """Two objects, so twice (8 - pixels) / 16. Stored results rest on the half."""
    red, blue = Group(1, "red", "circle"), Group(1, "blue", "square")
    column = 1 + (pixels > 8)  # 16 pixels are one cell
    offset = 0 if pixels > 8 else pixels / 2
    centre = np.array([[8, 8 - offset], [8, 8 + offset]])
    layout = shapes.Layout(
        np.array([0, 0]), np.array([red.kind, blue.kind]), np.array([1, 8 + column]), centre, np.array([5.4, 5.4])
    )
    picture = shapes.to_tensor(shapes.draw(layout, 1))
    scene = Scene((red, blue), "left of")
    assert float(CountReward(scene)(picture)) == pytest.approx(-cost, abs=0.02)
    assert bool(counter.exact(scene, picture)[0]) == (cost == 0), "reward and verdict know the same relation"


def test_one_object_too_many_too_few_or_of_the_wrong_colour_or_shape_is_seen():
    scene = Scene((Group(3, "red", "circle"),))
    for wrong, rss in (
        (Scene((Group(2, "red", "circle"),)), 1),
        (Scene((Group(5, "red", "circle"),)), 4),
        (Scene((Group(3, "blue", "circle"),)), 18),
        (Scene((Group(3, "red", "square"),)), 18),
        (Scene((Group(3, "red", "circle"), Group(1, "green", "triangle"))), 1),
    ):
        images = shapes.to_tensor(shapes.render([wrong] * 20, np.random.default_rng(1)))
        assert (counter.residual(scene, images) == rss).all()
        assert torch.allclose(CountReward(scene)(images), torch.tensor(-float(rss)), atol=0.05)


def test_reward_rises_all_the_way_as_an_object_appears():
    """The reason for a smooth reward: the exact count jumps once, the reward answers to every bit of ink."""
    scene = Scene((Group(1, "green", "square"),))
    layout = shapes.arrange([scene], np.random.default_rng(0))
    faded = [shapes.draw(layout, 1, np.array([opacity])) for opacity in (*np.linspace(0.6, 0.85, 8), 1.0)]
    rewards = [float(CountReward(scene)(shapes.to_tensor(picture))) for picture in faded]
    assert all(b > a for a, b in pairwise(rewards)) and rewards[0] < -0.7 and rewards[-1] > -0.01


def test_half_an_object_and_a_blend_are_not_counted():
    layout = shapes.arrange([Scene((Group(1, "red", "square"),))], np.random.default_rng(0))
    picture = shapes.to_tensor(shapes.draw(layout, 1))
    row = int(np.flatnonzero((picture[0].min(0).values < 0.5).numpy().any(1)).mean())
    half = picture.clone()
    half[:, :, row:] = shapes.PAPER
    assert counter.count(picture).sum() == 1 and counter.count(half).sum() == 0


def test_rows_do_not_influence_one_another_and_blank_paper_holds_nothing():
    items, rng = scenes(12)
    images = torch.cat([shapes.to_tensor(shapes.render(items, rng)), torch.full((2, 3, 64, 64), shapes.PAPER)])
    reward = CountReward(items[0])
    assert torch.equal(reward(images), torch.cat([reward(image[None]) for image in images]))
    assert (counter.count(images)[-2:] == 0).all() and counter.count(images[-1:]).shape == (1, 12)


def test_ink_is_told_by_hue_and_gradients_pass():
    """A colour mixed with paper-like grey has its share of ink, in that colour's plane only."""
    share = torch.tensor([1.0, 0.5, 0.0])
    colours = torch.tensor(shapes.RGB).float()[:, :, None]
    pictures = (share * colours + (1 - share) * shapes.PAPER)[
        :, :, None
    ].requires_grad_()  # (4 colours, 3, 1, 3 shares)
    found = counter.ink(pictures)
    torch.testing.assert_close(found[:, :, 0], torch.eye(4)[:, :, None] * share, atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), pictures)
    assert slope.isfinite().all() and slope.abs().sum() > 0


def test_smooth_rewards_of_ink_and_colour_by_hand():
    items, rng = scenes(50)
    pictures = shapes.to_tensor(shapes.render(items, rng))
    asked = torch.cat([counter.ink_as_asked(scene)(image[None]) for scene, image in zip(items, pictures, strict=True)])
    assert asked.max() <= 0 and asked.mean() > -0.2, "true drawings hold the ink that is asked for"
    asked_of_paper = counter.ink_as_asked(Scene((Group(3, "red", "circle"), Group(1, "red", "square"))))
    blank = torch.full((2, 3, 64, 64), shapes.PAPER)
    torch.testing.assert_close(asked_of_paper(blank), torch.full((2,), -(((3 * 91 + 101) / 90) ** 2)))
    plain = torch.tensor([0.9, 0.4, 0.1]).view(1, 3, 1, 1).expand(2, 3, 8, 16)
    torch.testing.assert_close(counter.colourful(plain), torch.full((2,), 0.8 * 8 * 16 / 64))
    a, b = torch.zeros(2, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert (float(counter.apart(a, b)), float(counter.apart(torch.cat([a[:1], b])))) == pytest.approx((0.5, 0.5))


def test_prompt_lists_are_what_their_generator_writes():
    for name, expected in prompts.lists().items():
        assert (prompts.FOLDER / f"{name}.txt").read_text().splitlines() == expected
        assert len(set(expected)) == len(expected) >= 50
    hard, held_out = ({shapes.parse(p) for p in prompts.lists()[name]} for name in ("hard", "held_out"))
    assert not hard & held_out
    mixed = [shapes.parse(p).groups for p in prompts.lists()["compose"]]
    assert all(len({g.colour for g in groups}) == 2 == len({g.shape for g in groups}) for groups in mixed)
    assert all(5 <= scene.total <= 10 and len(scene.groups) == 2 for scene in hard | held_out)
