"""Which diffusers pipelines can be searched, and the little that has to be known of each.

`FlowModel` runs a pipeline's own `__call__` and listens in the scheduler's place. Every flow-matching pipeline hands
the velocity eps - x0 to its scheduler, whatever its transformer predicts. So clocks, signs, guidance formulas, time
grids and decoding are diffusers' own. What has to be known: how a prompt is encoded and given to the call, the shape
in which noise is drawn, how a state becomes the call's `latents`, and when guidance runs the model twice.

| pipeline | models | guidance | clock of the transformer | NFE a row |
|---|---|---|---|---|
| FluxPipeline | FLUX.1 schnell, dev | distilled | t | 1 |
| Flux2KleinPipeline | FLUX.2 klein 4B, 9B | none if distilled, else two forwards | t | 1 or 2 |
| StableDiffusion3Pipeline | SD3, SD3.5 medium, large, turbo | two forwards above 1 | 1000 t | 1 or 2 |
| QwenImagePipeline | Qwen-Image | two forwards above 1, norm kept | t | 1 or 2 |
| ZImagePipeline | Z-Image, Z-Image-Turbo | two forwards above 0 | 1 - t, and minus the velocity | 1 or 2 |
| SanaPipeline | Sana | two forwards above 1 | 1000 t, times a scale | 1 or 2 |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]
"""Keyword arguments of a pipeline's `__call__`."""


class Clock(NamedTuple):
    """Where a transformer takes the sinusoid of time: the name of the module, and what that module gets at time 1."""

    sinusoid: str
    unit: float


@dataclass(frozen=True)
class Family:
    """What has to be known of a pipeline class.

    Attributes:
        encode: (pipe, text, negative text or None if guidance needs none, token limit) -> the arguments of `__call__`
            that stand for one prompt.
        blank: (config of the transformer, tokens) -> the same arguments for so many tokens, without values.
        guided: (pipe, guidance) -> whether guidance runs the model twice for a row.
        scale: the name of `__call__`'s argument for the guidance scale.
        options: further arguments of `__call__`.
        tokenizer: the name of the tokenizer that reads all of a text.
        around: pipe -> tokens within the limit that are not the text's own.
        most: config of the transformer -> the longest text that it was made for, in tokens; None for what `__call__`
            allows by default.
        beside: tokens that the transformer reads besides those of the limit.
        patch: the sides of a picture are multiples of this many cells of the autoencoder's grid.
        fold: channels of the transformer's input for each channel of a state; 4 where patches of 2 x 2 are packed.
        down: cells of the autoencoder's grid for each cell of a state, along a side.
        pack: (pipe, state (K, C, H, W)) -> the call's `latents`; None if they are the same.
        unpack: (pipe, velocity, shape (K, C, H, W)) -> the velocity in that shape; None if it has it.
        clock: given if the class rounds time to the model's precision on the way; see `prompt.exact_time`.
    """

    encode: Callable[[Any, str, str | None, int], Arguments]
    blank: Callable[[Any, int], Arguments]
    guided: Callable[[Any, float], bool] = lambda pipe, guidance: guidance > 1
    scale: str = "guidance_scale"
    options: Arguments = field(default_factory=dict)
    tokenizer: str = "tokenizer"
    around: Callable[[Any], int] = lambda pipe: 0
    most: Callable[[Mapping[str, Any]], int] | None = None
    beside: int = 0
    patch: int = 2
    fold: int = 1
    down: int = 1
    pack: Callable[[Any, Tensor], Tensor] | None = None
    unpack: Callable[[Any, Tensor, tuple[int, ...]], Tensor] | None = None
    clock: Clock | None = None

    def shape(self, pipe: Any, height: int, width: int) -> tuple[int, int, int]:
        """The shape (C, H, W) of a state, for a picture of height x width pixels.

        Raises:
            ValueError: a side is no positive multiple of the model's patch.
        """
        factor = pipe.vae_scale_factor
        patch = factor * self.patch
        if height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"height and width must be multiples of {patch}; got {height} x {width}")
        side = factor * self.down
        return pipe.transformer.config.in_channels // self.fold, height // side, width // side

    def default(self, pipe: Any, argument: str) -> Any:
        """The default of an argument of the pipeline's `__call__`."""
        return inspect.signature(type(pipe).__call__).parameters[argument].default

    def tokens(self, pipe: Any, config: Mapping[str, Any] | None = None) -> int:
        """The most tokens of a text that a model was made for, and that its tokenizer, if it is there, passes on.

        `config` is that of the transformer, for a pipeline without it.
        """
        config = pipe.transformer.config if config is None else config
        most = self.most(config) if self.most else self.default(pipe, "max_sequence_length")
        reader = getattr(pipe, self.tokenizer)
        return most if reader is None else min(most, reader.model_max_length)

    def call(self, pipe: Any, guidance: float) -> Arguments:
        """The arguments of `__call__` for a guidance scale. A distilled pipeline gets 1; it would warn of any other."""
        distilled = pipe.config.get("is_distilled", False)
        return {self.scale: 1.0 if distilled else guidance, **self.options}


def family(pipe: Any) -> Family:
    """The family of a pipeline, or of a pipeline class given by its name.

    Raises:
        ValueError: the class is not supported.
    """
    names = [pipe] if isinstance(pipe, str) else [cls.__name__ for cls in type(pipe).__mro__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(f"{names[0]} is not supported; supported are {', '.join(FAMILIES)}")


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError unless a scheduler is made for flow models."""
    flow = any("FlowMatch" in cls.__name__ for cls in type(scheduler).__mro__)
    if not flow and not scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"the scheduler, {type(scheduler).__name__}, is not made for flow models; "
            "use FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas=True"
        )


def _pack(pipe: Any, x: Tensor) -> Tensor:
    return pipe._pack_latents(x, *x.shape)


def _unpack(pipe: Any, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    height, width = (side * pipe.vae_scale_factor for side in shape[-2:])
    return pipe._unpack_latents(v, height, width, pipe.vae_scale_factor).reshape(shape)  # some have a frame axis


def _tokens_last(pipe: Any, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    return v.transpose(1, 2).reshape(shape)


def _named(pipe: Any, names: tuple[str, ...], text: str, negative: str | None, tokens: int, **more: Any) -> Arguments:
    """What `encode_prompt` returns for both texts at once, by the names of `__call__`'s arguments, if not empty."""
    guided = negative is not None
    values = pipe.encode_prompt(
        text, do_classifier_free_guidance=guided, negative_prompt=negative, max_sequence_length=tokens, **more
    )
    return {name: value for name, value in zip(names, values, strict=True) if value is not None and len(value)}


def _opening(pipe: Any) -> int:
    """The tokens of a chat template before the text."""
    chat = pipe.tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False)
    return len(pipe.tokenizer(chat.split("@@")[0]).input_ids)


def _flux(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=tokens)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _flux2_klein(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    texts = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    return {
        name: pipe.encode_prompt(words, max_sequence_length=tokens)[0]
        for name, words in texts.items()
        if words is not None
    }


def _stable_diffusion_3(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return _named(pipe, names, text, negative, tokens, prompt_2=None, prompt_3=None)


def _qwen_image(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    out = {}
    for prefix, words in (("", text), ("negative_", negative)):
        if words is not None:
            embeds, mask = pipe.encode_prompt(words, max_sequence_length=tokens)
            out[f"{prefix}prompt_embeds"] = embeds
            # No mask means that all tokens count, but the call warns if it is given none.
            out[f"{prefix}prompt_embeds_mask"] = embeds.new_ones(embeds.shape[:2]).long() if mask is None else mask
    return out


def _z_image(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    return _named(pipe, ("prompt_embeds", "negative_prompt_embeds"), text, negative, tokens)


def _sana(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    instruction = FAMILIES["SanaPipeline"].default(pipe, "complex_human_instruction")
    return _named(pipe, names, text, negative, tokens, complex_human_instruction=instruction)


def _empty(*shape: int) -> Tensor:
    """A tensor (1, *shape) without values, on the meta device."""
    return torch.empty((1, *shape), device="meta", dtype=torch.bfloat16)


FAMILIES = {
    "FluxPipeline": Family(
        _flux,
        blank=lambda c, n: {
            "prompt_embeds": _empty(n, c.joint_attention_dim),
            "pooled_prompt_embeds": _empty(c.pooled_projection_dim),
        },
        guided=lambda pipe, guidance: False,
        tokenizer="tokenizer_2",
        around=lambda pipe: 1,
        most=lambda c: 512 if c.get("guidance_embeds") else 256,  # dev; schnell
        fold=4,
        pack=_pack,
        unpack=_unpack,
        clock=Clock("time_text_embed.time_proj", 1000.0),
    ),
    "Flux2KleinPipeline": Family(
        _flux2_klein,
        blank=lambda c, n: {"prompt_embeds": _empty(n, c.joint_attention_dim)},
        guided=lambda pipe, guidance: guidance > 1 and not pipe.config.is_distilled,
        around=_opening,
        down=2,
        unpack=_tokens_last,
        clock=Clock("time_guidance_embed.time_proj", 1000.0),
    ),
    "StableDiffusion3Pipeline": Family(
        _stable_diffusion_3,
        blank=lambda c, n: {
            "prompt_embeds": _empty(n, c.joint_attention_dim),
            "pooled_prompt_embeds": _empty(c.pooled_projection_dim),
        },
        tokenizer="tokenizer_3",
        around=lambda pipe: 1,
        beside=77,  # CLIP's
    ),
    "QwenImagePipeline": Family(
        _qwen_image,
        blank=lambda c, n: {"prompt_embeds": _empty(n, c.joint_attention_dim)},
        scale="true_cfg_scale",
        fold=4,
        pack=_pack,
        unpack=_unpack,
        clock=Clock("time_text_embed.time_proj", 1.0),
    ),
    "ZImagePipeline": Family(
        _z_image,
        blank=lambda c, n: {"prompt_embeds": [_empty(n, c.cap_feat_dim)[0]]},
        guided=lambda pipe, guidance: guidance > 0,
        around=_opening,
    ),
    "SanaPipeline": Family(
        _sana,
        blank=lambda c, n: {
            "prompt_embeds": _empty(n, c.caption_channels),
            "prompt_attention_mask": _empty(n).long(),
        },
        options={"use_resolution_binning": False, "negative_prompt": None},
        around=lambda pipe: 2,
        patch=1,
    ),
}
