"""The small data set: coloured shapes on a 64 x 64 canvas, and their captions.

A picture holds 1 to 10 objects in one to three groups; the models were trained on one and two. Objects sit on a
jittered 4 x 4 grid, so they never touch. When a picture is drawn, it is known which objects it holds, how many and
where. `counter` finds them again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
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
MARGIN = 0.5  # cells between the centres of two objects, along a relation, from which on it holds
FRAMES = (
    *["{}"] * 4,  # four times in ten
    "a picture of {}",
    "a drawing of {}",
    "an image with {}",
    "please draw {}",
    "there are {}",
    "{} on white paper",
)
RADIUS = np.array([[4.9, 5.9], [5.1, 6.2], [4.4, 5.2]])  # from and to for each shape, of a circle of equal area
INK = {"circle": 91.0, "square": 101.0, "triangle": 73.0}  # mean pixels of ink of an object
Array = NDArray[np.float64]
Integers = NDArray[np.int64]


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
        """The group in words, e.g. "three red circles"; `number` replaces the first word."""
        number = number or ("a" if self.count == 1 else NUMBERS[self.count - 1])
        return f"{number} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one to three groups, and perhaps a relation between the first two.

    Each object of the first group obeys the relation with each object of the second.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def total(self) -> int:
        """Number of objects."""
        return sum(group.count for group in self.groups)

    @property
    def target(self) -> Integers:
        """Number of objects of each class, (12,)."""
        kinds, counts = [group.kind for group in self.groups], [group.count for group in self.groups]
        return np.bincount(kinds, counts, len(CLASSES)).astype(np.int64)

    def caption(self) -> str:
        """The plain wording, e.g. "three red circles and two blue squares"."""
        return _sentence([group.words() for group in self.groups], self.relation or "and")

    def wording(self, rng: np.random.Generator) -> str:
        """One of many wordings: digits or words, the groups in any order, a frame such as "a picture of ..."."""
        groups = []
        for group in self.groups:
            numbers = [NUMBERS[group.count - 1], str(group.count)]
            groups.append(group.words(str(rng.choice([*numbers, "a", "a"] if group.count == 1 else numbers))))
        links = {
            None: rng.choice(["and", "and", "with"]),
            "left of": rng.choice(["left of", "to the left of"]),
            "right of": rng.choice(["right of", "to the right of"]),
        }
        if self.relation is None:
            rng.shuffle(groups)
        link = str(links.get(self.relation, self.relation))
        return str(rng.choice(FRAMES)).format(_sentence(groups, link))


def _sentence(groups: Sequence[str], link: str) -> str:
    """One to three groups in words, with `link` between the first two and "and" before the third."""
    return " and ".join([f" {link} ".join(groups[:2]), *groups[2:]])


_GROUP = re.compile(
    rf"(?<![\w.-])(?P<number>an?|{'|'.join(NUMBERS)}|[1-9]|10)\s+(?P<colour>{'|'.join(COLOURS)})\s+(?P<shape>{'|'.join(SHAPES)})s?\b"
)
_COUNTS = {str(k): k for k in range(1, 11)} | {word: k + 1 for k, word in enumerate(NUMBERS)} | {"a": 1, "an": 1}
_FILLER = {*" ".join((*FRAMES, *RELATIONS)).split(), "and", "the", "to", "is", "show", "me", "photo", "exactly"}


def parse(prompt: str) -> Scene:
    """Read a prompt into a Scene.

    Raises:
        ValueError: the prompt names no known object, more than three groups, one kind twice or too many objects, has
            a relation elsewhere than between the first two, or has a word that is not understood. (What is left out of
            the scene would be left out of the picture.)
    """
    text = prompt.lower()
    found = list(_GROUP.finditer(text))
    if not found:
        raise ValueError(
            f"no known object in {prompt!r}: expected a number, a colour ({', '.join(COLOURS)}) and a shape "
            f"({', '.join(SHAPES)}), such as 'three red circles and two blue squares'"
        )
    groups = tuple(Group(_COUNTS[m["number"]], m["colour"], m["shape"]) for m in found)
    unknown = [word for word in re.findall(r"[\w.-]*\w", _GROUP.sub(" ", text)) if word not in _FILLER]
    if unknown:
        raise ValueError(f"{prompt!r} holds words that are not understood: {', '.join(unknown)}")
    if len(groups) > 3 or len({g.kind for g in groups}) < len(groups):
        raise ValueError(f"{prompt!r} names {len(groups)} groups: expected one to three groups of different kinds")
    between = [text[a.end() : b.start()] for a, b in pairwise(found)]
    relations = [next((r for r in RELATIONS if re.search(rf"\b{r}\b", words)), None) for words in between]
    if any(relations[1:]):
        raise ValueError(f"{prompt!r} has a relation after the second group: it may only stand between the first two")
    relation = relations[0] if relations else None
    scene = Scene(groups, relation)
    if scene.total > MAX_OBJECTS:
        raise ValueError(f"{prompt!r} asks for {scene.total} objects: at most {MAX_OBJECTS} fit")
    return scene


def random_scene(
    rng: np.random.Generator,
    objects: tuple[int, int] = (1, MAX_OBJECTS),
    groups: int | None = None,
    relation: bool | None = None,
) -> Scene:
    """A random scene.

    Args:
        objects: the least and the most objects.
        groups: 1 or 2; left to chance if None.
        relation: whether two groups have a relation; left to chance if None.
    """
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

    picture: Integers
    kind: Integers
    cell: Integers
    centre: Array  # (N, 2) as (row, column), relative to the cell's corner
    radius: Array  # of the circle of equal area


def arrange(scenes: Sequence[Scene], rng: np.random.Generator) -> Layout:
    """Place the objects of every scene, one in a cell, so that relations hold; places and sizes are jittered."""
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
    """The cells of each group. A relation cuts the grid along a line that leaves room for the first two groups."""
    counts = [group.count for group in scene.groups]
    order = np.arange(CELLS * CELLS).reshape(CELLS, CELLS)
    if scene.relation is None:
        cells = rng.permutation(order.ravel())
        return [part.tolist() for part in np.split(cells[: sum(counts)], np.cumsum(counts)[:-1])]
    axis, direction = AXIS[scene.relation]
    lines = (order.T if axis else order)[::direction]  # one row of `lines` is one step along the relation
    cuts = [c for c in range(1, CELLS) if c * CELLS >= counts[0] and (CELLS - c) * CELLS >= counts[1]]
    cut = int(rng.choice(cuts))
    sides = zip((lines[:cut], lines[cut:]), counts[:2], strict=True)
    related = [rng.permutation(side.ravel())[:n].tolist() for side, n in sides]
    if len(counts) == 2:
        return related
    free = np.setdiff1d(order, np.concatenate(related))  # the third group stands anywhere
    return [*related, rng.permutation(free)[: counts[2]].tolist()]


# Half extents of each shape when its area is that of a circle of radius 1.
_HALF_SIDE = np.sqrt(np.pi) / 2  # square
IN_RADIUS = np.sqrt(np.pi / (3 * np.sqrt(3)))  # equilateral triangle; its circumradius is twice that
_REACH = np.array([1.0, _HALF_SIDE, 2 * IN_RADIUS * np.cos(np.pi / 6)])


def _outside_circle(y: Array, x: Array) -> Array:
    """How far a point lies outside a circle of radius 1; below 0 inside."""
    return np.hypot(x, y) - 1


def _outside_square(y: Array, x: Array) -> Array:
    """How far a point lies outside a square of the same area."""
    return np.maximum(np.abs(x), np.abs(y)) - _HALF_SIDE


def _outside_triangle(y: Array, x: Array) -> Array:
    """How far a point lies outside a triangle of the same area, the middle of whose bounding box is at 0."""
    y = y - IN_RADIUS / 2
    return np.maximum(y, np.abs(x) * np.cos(np.pi / 6) - y / 2) - IN_RADIUS


_OUTSIDE = (_outside_circle, _outside_square, _outside_triangle)  # in the order of SHAPES


def coverage(shape: Integers, centre: Array, radius: Array, size: int) -> Array:
    """The share of each pixel that an object covers, on canvases of its own: (N, size, size).

    Args:
        shape: indices into SHAPES, (N,).
        centre: row and column in pixels, (N, 2).
        radius: of the circle of equal area, in pixels, (N,).
    """
    axis = np.arange(size, dtype=np.float32) + 0.5
    centre, radius = centre.astype(np.float32), radius.astype(np.float32)
    y = (axis[:, None] - centre[:, 0, None, None]) / radius[:, None, None]
    x = (axis[None, :] - centre[:, 1, None, None]) / radius[:, None, None]
    y, x = y.astype(float), x.astype(float)
    distance = np.empty((len(shape), size, size))
    for kind, outside in enumerate(_OUTSIDE):
        distance[shape == kind] = outside(y[shape == kind], x[shape == kind])
    distance *= radius[:, None, None]
    return np.clip(0.5 - distance, 0, 1)


def draw(layout: Layout, pictures: int, opacity: Array | None = None) -> NDArray[np.uint8]:
    """Paint a layout: (pictures, 64, 64, 3) uint8. `opacity` (N,) in [0, 1] fades objects towards the paper."""
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
