"""Which diffusers pipelines can be searched, and the little that has to be known of each.

`FlowModel` runs a pipeline's own `__call__` and listens in the scheduler's place. Every flow-matching pipeline hands
the velocity eps - x0 to its scheduler, whatever its transformer predicts. So clocks, signs, guidance formulas, time
grids and decoding are diffusers' own. What has to be known: how a prompt is encoded and given to the call, the shape
in which noise is drawn, how a state becomes the call's `latents`, and when guidance runs the model twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
"""Keyword arguments of a pipeline's `__call__`."""


class Clock(NamedTuple):
    """Where a transformer takes the sinusoid of time: the name of the module, and what that module gets at time 1."""

    sinusoid: str
    unit: float


@dataclass(frozen=True)
class Family:
    """What has to be known of a pipeline class."""

    encode: Callable[[Any, str, str | None, int], Arguments]  # pipe, text, negative text if needed, token limit
    blank: Callable[[Any, int], Arguments]  # transformer's config, tokens -> what `encode` gives, without values
    guided: Callable[[Any, float], bool] = lambda pipe, guidance: guidance > 1  # whether it runs the model twice
    scale: str = "guidance_scale"  # the name of `__call__`'s argument for the guidance scale
    options: Arguments = field(default_factory=dict)  # further arguments of `__call__`
    tokenizer: str = "tokenizer"  # which reads all of a text
    around: Callable[[Any], int] = lambda pipe: 0  # tokens within the limit that are not the text's own
    most: Callable[[Mapping[str, Any]], int] | None = None  # transformer's config -> token limit; None: `__call__`'s
    beside: int = 0  # tokens that the transformer reads besides those of the limit
    patch: int = 2  # the sides of a picture are multiples of this many cells of the autoencoder's grid
    down: int = 1  # cells of the autoencoder's grid for each cell of a state, along a side
    pack: Callable[[Any, Tensor], Tensor] | None = None  # state (K, C, H, W) -> `latents`, patches of 2 x 2
    unpack: Callable[[Any, Tensor, tuple[int, ...]], Tensor] | None = None  # velocity, (K, C, H, W) -> in that shape
    clock: Clock | None = None  # if the class rounds time to the model's precision: see `prompt.exact_time`

    def shape(self, pipe: Any, height: int, width: int) -> tuple[int, int, int]:
        """The shape (C, H, W) of a state, for a picture of height x width pixels.

        Raises ValueError unless both sides are positive multiples of the model's patch.
        """
        factor = pipe.vae_scale_factor
        patch = factor * self.patch
        if height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"height and width must be multiples of {patch}; got {height} x {width}")
        side, fold = factor * self.down, 4 if self.pack else 1
        return pipe.transformer.config.in_channels // fold, height // side, width // side

    def default(self, pipe: Any, argument: str) -> Any:
        """The default of an argument of the pipeline's `__call__`."""
        return inspect.signature(type(pipe).__call__).parameters[argument].default

    def guidance(self, pipe: Any, guidance: float | None) -> float:
        """The guidance scale; the default of the pipeline's `__call__` for None."""
        return self.default(pipe, self.scale) if guidance is None else guidance

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
        return {self.scale: 1.0 if settings(pipe.config) else guidance, **self.options}


def family(pipe: Any) -> Family:
    """The family of a pipeline, or of a class given by its name. Raises ValueError if the class is not supported."""
    names = [pipe] if isinstance(pipe, str) else [cls.__name__ for cls in type(pipe).__mro__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(f"{names[0]} is not supported; supported are {', '.join(FAMILIES)}")


def settings(config: Mapping[str, Any]) -> dict[str, bool]:
    """What a pipeline of this config is built with besides its parts: `is_distilled`, if it is."""
    return {"is_distilled": True} if config.get("is_distilled") else {}


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The text encoders of a pipeline; where there are several, the last is the large one."""
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError unless a scheduler is made for flow models."""
    flow = any("FlowMatch" in cls.__name__ for cls in type(scheduler).__mro__)
    if not flow and not scheduler.config.get("use_flow_sigmas"):
        use = "use FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas=True"
        raise ValueError(f"the scheduler, {type(scheduler).__name__}, is not made for flow models; {use}")


def _pack(pipe: Any, x: Tensor) -> Tensor:
    return pipe._pack_latents(x, *x.shape)


def _unpack(pipe: Any, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    height, width = (side * pipe.vae_scale_factor for side in shape[-2:])
    return pipe._unpack_latents(v, height, width, pipe.vae_scale_factor).reshape(shape)  # some have a frame axis


def _opening(pipe: Any) -> int:
    """The tokens of a chat template before the text."""
    chat = pipe.tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False)
    return len(pipe.tokenizer(chat.split("@@")[0]).input_ids)


def _named(*names: str, **options: Any) -> Callable[[Any, str, str | None, int], Arguments]:
    """Encoding where `encode_prompt` takes both texts and returns arguments of `__call__` by these names, or None."""

    def encode(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
        guided = negative is not None
        texts = {"do_classifier_free_guidance": guided, "negative_prompt": negative, "max_sequence_length": tokens}
        values = pipe.encode_prompt(text, **texts, **options)
        return {name: value for name, value in zip(names, values, strict=True) if value is not None and len(value)}

    return encode


def _flux(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=tokens)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _one_by_one(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    texts = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    given = {name: words for name, words in texts.items() if words is not None}
    return {name: pipe.encode_prompt(words, max_sequence_length=tokens)[0] for name, words in given.items()}


def _qwen_image(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    """With masks by which all tokens count: `encode_prompt` leaves such masks out, and the call warns of their lack."""
    out = _one_by_one(pipe, text, negative, tokens)
    return out | {f"{name}_mask": embeds.new_ones(embeds.shape[:2]).long() for name, embeds in out.items()}


def _sana(pipe: Any, text: str, negative: str | None, tokens: int) -> Arguments:
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    instruction = FAMILIES["SanaPipeline"].default(pipe, "complex_human_instruction")
    return _named(*names, complex_human_instruction=instruction)(pipe, text, negative, tokens)


def _empty(*shape: int) -> Tensor:
    """A tensor (1, *shape) without values, on the meta device."""
    return torch.empty((1, *shape), device="meta", dtype=torch.bfloat16)


def _tokens(config: Any, n: int) -> Arguments:
    return {"prompt_embeds": _empty(n, config.joint_attention_dim)}


def _tokens_and_pooled(config: Any, n: int) -> Arguments:
    return _tokens(config, n) | {"pooled_prompt_embeds": _empty(config.pooled_projection_dim)}


_STABLE_DIFFUSION_3 = [
    f"{name}_embeds" for name in ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt")
]
# fmt: off
FAMILIES = {
    "FluxPipeline": Family(
        _flux, _tokens_and_pooled, guided=lambda pipe, guidance: False, tokenizer="tokenizer_2", around=lambda pipe: 1,
        most=lambda config: 512 if config.get("guidance_embeds") else 256,  # dev; schnell
        pack=_pack, unpack=_unpack, clock=Clock("time_text_embed.time_proj", 1000.0),
    ),
    "Flux2KleinPipeline": Family(
        _one_by_one, _tokens, guided=lambda pipe, guidance: guidance > 1 and not pipe.config.is_distilled,
        around=_opening, down=2, unpack=lambda pipe, v, shape: v.transpose(1, 2).reshape(shape),
        clock=Clock("time_guidance_embed.time_proj", 1000.0),
    ),
    "StableDiffusion3Pipeline": Family(
        _named(*_STABLE_DIFFUSION_3, prompt_2=None, prompt_3=None), _tokens_and_pooled, tokenizer="tokenizer_3",
        around=lambda pipe: 1, beside=77,  # CLIP's
    ),
    "QwenImagePipeline": Family(
        _qwen_image, _tokens, scale="true_cfg_scale", pack=_pack, unpack=_unpack,
        clock=Clock("time_text_embed.time_proj", 1.0),
    ),
    "ZImagePipeline": Family(
        _named("prompt_embeds", "negative_prompt_embeds"),
        lambda config, n: {"prompt_embeds": [_empty(n, config.cap_feat_dim)[0]]},
        guided=lambda pipe, guidance: guidance > 0, around=_opening,
    ),
    "SanaPipeline": Family(
        _sana,
        lambda c, n: {"prompt_embeds": _empty(n, c.caption_channels), "prompt_attention_mask": _empty(n).long()},
        options={"use_resolution_binning": False, "negative_prompt": None}, around=lambda pipe: 2, patch=1,
    ),
}
# fmt: on
