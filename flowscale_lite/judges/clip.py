"""Judges that rest on CLIP: CLIPScore, PickScore and an aesthetic score. All have gradients."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rewards import chunked
from .pictures import Chunked, check_pictures, load_model, pretrained

CLIPS = {
    "clip-l": ("openai/clip-vit-large-patch14", None),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}
"""Short names: (weights, tokenizer if it is kept elsewhere)."""
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


@dataclass(frozen=True)
class Clip:
    """A CLIP model: pictures and texts as unit vectors of one space.

    Attributes:
        model: a transformers CLIPModel.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any

    @classmethod
    def load(
        cls,
        name: str | Path = "clip-l",
        *,
        tokenizer: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Clip:
        """From a folder, a hub id, or a short name of `CLIPS`. Raises what `pretrained` and `load_model` do."""
        from transformers import AutoTokenizer, CLIPModel

        name, elsewhere = CLIPS.get(str(name), (name, None))
        model = load_model(CLIPModel, name, device, dtype)
        return cls(model, pretrained(AutoTokenizer, tokenizer or elsewhere or name))

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (K, 3, H, W) as the model wants them: the middle square, resized and normalised. Differentiable.

        CLIP's own preprocessing without its 8-bit step, so close to it but not to the bit.
        """
        x, size = check_pictures(images).float(), self.model.config.vision_config.image_size
        scale = size / min(x.shape[2:])
        high, wide = (max(size, int(side * scale)) for side in x.shape[2:])
        if (high, wide) != tuple(x.shape[2:]):
            x = F.interpolate(x, (high, wide), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (high - size) // 2, (wide - size) // 2
        x = x[:, :, top : top + size, left : left + size].to(self.model.device)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (_MEAN, _STD))
        return ((x - mean) / std).to(self.model.dtype)

    def pictures(self, images: Tensor) -> Tensor:
        """(K, 3, H, W) -> unit vectors (K, d), float32."""
        pooled = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """A text as a unit vector (d,), float32; cut off at the model's length (77 tokens)."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)[0]


@dataclass(frozen=True)
class CLIPScore(Chunked):
    """2.5 max(cos, 0) of picture and prompt (Hessel et al., arXiv 2104.08718): (K, 3, H, W) -> (K,)."""

    clip: Clip
    prompt: str
    chunk: int = 16

    @cached_property
    def _text(self) -> Tensor:
        return self.clip.text(self.prompt)

    def __call__(self, images: Tensor, /) -> Tensor:
        cosine = chunked(lambda rows: self.clip.pictures(rows) @ self._text, self.chunk)(images)
        return 2.5 * cosine.clamp_min(0).to(images.device)


@dataclass(frozen=True)
class PickScore(Chunked):
    """How much people would like the picture for the prompt (Kirstain et al., arXiv 2305.01569): (K, 3, H, W) -> (K,).

    The scaled cosine of a CLIP-H trained on choices between two pictures; a difference d means that the better one is
    chosen with probability 1 / (1 + exp(-d)). Of another kind than the counting and answering judges: use it to hold a
    gain of theirs against, not as the reward.
    """

    clip: Clip
    prompt: str
    chunk: int = 16

    @cached_property
    def _text(self) -> Tensor:
        return self.clip.text(self.prompt) * self.clip.model.logit_scale.detach().float().exp()

    def __call__(self, images: Tensor, /) -> Tensor:
        return chunked(lambda rows: self.clip.pictures(rows) @ self._text, self.chunk)(images).to(images.device)


@dataclass(frozen=True)
class Aesthetic(Chunked):
    """An aesthetic score of pictures, whatever the prompt: a head over CLIP's unit vectors. (K, 3, H, W) -> (K,).

    The LAION predictor is such a head over "clip-l", on a scale of about 1 to 10. It is published as a pickle: convert
    it once, with PyTorch's weights-only loader and safetensors' `save_file`, and load it with `aesthetic_head`.
    """

    clip: Clip
    head: nn.Module
    chunk: int = 16

    def __call__(self, images: Tensor, /) -> Tensor:
        return chunked(lambda rows: self.head(self.clip.pictures(rows))[:, 0], self.chunk)(images).to(images.device)


def aesthetic_head(path: str | Path, clip: Clip) -> nn.Module:
    """A chain of linear layers read from a safetensors file: a single one, or the MLP of the LAION predictor.

    That MLP has no nonlinearity, and dropout between its layers only, so the shapes in the file say all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, or the layers do not lead from the CLIP's vectors to one number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path} with an aesthetic head")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file; pickles are not loaded, they can run code") from error
    names = sorted(
        (name.removesuffix("weight") for name in tensors if name.endswith("weight")),
        key=lambda name: [int(n) for n in re.findall(r"\d+", name)],
    )
    layers = [_linear(tensors[f"{name}weight"], tensors.get(f"{name}bias")) for name in names]
    sizes = [clip.model.config.projection_dim, *(layer.out_features for layer in layers)]
    if not layers or sizes[-1] != 1 or any(layer.in_features != n for layer, n in zip(layers, sizes, strict=False)):
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise ValueError(f"{path} holds no chain of linear layers from {sizes[0]} numbers to one; it holds {shapes}")
    return nn.Sequential(*layers).requires_grad_(False).to(clip.model.device)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    if weight.ndim != 2:
        raise ValueError(f"a linear layer's weight has two dimensions; got {tuple(weight.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return layer
