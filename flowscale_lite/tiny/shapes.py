"""The small data set: coloured shapes on a 64 x 64 canvas, their captions, and the exact and smooth counters.

A picture holds 1 to 10 objects in one or two groups. Objects sit on a jittered 4 x 4 grid, so they never touch, and the
truth about a picture (which objects, how many, where) is known when it is drawn. Everything here is numpy and scipy:
no model, no weights, so the counter cannot share a network's mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

SIZE = 64  # pixels a side
CELLS = 4  # cells a side
CELL = SIZE // CELLS
MAX_OBJECTS = 10
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
RGB = np.array([[0.86, 0.18, 0.18], [0.15, 0.62, 0.27], [0.16, 0.36, 0.86], [0.96, 0.76, 0.08]])
PAPER = 0.97  # grey level of the background
CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)  # 12 kinds of object
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
AXIS = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}  # relation -> axis, direction
RELATIONS = tuple(AXIS)
FRAMES = (
    "{}",
    "{}",
    "{}",
    "{}",
    "a picture of {}",
    "a drawing of {}",
    "an image with {}",
    "please draw {}",
    "there are {}",
    "{} on white paper",
)
RADIUS = np.array([[4.9, 5.9], [5.1, 6.2], [4.4, 5.2]])  # range for each shape, as of the circle of equal area
Array = NDArray[np.float64]


# ---------------------------------------------------------------------------------------------- scenes and captions
@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and one shape."""

    count: int
    colour: str
    shape: str

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_OBJECTS or (self.colour, self.shape) not in CLASSES:
            raise ValueError(f"a group is 1 to {MAX_OBJECTS} objects of a known colour and shape; got {self}")

    @property
    def kind(self) -> int:
        """Index into CLASSES."""
        return CLASSES.index((self.colour, self.shape))

    def words(self, number: str | None = None) -> str:
        number = number or ("a" if self.count == 1 else NUMBERS[self.count - 1])
        return f"{number} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one or two groups and, between two, optionally a relation (every pair obeys it)."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def target(self) -> NDArray[np.int64]:
        """Number of objects of each class, (12,)."""
        target = np.zeros(len(CLASSES), dtype=np.int64)
        for group in self.groups:
            target[group.kind] += group.count
        return target

    def caption(self) -> str:
        """The plain wording, e.g. "three red circles and two blue squares"."""
        return f" {self.relation or 'and'} ".join(group.words() for group in self.groups)

    def wording(self, rng: np.random.Generator) -> str:
        """One of many wordings: digits or words, order of the groups, frames such as "a picture of ..."."""

        def number(count: int) -> str:
            return str(rng.choice([NUMBERS[count - 1], str(count)] + ["a"] * (2 if count == 1 else 0)))

        groups = [group.words(number(group.count)) for group in self.groups]
        link = {
            None: str(rng.choice(["and", "and", "with"])),
            "left of": str(rng.choice(["left of", "to the left of"])),
            "right of": str(rng.choice(["right of", "to the right of"])),
        }.get(self.relation, self.relation)
        if self.relation is None:
            rng.shuffle(groups)
        return str(rng.choice(FRAMES)).format(f" {link} ".join(groups))


_GROUP = re.compile(
    rf"(?<![\w.-])(?P<number>an?|{'|'.join(NUMBERS)}|[1-9]|10)\s+(?P<colour>{'|'.join(COLOURS)})\s+(?P<shape>{'|'.join(SHAPES)})s?\b"
)


_FILLER = {*" ".join((*FRAMES, *RELATIONS)).split(), "and", "the", "to", "is", "show", "me", "photo", "exactly"}


def parse(prompt: str) -> Scene:
    """Read a prompt back into a Scene.

    Raises ValueError when it names no known object, more than two groups, one kind twice, too many objects, or holds a
    word that it does not understand: what is left out of the scene would be left out of the picture.
    """
    text = prompt.lower()
    found = list(_GROUP.finditer(text))
    if not found:
        raise ValueError(
            f"no known object in {prompt!r}: expected a number, a colour ({', '.join(COLOURS)}) and a shape "
            f"({', '.join(SHAPES)}), such as 'three red circles and two blue squares'"
        )
    groups = tuple(Group(_number(m["number"]), m["colour"], m["shape"]) for m in found)
    unknown = [word for word in re.findall(r"[\w.-]*\w", _GROUP.sub(" ", text)) if word not in _FILLER]
    if unknown:
        raise ValueError(f"{prompt!r} holds words that are not understood: {', '.join(unknown)}")
    if len(groups) > 2 or len({g.kind for g in groups}) < len(groups):
        raise ValueError(f"{prompt!r} names {len(groups)} groups: expected one or two groups of different kinds")
    between = text[found[0].end() : found[1].start()] if len(groups) == 2 else ""
    relation = next((r for r in RELATIONS if re.search(rf"\b{r}\b", between)), None)
    scene = Scene(groups, relation)
    if scene.total > MAX_OBJECTS:
        raise ValueError(f"{prompt!r} asks for {scene.total} objects: at most {MAX_OBJECTS} fit")
    return scene


def _number(word: str) -> int:
    if word in ("a", "an"):
        return 1
    return int(word) if word.isdigit() else NUMBERS.index(word) + 1


def random_scene(
    rng: np.random.Generator,
    objects: tuple[int, int] = (1, MAX_OBJECTS),
    groups: int | None = None,
    relation: bool | None = None,
) -> Scene:
    """A random scene of `objects` (from, to) objects; None leaves the number of groups and the relation to chance."""
    total = int(rng.integers(objects[0], objects[1] + 1))
    n_groups = groups or (1 if total == 1 or rng.random() < 0.4 else 2)
    kinds = rng.choice(len(CLASSES), n_groups, replace=False)
    first = int(rng.integers(1, total)) if n_groups == 2 else total
    related = n_groups == 2 and (rng.random() < 0.25 if relation is None else relation)
    counts = (first, total - first)[:n_groups]
    return Scene(
        tuple(Group(n, *CLASSES[k]) for n, k in zip(counts, kinds, strict=True)),
        str(rng.choice(RELATIONS)) if related else None,
    )


# ---------------------------------------------------------------------------------------------------------- drawing
@dataclass(frozen=True)
class Layout:
    """Every object of a batch of pictures, one row each: picture index, class, cell, centre (pixels) and size."""

    picture: NDArray[np.int64]
    kind: NDArray[np.int64]
    cell: NDArray[np.int64]
    centre: Array  # (N, 2) as (row, column), relative to the cell's corner
    radius: Array  # of the circle of equal area


def arrange(scenes: Sequence[Scene], rng: np.random.Generator) -> Layout:
    """Place the objects of every scene: one object a cell, relations obeyed, position and size jittered."""
    rows = [
        (i, group.kind, cell)
        for i, scene in enumerate(scenes)
        for group, cells in zip(scene.groups, _cells(scene, rng), strict=True)
        for cell in cells
    ]
    picture, kind, cell = np.array(rows, dtype=np.int64).T
    radius = rng.uniform(*RADIUS[kind % len(SHAPES)].T)
    reach = radius * _REACH[kind % len(SHAPES)]
    slack = (CELL / 2 - 0.9 - reach)[:, None]  # keeps objects of neighbouring cells apart
    return Layout(picture, kind, cell, CELL / 2 + rng.uniform(-1, 1, (len(rows), 2)) * slack, radius)


def _cells(scene: Scene, rng: np.random.Generator) -> list[list[int]]:
    """Free cells for each group; a relation splits the grid at a line with room on both sides."""
    counts = [group.count for group in scene.groups]
    order = np.arange(CELLS * CELLS).reshape(CELLS, CELLS)
    if scene.relation is None:
        cells = rng.permutation(order.ravel())
        return [cells[: counts[0]].tolist(), cells[counts[0] : sum(counts)].tolist()][: len(counts)]
    lines = order.T if scene.relation in ("left of", "right of") else order  # one row of `lines` is one step along it
    if scene.relation in ("right of", "below"):
        lines = lines[::-1]
    cuts = [c for c in range(1, CELLS) if c * CELLS >= counts[0] and (CELLS - c) * CELLS >= counts[1]]
    cut = int(rng.choice(cuts))
    return [
        rng.permutation(side.ravel())[:n].tolist() for side, n in zip((lines[:cut], lines[cut:]), counts, strict=True)
    ]


# Half extents of each shape when its area is that of a circle of radius 1.
_HALF_SIDE = np.sqrt(np.pi) / 2  # square
_IN_RADIUS = np.sqrt(np.pi / (3 * np.sqrt(3)))  # equilateral triangle; its circumradius is twice that
_REACH = np.array([1.0, _HALF_SIDE, 2 * _IN_RADIUS * np.cos(np.pi / 6)])


def coverage(shape: NDArray[np.int64], centre: Array, radius: Array, size: int) -> Array:
    """Fraction of each pixel covered: shape (N,), centre (N, 2), radius (N,) in pixels -> (N, size, size)."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    centre, radius = centre.astype(np.float32), radius.astype(np.float32)
    y = (axis[:, None] - centre[:, 0, None, None]) / radius[:, None, None]
    x = (axis[None, :] - centre[:, 1, None, None]) / radius[:, None, None]
    y = y + np.where(shape == 2, -_IN_RADIUS / 2, 0)[:, None, None]  # centre the triangle's bounding box
    inside = np.stack(
        [
            np.hypot(x, y) - 1,
            np.maximum(np.abs(x), np.abs(y)) - _HALF_SIDE,
            np.maximum(y, np.abs(x) * np.cos(np.pi / 6) - y / 2) - _IN_RADIUS,
        ]
    )
    distance = np.take_along_axis(inside, shape[None, :, None, None], 0)[0] * radius[:, None, None]
    return np.clip(0.5 - distance, 0, 1)


def draw(layout: Layout, pictures: int, opacity: Array | None = None) -> NDArray[np.uint8]:
    """Paint a layout: (pictures, 64, 64, 3) uint8. `opacity` (N,) fades objects (for training the held-out judge)."""
    canvas = np.full((pictures, CELLS, CELL, CELLS, CELL, 3), PAPER)
    cover = coverage(layout.kind % len(SHAPES), layout.centre, layout.radius, CELL)
    cover = (cover if opacity is None else cover * opacity[:, None, None])[..., None]
    row, column = np.divmod(layout.cell, CELLS)
    ink = RGB[layout.kind // len(SHAPES)][:, None, None, :]
    canvas[layout.picture, row, :, column, :, :] = PAPER + cover * (ink - PAPER)
    return np.rint(canvas.reshape(pictures, SIZE, SIZE, 3) * 255).astype(np.uint8)


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of each scene: (len(scenes), 64, 64, 3) uint8."""
    return draw(arrange(scenes, rng), len(scenes))


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """(K, 64, 64, 3) uint8 -> (K, 3, 64, 64) float in [0, 1], the form that rewards take."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


# --------------------------------------------------------------------------------------------------------- counting
@dataclass(frozen=True)
class Detections:
    """Objects found in a batch of pictures, one row each."""

    picture: NDArray[np.int64]
    colour: NDArray[np.int64]
    shape: Array  # (N, 3) weight of each shape, rows sum to 1
    confidence: Array  # (N,) in [0, 1]: how well the blob is drawn as its best shape
    centre: Array  # (N, 2) row, column in pixels
    pictures: int

    @property
    def kind(self) -> NDArray[np.int64]:
        return self.colour * len(SHAPES) + self.shape.argmax(1)

    @property
    def sure(self) -> NDArray[np.bool_]:
        return self.confidence > 0.5


def detect(images: Tensor) -> Detections:
    """Find objects: ink per colour -> connected blobs -> overlap with an ideal shape of the same area and place.

    images: (K, 3, H, W) in [0, 1]. The confidence of a blob is its soft intersection over union with the best ideal
    shape, 0 at an overlap of 0.6 and 1 at 0.85, so faint, half-drawn, merged or ragged objects count less than one.
    """
    ink = _ink(images)
    labels, found = ndimage.label(ink > 0.4, structure=_IN_PLANE)
    owner = ndimage.maximum_filter(labels, size=(1, 1, 3, 3))  # each blob with its soft rim
    area = np.bincount(owner.ravel(), ink.ravel(), found + 1).astype(float)
    index = np.flatnonzero(area > _SPECK)
    index = index[index > 0]
    where = np.nonzero(owner)
    mass = ink[where]
    moments = [np.bincount(owner[where], mass * axis, found + 1)[index] / area[index] for axis in where]
    place = np.stack(moments, 1) if len(index) else np.zeros((0, 4))
    picture, colour = np.rint(place[:, :2]).astype(np.int64).T
    overlap = _overlap(ink, owner, index, picture, colour, place[:, 2:] + 0.5, area[index])
    best = overlap.max(1, keepdims=True, initial=0)
    weight = np.exp((overlap - best) / _SHARPNESS)
    confidence = np.clip((best[:, 0] - 0.6) / 0.25, 0, 1) * np.clip((area[index] - 20) / 20, 0, 1)
    shape = weight / weight.sum(1, keepdims=True)
    return Detections(picture, colour, shape, confidence, place[:, 2:] + 0.5, len(images))


_IN_PLANE = np.zeros((3, 3, 3, 3), dtype=bool)
_IN_PLANE[1, 1] = True
_SPECK = 12  # pixels of ink below which a blob is no object
_SHARPNESS = 0.02  # overlap difference at which a shape is e times likelier than another


def _ink(images: Tensor) -> NDArray[np.float32]:
    """How much ink of each colour every pixel holds, 0 to 1: (K, 4, H, W). A pixel's ink belongs to its nearest hue.

    Raises:
        ValueError: a pixel is not finite; it would pass for paper.
    """
    if not images.isfinite().all():
        raise ValueError("pictures must be finite")
    x = images.detach().to("cpu", torch.float32).clamp(0, 1)
    hue = torch.tensor(RGB - RGB.mean(1, keepdims=True), dtype=torch.float32)  # the grey part says nothing of hue
    chroma = x - x.mean(1, keepdim=True)
    cosine = torch.einsum("kchw,nc->knhw", chroma, hue / hue.norm(dim=1, keepdim=True))
    nearest = torch.zeros_like(cosine).scatter_(1, cosine.argmax(1, keepdim=True), 1)
    return (cosine * nearest / hue.norm(dim=1)[:, None, None]).clamp(0, 1).numpy()


def _overlap(
    ink: NDArray[np.float32],
    owner: NDArray[np.int64],
    index: NDArray[np.int64],
    picture: NDArray[np.int64],
    colour: NDArray[np.int64],
    centre: Array,
    area: Array,
) -> Array:
    """Soft intersection over union of each blob with each ideal shape of its area at its centre of mass: (N, 3)."""
    window = 20
    corner = np.rint(centre).astype(np.int64) - window // 2
    edge = ((0, 0), (0, 0), (window, window), (window, window))
    row = corner[:, 0, None, None] + np.arange(window)[:, None] + window
    column = corner[:, 1, None, None] + np.arange(window) + window
    at = (picture[:, None, None], colour[:, None, None], row, column)
    patch = np.pad(ink, edge)[at] * (np.pad(owner, edge)[at] == index[:, None, None])
    radius = np.sqrt(area / np.pi)
    scores = []
    for shape in range(len(SHAPES)):
        middle = centre - corner
        middle[:, 0] -= (shape == 2) * _IN_RADIUS / 2 * radius  # a triangle's centre of mass lies below its middle
        ideal = coverage(np.full(len(area), shape), middle, radius, window)
        blurred = ndimage.gaussian_filter(ideal, 0.9, axes=(1, 2))  # so that a soft square is not taken for a circle
        scores.append(np.maximum(_soft_iou(patch, ideal), _soft_iou(patch, blurred)))
    return np.stack(scores, 1)


def _soft_iou(a: Array, b: Array) -> Array:
    return np.minimum(a, b).sum((1, 2)) / np.maximum(a, b).sum((1, 2))


def count(images: Tensor) -> NDArray[np.int64]:
    """Exact counts: (K, 12) objects of each class, those drawn with a confidence above one half."""
    found = detect(images)
    counts = np.zeros((found.pictures, len(CLASSES)), dtype=np.int64)
    np.add.at(counts, (found.picture[found.sure], found.kind[found.sure]), 1)
    return counts


def soft_count(found: Detections) -> Array:
    """Smooth counts (K, 12): each object adds its confidence, shared among the shapes it may be."""
    counts = np.zeros((found.pictures, len(COLOURS), len(SHAPES)))
    np.add.at(counts, (found.picture, found.colour), found.confidence[:, None] * found.shape)
    return counts.reshape(found.pictures, -1)


# ---------------------------------------------------------------------------------------------------------- rewards
@dataclass(frozen=True)
class CountReward:
    """Minus the residual sum of squares of the smooth counts over all 12 classes: images -> (K,), at most 0.

    Smooth, because an integer reward is blind to what a search step usually brings: an object a little clearer, a
    smudge a little fainter. A relation costs up to 1 more for every object: how far, in cells, it falls short of half a
    cell's distance on the right side of the other group's worst placed object. So a misplaced object weighs as much as
    a missing one.
    """

    scene: Scene

    def __call__(self, images: Tensor) -> Tensor:
        found = detect(images)
        reward = -((soft_count(found) - self.scene.target) ** 2).sum(1)
        if self.scene.relation is not None:
            short = [np.clip(0.5 - gaps, 0, 1) for gaps in _gaps(self.scene, found)]
            reward -= [s.max(0).sum() + s.max(1).sum() if s.size else 0.0 for s in short]
        return torch.from_numpy(reward).float()


def residual(scene: Scene, images: Tensor) -> NDArray[np.int64]:
    """Residual sum of squares of the exact counts over all classes (the paper's RSS): (K,), 0 when all are right."""
    return ((count(images) - scene.target) ** 2).sum(1)


def exact(scene: Scene, images: Tensor) -> NDArray[np.bool_]:
    """Whether a picture shows exactly what the scene asks for, counts and relation: (K,)."""
    found = detect(images)
    right = residual(scene, images) == 0
    if scene.relation is not None:
        right &= np.array([bool((gaps > 0).all()) for gaps in _gaps(scene, found)])
    return right


def _gaps(scene: Scene, found: Detections) -> list[Array]:
    """Per picture (first, second): how far each of the second group lies past each of the first, in cells."""
    axis, sign = AXIS[str(scene.relation)]
    place = sign * found.centre[:, axis] / CELL
    rows = [
        [place[found.sure & (found.picture == k) & (found.kind == group.kind)] for group in scene.groups]
        for k in range(found.pictures)
    ]
    return [second[None, :] - first[:, None] for first, second in rows]
