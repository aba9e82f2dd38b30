"""Judges that rest on CLIP: CLIPScore, PickScore and an aesthetic score. All of them have gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..rewards import Reward, chunked
from .pictures import check_pictures, load_model, pretrained

CLIPS = {
    "clip-l": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}
"""Short names of models: where the weights are, and where the tokenizer is."""


@dataclass(frozen=True)
class Clip:
    """A CLIPModel of transformers and its tokenizer: pictures and texts as unit vectors of one space."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str | Path = "clip-l", *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Clip:
        """From a folder, a hub id, or a short name of `CLIPS`. Raises what `pictures.load_model` does."""
        from transformers import AutoTokenizer, CLIPModel

        weights, tokenizer = CLIPS.get(str(name), (name, name))
        return cls(load_model(CLIPModel, weights, device, dtype), pretrained(AutoTokenizer, tokenizer))

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (K, 3, H, W) as the model wants them: the middle square, resized and normalised. Differentiable.

        The processor of transformers rounds to 8 bits on the way, so it has no gradient; this is close to it.
        """
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        x, size = check_pictures(images).float(), self.model.config.vision_config.image_size
        scale = size / min(x.shape[2:])
        high, wide = (max(size, int(side * scale)) for side in x.shape[2:])
        if (high, wide) != tuple(x.shape[2:]):
            x = F.interpolate(x, (high, wide), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (high - size) // 2, (wide - size) // 2
        x = x[:, :, top : top + size, left : left + size].to(self.model.device)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return ((x - mean) / std).to(self.model.dtype)

    def pictures(self, images: Tensor) -> Tensor:
        """Pictures (K, 3, H, W) as unit vectors (K, d), float32, on the model's device."""
        features = self.model.get_image_features(pixel_values=self.pixels(images)).pooler_output
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """A text as a unit vector (d,), float32; cut off at the model's length (77 tokens)."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(self.model.device)
        features = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return F.normalize(features.float(), dim=-1)[0]


def clip_score(clip: Clip, prompt: str, *, chunk: int = 16) -> Reward:
    """CLIPScore, 2.5 max(cos, 0) of picture and prompt (Hessel et al., arXiv 2104.08718): (K, 3, H, W) -> (K,).

    Raises ValueError if `chunk`, the pictures a forward pass, is less than 1.
    """
    text = clip.text(prompt)
    return chunked(lambda images: 2.5 * (clip.pictures(images) @ text).clamp_min(0).to(images.device), chunk)


def pick_score(clip: Clip, prompt: str, *, chunk: int = 16) -> Reward:
    """PickScore, how much people would like the picture for the prompt (Kirstain et al., arXiv 2305.01569).

    It is the scaled cosine of a CLIP-H that was trained on people's choices between two pictures: (K, 3, H, W) -> (K,).
    A difference d means that the better one is chosen with probability 1 / (1 + exp(-d)). It works unlike the judges
    that count or answer questions, so use it to check what a search gained by them, and not as the reward.

    Raises ValueError if `chunk`, the pictures a forward pass, is less than 1.
    """
    text = clip.text(prompt) * clip.model.logit_scale.detach().float().exp()
    return chunked(lambda images: (clip.pictures(images) @ text).to(images.device), chunk)


def linear_head(path: str | Path) -> nn.Module:
    """Linear layers one after the other, from a safetensors file that holds nothing else, in the order of their names.

    Raises ValueError if the file holds other tensors; what safetensors raises for a damaged file.
    """
    held = load_file(path)
    names = [key.removesuffix(".weight") for key in held if key.endswith(".weight")]
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    if set(held) != {f"{name}.{part}" for name in names for part in ("weight", "bias")}:
        raise ValueError(f"{path} should hold weights and biases of linear layers; it holds {', '.join(sorted(held))}")
    layers = nn.Sequential()
    for name in names:
        weight, bias = held[f"{name}.weight"], held[f"{name}.bias"]
        if weight.ndim != 2:
            raise ValueError(f"{path}: {name} is no linear layer; its weights are {tuple(weight.shape)}")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers.append(layer)
    return layers


def aesthetic_score(clip: Clip, head: nn.Module, *, chunk: int = 16) -> Reward:
    """How good pictures look, whatever the prompt: (K, 3, H, W) -> (K,).

    Args:
        clip: the model.
        head: the model's unit vectors (K, d) -> (K, 1). The LAION predictor is such a head over "clip-l", on a scale of
            about 1 to 10: linear layers 768-1024-128-64-16-1, with dropout in training and no nonlinearity. It is
            published as a pickle: convert it once, with PyTorch's weights-only loader and safetensors' `save_file`.
        chunk: pictures a forward pass.

    Raises ValueError if the head does not lead from the model's vectors to one number each, and for chunk < 1.
    """
    head = head.eval().requires_grad_(False).to(clip.model.device)
    vectors = torch.zeros(2, clip.model.config.projection_dim, device=clip.model.device)
    try:
        head(vectors).view(2, 1)
    except RuntimeError as error:
        raise ValueError(f"the head must lead from vectors (K, {vectors.shape[1]}) to (K, 1)") from error
    return chunked(lambda images: head(clip.pictures(images))[:, 0].to(images.device), chunk)
