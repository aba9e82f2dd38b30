"""The exact counter of the small world, and the rewards made of it: which objects does a picture show, and where?

Counting is image processing by numpy and scipy without any learnt weights, so it cannot share the mistakes of a
network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .shapes import AXIS, CELL, CLASSES, COLOURS, IN_RADIUS, INK, MARGIN, RGB, SHAPES, Array, Integers, Scene, coverage


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
        middle[:, 0] -= (shape == 2) * IN_RADIUS / 2 * radius  # a triangle's centre of mass lies below its middle
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
