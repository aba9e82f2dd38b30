"""The held-out judge: a small convolutional network that has learnt to count shapes. No method may optimise it.

It is of another kind than the counter of `shapes`, which works with hues and overlaps: what fools one need not fool the
other, so a gain that only the counter sees is a gain in fooling it. The judge gives verdicts, not gradients or scores.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

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
        """Read trained weights (safetensors). Raises FileNotFoundError when there are none."""
        judge = cls()
        judge.load_state_dict(load_file(path))
        return judge.eval()

    @torch.no_grad()
    def cells(self, images: Tensor) -> NDArray[np.int64]:
        """The class in each cell, EMPTY for none: (K, 4, 4)."""
        return self(images.float().cpu()).argmax(1).numpy()

    def counts(self, images: Tensor) -> NDArray[np.int64]:
        """Objects of each class: (K, 12)."""
        cells = self.cells(images).reshape(len(images), -1)
        return np.stack([(cells == kind).sum(1) for kind in range(EMPTY)], 1)

    def exact(self, scene: shapes.Scene, images: Tensor) -> NDArray[np.bool_]:
        """Whether the judge sees exactly what the scene asks for, counts and relation: (K,)."""
        right = (self.counts(images) == scene.target).all(1)
        return right if scene.relation is None else right & _related(scene, self.cells(images))


def _related(scene: shapes.Scene, cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether every object of the first group stands on its side of every one of the second: (K,)."""
    axis, sign = shapes.AXIS[str(scene.relation)]
    place = sign * np.indices(cells.shape[1:])[axis]
    first, second = (
        np.where(cells == group.kind, place, fill) for group, fill in zip(scene.groups, (-9, 9), strict=True)
    )
    return first.max((1, 2)) < second.min((1, 2))


def training_batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures with some faded objects (below half ink counts as empty), blur and noise, and the label of each cell."""
    rng = np.random.default_rng(seed)
    layout = shapes.arrange([shapes.random_scene(rng) for _ in range(rows)], rng)
    faded = rng.random(len(layout.kind)) < 0.1
    opacity = np.where(faded, rng.uniform(0, 1, len(faded)), 1.0)
    labels = np.full((rows, shapes.CELLS**2), EMPTY)
    labels[layout.picture, layout.cell] = np.where(opacity > 0.5, layout.kind, EMPTY)
    images = shapes.to_tensor(shapes.draw(layout, rows, opacity))
    generator = torch.Generator().manual_seed(seed)
    blur = torch.rand(rows, 1, 1, 1, generator=generator)
    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), blur)
    noise = 0.08 * torch.rand(rows, 1, 1, 1, generator=generator)
    return images + noise * torch.randn(images.shape, generator=generator), torch.from_numpy(labels).view(rows, 4, 4)


def train(path: str | Path, steps: int = 1200, batch: int = 64) -> float:
    """Train the judge from scratch and save it; returns the share of new pictures it reads without a mistake."""
    torch.manual_seed(0)
    judge = HeldOutJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        images, labels = training_batch(batch, seed=step)
        loss = F.cross_entropy(judge(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, labels = training_batch(1000, seed=steps)
    accuracy = (torch.from_numpy(judge.eval().cells(images)) == labels).all((1, 2)).float().mean().item()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, path)
    return accuracy


if __name__ == "__main__":
    print(f"whole pictures right: {train(Path('data/judge/held_out.safetensors')):.4f}")
