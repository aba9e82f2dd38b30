"""Pictures as judges take them, and the loading of judges' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def check_pictures(images: Tensor) -> Tensor:
    """The same pictures, once it is clear that they are floats of shape (K, 3, H, W), K at least 1, in [0, 1].

    Raises ValueError: they are not. A model would judge pictures in [-1, 1], bytes or NaN without complaint.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(f"pictures must be floats of shape (K, 3, H, W); got {images.dtype}, {tuple(images.shape)}")
    low, high = (float(v) for v in images.detach().aminmax())
    in_range = low >= -1e-3 and high <= 1 + 1e-3  # also false if a value is NaN: low and high are NaN then
    if not in_range:
        raise ValueError(f"pictures must lie in [0, 1]; got values from {low:g} to {high:g}")
    return images


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures (K, 3, H, W) in [0, 1] as PIL images, rounded to 8 bits. Raises what `check_pictures` does."""
    pixels = check_pictures(images).detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(pixel) for pixel in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pretrained(cls: Any, name: str | Path) -> Any:
    """`cls.from_pretrained(name)`, its errors explained by `flux.hub.explained`. A download shows its progress."""
    from ..flux.hub import explained, quiet

    with explained(name), quiet(Path(name).exists()):
        return cls.from_pretrained(str(name))


def load_model(cls: Any, name: str | Path, device: str, dtype: torch.dtype) -> Any:
    """A model of transformers ready for inference, from safetensors in a folder or on the hub.

    Raises what `flux.hub.load` does, and ValueError if config and weights disagree.
    """
    from ..flux.hub import check_device, explained, quiet, weights

    check_device(device)
    with explained(name), quiet(Path(name).exists()):
        return weights(cls, name, dtype=dtype).to(device)
