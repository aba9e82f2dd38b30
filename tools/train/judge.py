"""`python -m tools.train.judge`: trains the held-out judge from scratch, minutes of CPU time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from flowscale_lite.tiny import shapes
from flowscale_lite.tiny.judge import EMPTY, HeldOutJudge


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
