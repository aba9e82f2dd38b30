"""Pictures as judges take them, and the loading of judges' models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def check_pictures(images: Tensor) -> Tensor:
    """The pictures, if they are (K, 3, H, W) with K at least 1, and in [0, 1].

    Raises:
        ValueError: they are not; a picture in [-1, 1], in bytes or of NaN would be judged without a word.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"pictures must be floats of shape (K, 3, H, W), one at least; got {images.dtype} {tuple(images.shape)}"
        )
    low, high = (float(v) for v in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # so put, NaN is refused too
        raise ValueError(f"pictures must lie in [0, 1]; got values from {low:g} to {high:g}")
    return images


def to_pil(images: Tensor) -> list[Image]:
    """Pictures (K, 3, H, W) in [0, 1] as PIL images, rounded to 8 bits: the one place where tensors become images.

    Raises:
        ValueError: shape or range is wrong.
    """
    from PIL import Image

    pixels = check_pictures(images).detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(pixel) for pixel in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pretrained(cls: Any, name: str | Path, **options: Any) -> Any:
    """cls.from_pretrained(name), with an error that says what to do.

    Raises:
        PermissionError: the model's licence has to be accepted first.
        FileNotFoundError: there is no such model in reach, or no safetensors weights of it.
    """
    from ..flux.hub import quiet

    try:
        with quiet(Path(name).exists()):  # a download shows its progress
            return cls.from_pretrained(str(name), **options)
    except (OSError, ValueError) as error:
        causes = _causes(error)
        if any(type(cause).__name__ == "GatedRepoError" for cause in causes):
            raise PermissionError(
                f"{name} asks its users to accept a licence: do so on https://huggingface.co/{name}, then set HF_TOKEN"
            ) from error
        if not isinstance(error, OSError):
            raise
        empty = Path(name).is_dir() and not (Path(name) / "config.json").exists()
        if "safetensors" in str(error) and not empty:
            raise FileNotFoundError(
                f"{name} has no safetensors weights; others are not loaded, they can run code"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise FileNotFoundError(
            f"no {cls.__name__} {str(name)!r}: it is no folder that holds one, it is not in the cache, and "
            f"the hub gives none{offline}: {str(error).splitlines()[0]}"
        ) from error


def _causes(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_causes(error.__cause__ or error.__context__)]


def load_model(cls: Any, name: str | Path, device: str, dtype: torch.dtype) -> Any:
    """A model ready for inference.

    Raises:
        ValueError: there is no such device.
    """
    from ..flux.hub import check_device

    check_device(device)
    model = pretrained(cls, name, dtype=dtype, use_safetensors=True)
    return model.eval().requires_grad_(False).to(device)


class Chunked:
    """A judge that takes `chunk` pictures at a time.

    Raises:
        ValueError: chunk < 1, refused here and not in the middle of a search.
    """

    chunk: int

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {self.chunk}")
