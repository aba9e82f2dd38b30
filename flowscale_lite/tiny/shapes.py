"""The small data set: coloured shapes on a 64 x 64 canvas, their captions, exact and smooth counts, and rewards.

A picture holds 1 to 10 objects in one to three groups; the models were trained on one and two. Objects sit on a
jittered 4 x 4 grid, so they never touch. When a picture is drawn, it is known which objects it holds, how many and
where. Counting is image processing by numpy and scipy without any learnt weights, so it cannot share the mistakes of a
network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
_IN_RADIUS = np.sqrt(np.pi / (3 * np.sqrt(3)))  # equilateral triangle; its circumradius is twice that
_REACH = np.array([1.0, _HALF_SIDE, 2 * _IN_RADIUS * np.cos(np.pi / 6)])


def _outside_circle(y: Array, x: Array) -> Array:
    """How far a point lies outside a circle of radius 1; below 0 inside."""
    return np.hypot(x, y) - 1


def _outside_square(y: Array, x: Array) -> Array:
    """How far a point lies outside a square of the same area."""
    return np.maximum(np.abs(x), np.abs(y)) - _HALF_SIDE


def _outside_triangle(y: Array, x: Array) -> Array:
    """How far a point lies outside a triangle of the same area, the middle of whose bounding box is at 0."""
    y = y - _IN_RADIUS / 2
    return np.maximum(y, np.abs(x) * np.cos(np.pi / 6) - y / 2) - _IN_RADIUS


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


# --------------------------------------------------------------------------------------------------------- counting
@dataclass(frozen=True)
class Detections:
    """Objects found in a batch of pictures, one row each."""

    picture: Integers
    colour: Integers
    shape: Array  # (N, 3) weight of each shape, rows sum to 1
    confidence: Array  # (N,) in [0, 1]: how well the blob is drawn as its best shape
    centre: Array  # (N, 2) row, column in pixels
    pictures: int

    @property
    def kind(self) -> Integers:
        """Index into CLASSES of the likeliest kind, (N,)."""
        return self.colour * len(SHAPES) + self.shape.argmax(1)

    @property
    def sure(self) -> NDArray[np.bool_]:
        """Whether an object counts as one, (N,)."""
        return self.confidence > 0.5


def ink(pictures: Tensor) -> Tensor:
    """How much ink of each colour every pixel holds, 0 to 1: (K, 3, H, W) -> (K, 4, H, W). Gradients pass.

    All ink of a pixel is given to the colour whose hue is nearest.
    """
    hue = torch.tensor(RGB - RGB.mean(1, keepdims=True)).to(pictures)  # the grey part of a colour says nothing of hue
    size = hue.norm(dim=1, keepdim=True)
    chroma = pictures - pictures.mean(1, keepdim=True)
    cosine = torch.einsum("kchw,nc->knhw", chroma, hue / size)
    nearest = cosine == cosine.amax(1, keepdim=True)
    return (cosine * nearest / size[..., None]).clamp(0, 1)


def detect(images: Tensor) -> Detections:
    """Find objects: ink of each colour -> connected blobs -> overlap with an ideal shape of the same area and place.

    The confidence of a blob is its soft intersection over union with the best ideal shape, 0 at an overlap of 0.6 and 1
    at 0.85. So faint, half-drawn, merged or ragged objects count less than one.

    Args:
        images: (K, 3, H, W) in [0, 1].

    Raises ValueError: a pixel is not finite; it would pass for paper.
    """
    if not images.isfinite().all():
        raise ValueError("pictures must be finite")
    pixels = ink(images.detach().to("cpu", torch.float32).clamp(0, 1)).numpy()
    labels, found = ndimage.label(pixels > 0.4, structure=_IN_PLANE)
    owner = ndimage.maximum_filter(labels, size=(1, 1, 3, 3))  # each blob with its soft rim
    where = np.flatnonzero(owner)
    blob, mass = owner.ravel()[where], pixels.ravel()[where]
    area = np.bincount(blob, mass, found + 1).astype(float)
    index = np.flatnonzero(area > _SPECK)
    area = area[index]
    axes = np.unravel_index(where, owner.shape)
    moments = [np.bincount(blob, mass * axis, found + 1)[index] / area for axis in axes]
    place = np.stack(moments, 1) if len(index) else np.zeros((0, 4))
    plane, centre = np.rint(place[:, :2]).astype(np.int64), place[:, 2:] + 0.5  # a plane is a picture and a colour
    overlap = _overlap(pixels, owner, index, plane, centre, area)
    best = overlap.max(1, keepdims=True, initial=0)
    weight = np.exp((overlap - best) / _SHARPNESS)
    confidence = np.clip((best[:, 0] - 0.6) / 0.25, 0, 1) * np.clip((area - 20) / 20, 0, 1)
    shape = weight / weight.sum(1, keepdims=True)
    return Detections(plane[:, 0], plane[:, 1], shape, confidence, centre, len(images))


_IN_PLANE = np.zeros((3, 3, 3, 3), dtype=bool)
_IN_PLANE[1, 1] = True
_SPECK = 12  # pixels of ink up to which a blob is no object
_SHARPNESS = 0.02  # overlap difference at which a shape is e times likelier than another


def _overlap(
    pixels: NDArray[np.float32], owner: Integers, index: Integers, plane: Integers, centre: Array, area: Array
) -> Array:
    """Soft intersection over union of each blob with each ideal shape of its area at its centre of mass: (N, 3)."""
    window = 20
    corner = np.rint(centre).astype(np.int64) - window // 2
    margin = window // 2
    edge = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    row = corner[:, 0, None, None] + np.arange(window)[:, None] + margin
    column = corner[:, 1, None, None] + np.arange(window) + margin
    at = (*plane.T[:, :, None, None], row, column)
    patch = np.pad(pixels, edge)[at] * (np.pad(owner, edge)[at] == index[:, None, None])
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
    """Soft intersection over union of pairs of patches (N, H, W): (N,)."""
    return np.minimum(a, b).sum((1, 2)) / np.maximum(a, b).sum((1, 2))


def count(images: Tensor) -> Integers:
    """Exact counts (K, 12): the objects of each class that are found with a confidence above one half."""
    found = detect(images)
    counts = np.zeros((found.pictures, len(CLASSES)), dtype=np.int64)
    np.add.at(counts, (found.picture[found.sure], found.kind[found.sure]), 1)
    return counts


def soft_count(found: Detections) -> Array:
    """Smooth counts (K, 12): each object adds its confidence, shared among the shapes that it may be."""
    counts = np.zeros((found.pictures, len(COLOURS), len(SHAPES)))
    np.add.at(counts, (found.picture, found.colour), found.confidence[:, None] * found.shape)
    return counts.reshape(found.pictures, -1)


# ---------------------------------------------------------------------------------------------------------- rewards
@dataclass(frozen=True)
class CountReward:
    """Minus the residual sum of squares of the smooth counts over all 12 classes: images -> (K,), at most 0.

    A search step usually makes an object a little clearer or a smudge a little fainter, to which exact counts are
    blind. A relation may cost each object up to 1 more, as much as if it were missing: what its distance from the worst
    placed object of the other group, along the relation and in cells, lacks of MARGIN.
    """

    scene: Scene

    def __call__(self, images: Tensor) -> Tensor:
        found = detect(images)
        reward = -((soft_count(found) - self.scene.target) ** 2).sum(1)
        if self.scene.relation is not None:
            short = [np.clip(MARGIN - gaps, 0, 1) for gaps in _gaps(self.scene, found)]
            reward -= [s.max(0).sum() + s.max(1).sum() if s.size else 0.0 for s in short]
        return torch.from_numpy(reward).float()


def ink_as_asked(scene: Scene) -> Callable[[Tensor], Tensor]:
    """A differentiable reward: minus the squared error of each colour's ink, in objects of 90 pixels, summed up."""
    wanted = torch.zeros(len(COLOURS))
    for group in scene.groups:
        wanted[COLOURS.index(group.colour)] += group.count * INK[group.shape]
    return lambda pictures: -((ink(pictures).sum((2, 3)) - wanted.to(pictures)) / 90).square().sum(1)


def colourful(pictures: Tensor) -> Tensor:
    """A differentiable reward (K,): the strongest minus the weakest channel, summed up; about 1 for an object."""
    return (pictures.amax(1) - pictures.amin(1)).sum((1, 2)) / 64


def apart(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Mean root mean squared difference of pictures: of all pairs in a (N, 3, H, W), or of a against b."""
    gaps = torch.pdist(a.flatten(1)) if b is None else torch.cdist(a.flatten(1), b.flatten(1))
    return gaps.mean() / a[0].numel() ** 0.5


def residual(scene: Scene, images: Tensor) -> Integers:
    """Residual sum of squares of the exact counts over all classes, the paper's RSS: (K,); 0 if all are right."""
    return ((count(images) - scene.target) ** 2).sum(1)


def exact(scene: Scene, images: Tensor) -> NDArray[np.bool_]:
    """Whether each picture shows exactly what the scene asks for: (K,).

    Every count is right; and each object of the first group stands on its side of each of the second, by MARGIN.
    """
    found = detect(images)
    right = residual(scene, images) == 0
    if scene.relation is not None:
        right &= np.array([bool((gaps >= MARGIN).all()) for gaps in _gaps(scene, found)], bool)
    return right


def _gaps(scene: Scene, found: Detections) -> list[Array]:
    """For each picture, in cells, how far objects of the second group lie past those of the first: (first, second)."""
    axis, sign = AXIS[str(scene.relation)]
    place = sign * found.centre[:, axis] / CELL
    rows = [
        [place[found.sure & (found.picture == k) & (found.kind == group.kind)] for group in scene.groups[:2]]
        for k in range(found.pictures)
    ]
    return [second[None, :] - first[:, None] for first, second in rows]
