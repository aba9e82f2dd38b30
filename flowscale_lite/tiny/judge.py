"""The held-out judge: a small convolutional network that has learnt to count shapes. No method may optimise it.

The exact counter (`counter`) works with hues and overlaps, the judge does not, so what fools one need not fool the
other. A gain that only the counter sees is a gain in fooling it. The judge gives verdicts, no gradients and no scores.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from . import shapes

EMPTY = len(shapes.CLASSES)  # label of a cell without an object


class HeldOutJudge(nn.Sequential):
    """Pictures (K, 3, 64, 64) in [0, 1] -> logits (K, 13, 4, 4): what each cell of the grid holds."""

    def __init__(self) -> None:
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(96, 96, 3, padding=1), nn.SiLU(), nn.Conv2d(96, EMPTY + 1, 1))

    @classmethod
    def load(cls, path: str | Path) -> HeldOutJudge:
        """The judge with the trained weights of a safetensors file.

        Raises FileNotFoundError: there is no such file.
        """
        judge = cls()
        judge.load_state_dict(load_file(path))
        return judge.eval()

    @torch.no_grad()
    def cells(self, images: Tensor) -> NDArray[np.int64]:
        """The class in each cell, EMPTY for none: (K, 4, 4)."""
        return self(images.float().cpu()).argmax(1).numpy()

    def counts(self, images: Tensor) -> NDArray[np.int64]:
        """Objects of each class: (K, 12)."""
        cells = self.cells(images).reshape(-1, shapes.CELLS**2)
        return np.stack([(cells == kind).sum(1) for kind in range(EMPTY)], 1)

    def exact(self, scene: shapes.Scene, images: Tensor) -> NDArray[np.bool_]:
        """Whether the judge sees exactly what the scene asks for, in counts and in relation: (K,)."""
        right = (self.counts(images) == scene.target).all(1)
        return right if scene.relation is None else right & _related(scene, self.cells(images))


def _related(scene: shapes.Scene, cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether every object of the first group stands on its side of every one of the second: (K,).

    By a cell of the grid, which is all that the judge knows of places. Of pictures with the right counts, it says of
    the same ones as `counter.exact` that the relation holds (`tests/test_held_out.py`).
    """
    axis, sign = shapes.AXIS[str(scene.relation)]
    place = sign * np.indices(cells.shape[1:])[axis]
    first, second = (
        np.where(cells == group.kind, place, fill) for group, fill in zip(scene.groups[:2], (-9, 9), strict=True)
    )
    return first.max((1, 2)) < second.min((1, 2))
