"""A diffusers pipeline, tiny-flux, FLUX.1 or one of its relatives, as a Problem: prompt, velocity, time grid, decoder.

States are unpacked latents (C, H, W) in float32, drawn as diffusers draws them: the same generator gives the picture
that `pipe(prompt, generator=...)` gives. Whatever the model's own precision and batch size, only this file knows.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import schedules
from ..interpolants import LINEAR
from ..kernels import Kernel
from ..rewards import Reward, chunked, decoded
from ..search import Problem, Result
from . import families


def encode_text(pipe: Any, text: str, negative: str | None = None, tokens: int | None = None) -> families.Arguments:
    """The arguments of the pipeline's `__call__` that stand for a prompt; each prompt is encoded once a pipeline.

    Raises:
        ValueError: the text is new, and the pipeline holds no text encoder.
    """
    known, key = known_texts(pipe), (text, negative, tokens)
    if key not in known:
        if all(part is None for name, part in pipe.components.items() if name.startswith("text_encoder")):
            raise ValueError(
                f"this pipeline was loaded without text encoders, and had not been given {text!r} to encode"
            )
        pipe.maybe_free_model_hooks()  # makes room where models change places
        with torch.no_grad():
            known[key] = families.family(pipe).encode(pipe, text, negative, tokens)
    model = pipe.transformer
    return known[key] if model is None else _cast(known[key], model.dtype, pipe._execution_device)


def known_texts(pipe: Any) -> dict[tuple[str, str | None, int | None], families.Arguments]:
    """What a pipeline has encoded: by text, negative text and token limit."""
    return pipe.__dict__.setdefault("_known_texts", {})


def _cast(arguments: families.Arguments, dtype: torch.dtype, device: Any = None) -> families.Arguments:
    """Arguments with their tensors, also those in lists, in another precision (unless they count) and place."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(part) for part in value]
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return {name: cast(value) for name, value in arguments.items()}


def _repeated(arguments: families.Arguments, rows: int) -> families.Arguments:
    """The encoding of one prompt for a batch of rows."""
    return {
        name: value * rows if isinstance(value, list) else value.repeat_interleave(rows, 0)
        for name, value in arguments.items()
    }


@contextmanager
def exact_time(pipe: Any, t: float | None = None) -> Iterator[None]:
    """Within it, the transformer is told the time t, or if None that of the scheduler's next step, in float32.

    FLUX, FLUX.2 and Qwen-Image round time to the model's precision before they take its sinusoid. bfloat16 has 8 bits,
    so that near t = 1 there is one time in every 0.004, and neighbours on a fine grid become one. `FlowModel` uses
    this; so can you, around a call of a pipeline in half precision.
    """

    def now() -> float:
        if t is not None:
            return t
        scheduler = pipe.scheduler
        index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
        return float(scheduler.sigmas[index or 0])

    clock, transformer = families.family(pipe).clock, pipe.transformer
    if clock is None:
        yield
        return
    fresh = [False]  # the sinusoid may be taken of the guidance scale too, always after that of time

    def begin(module: Any, args: Any) -> None:
        fresh[0] = True

    def replace(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not fresh[0]:
            return None
        fresh[0] = False
        return (torch.full_like(args[0], now(), dtype=torch.float32) * clock.unit, *args[1:])

    hooks = [
        transformer.register_forward_pre_hook(begin),
        transformer.get_submodule(clock.sinusoid).register_forward_pre_hook(replace),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Listener:
    """In a scheduler's place: the pipeline runs its loop at the one time given, or at none, and what it hands over
    stays here."""

    order = 1

    def __init__(self, scheduler: Any, t: float | None = None):
        self.scheduler, self.config, self.t = scheduler, scheduler.config, t
        self.asked: dict[str, Any] = {}
        self.velocity: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        self.asked = {name: value for name, value in given.items() if value is not None}
        times = [] if self.t is None else [self.t * self.config.num_train_timesteps]
        self.timesteps = torch.tensor(times, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
        self.velocity = model_output
        return (sample,)


@dataclass(frozen=True)
class FlowModel:
    """A prompt on a pipeline, encoded once; calls give the velocity.

    Every question is put to the pipeline's own `__call__`, with a listener in its scheduler's place: the velocity at a
    state and time, the time grid, the picture of a latent.

    Attributes:
        pipe: the pipeline, of one of `families.FAMILIES`; it is left as it was.
        encoded: the arguments of its `__call__` that stand for the prompt, in the precision and on the device that the
            pipeline had. Once it has another, `encode` again, which is quick.
        height, width: of the picture, in pixels.
        guidance: guidance scale; distilled, or with a second forward, which doubles `cost`. Not used by a model that
            has neither.
        chunk: rows a forward pass.
        preview: a small autoencoder to judge pictures by in a search (`AutoencoderTiny`); None for the pipeline's own.
    """

    pipe: Any = field(repr=False)
    encoded: families.Arguments = field(repr=False)
    height: int
    width: int
    guidance: float
    chunk: int
    preview: Any = field(default=None, repr=False)

    @classmethod
    def encode(
        cls,
        pipe: Any,
        text: str,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        chunk: int = 16,
        max_tokens: int | None = None,
        preview: Any = None,
    ) -> FlowModel:
        """Encode `text`, unless this pipeline has encoded it before.

        Args:
            height, width: the model's own size if None.
            guidance: the default of the pipeline's `__call__` if None.
            negative: what guidance leads away from, where it takes a second forward.
            max_tokens: the tokenizer's limit (at most 512) or `__call__`'s default if None.

        Raises:
            ValueError: an unsupported pipeline; a side that is no positive multiple of the latent patch; chunk < 1;
                guidance that is no finite number; a text that is new to a pipeline without text encoders.
        """
        family = families.family(pipe)
        height, width = (native_size(pipe) if side is None else side for side in (height, width))
        family.shape(pipe, height, width)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {chunk}")
        guidance = family.default(pipe, family.scale) if guidance is None else guidance
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number; got {guidance}")
        encoded = encode_text(pipe, text, negative if family.guided(pipe, guidance) else None, max_tokens)
        return cls(pipe, encoded, height, width, guidance, chunk, preview)

    @property
    def family(self) -> families.Family:
        return families.family(self.pipe)

    @property
    def embeds(self) -> Tensor:
        """The encoded prompt (1, L, d); its pooled encoding (1, d), where there is one, is `pooled`."""
        return self.encoded["prompt_embeds"]

    @property
    def pooled(self) -> Tensor:
        return self.encoded["pooled_prompt_embeds"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents: (C, H, W)."""
        return self.family.shape(self.pipe, self.height, self.width)

    @property
    def cost(self) -> int:
        """NFE of one row: 2 where guidance runs the model twice."""
        return 1 + self.family.guided(self.pipe, self.guidance)

    @property
    def multi_step(self) -> bool:
        """Whether the model needs many steps (FLUX.1-dev) or few (schnell, which has no guidance embedding).

        Other models say nothing of it. Those made for few steps (klein, SD3.5-large-turbo, Z-Image-Turbo) run without
        guidance, so a model is taken to need many where guidance runs it twice: give a turbo `guidance=0`.
        """
        if type(self.pipe).__name__ == "FluxPipeline":
            return bool(self.pipe.transformer.config.guidance_embeds)
        return self.cost > 1

    def times(self, steps: int) -> tuple[float, ...]:
        """The grid that `pipe(..., num_inference_steps=steps)` runs on, resolution shift included.

        Raises:
            ValueError: steps < 1, or the pipeline's scheduler is not one for flow models.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)  # the pipeline's stays untouched
        asked = self._ask(torch.zeros(1, *self.shape, device=self.device), steps=steps)[1].asked
        scheduler.set_timesteps(**asked)
        return schedules.check(scheduler.sigmas.tolist())

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity eps - x0 at latents x (K, C, H, W) and times t (K,), `chunk` rows at a time."""
        groups = [(t == time).nonzero()[:, 0] for time in t.unique()]  # a call of the pipeline has one time
        chunks = [rows for group in groups for rows in group.split(self.chunk)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            parts = [self.velocity(x[rows], float(t[rows[0]])) for rows in chunks]
            return torch.cat(parts)[torch.cat(chunks).argsort()]

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """The same at one time for all rows, in one forward pass."""
        with exact_time(self.pipe, t):
            v = self._ask(x, t)[1].velocity
        assert v is not None
        unpack = self.family.unpack
        return (v if unpack is None else unpack(self.pipe, v, x.shape)).to(x.dtype)

    def decode(self, x: Tensor, chunk: int | None = None, *, preview: bool = False) -> Tensor:
        """Latents (K, C, H, W) -> pictures (K, 3, height, width) in [0, 1], `chunk` rows at a time.

        Raises:
            ValueError: chunk < 1.
        """
        vae = self.preview if preview else self.pipe.vae
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return chunked(lambda rows: self._ask(rows, vae=vae)[0].float(), self.chunk if chunk is None else chunk)(x)

    def leaders(self, result: Result, reward: Reward, number: int = 4) -> tuple[Tensor, Tensor]:
        """The finished particles that previews rank highest, judged again by the full autoencoder, best first.

        Returns pictures (number, 3, height, width) and their rewards (number,); fewer if the search kept fewer.
        """
        p = result.particles
        pictures = self.decode(p.x[p.reward.argsort(descending=True)[:number]])
        rewards = reward(pictures)
        order = rewards.argsort(descending=True)
        return pictures[order], rewards[order]

    @functools.cached_property
    def _listening(self) -> Any:
        """A copy of the pipeline that does not search all modules for its device at every call, shows no progress, and
        moves no models about at the end."""
        pipe, cls = copy.copy(self.pipe), type(self.pipe)
        still = {"_execution_device": self.device, "maybe_free_model_hooks": lambda pipe: None}
        pipe.__class__ = type(cls.__name__, (cls,), still)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _ask(self, x: Tensor, t: float | None = None, *, steps: int = 1, vae: Any = None) -> tuple[Tensor, _Listener]:
        """The pipeline's `__call__` on latents x, at one time or at none; decoded if an autoencoder is given."""
        pipe, listener = copy.copy(self._listening), _Listener(self.pipe.scheduler, t)
        pipe.__dict__["scheduler"] = listener  # past the pipeline's own bookkeeping, which tells of its parts
        encoded = self.encoded
        if vae is not None:
            pipe.__dict__["vae"], encoded = vae, _cast(encoded, vae.dtype)  # the call casts latents as the encoding is
        call = inspect.unwrap(type(pipe).__call__)  # without its no_grad: a gradient may be wanted
        output = call(
            pipe,
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            latents=x if self.family.pack is None else self.family.pack(pipe, x),
            output_type="latent" if vae is None else "pt",
            return_dict=False,
            **self.family.call(pipe, self.guidance),
            **_repeated(encoded, len(x)),
        )[0]
        return output, listener

    def problem(
        self,
        reward: Reward,
        kernel: Kernel,
        steps: int = 10,
        times: tuple[float, ...] | None = None,
        decode_chunk: int | None = None,
    ) -> Problem:
        """The search problem: `reward` judges pictures (K, 3, height, width), the preview's where there is a preview.

        Args:
            times: overrides the pipeline's grid of `steps`.
            decode_chunk: rows decoded and judged at a time; `chunk` if None.

        Raises:
            ValueError: steps < 1, or decode_chunk < 1.
        """
        decode_chunk = self.chunk if decode_chunk is None else decode_chunk
        if decode_chunk < 1:
            raise ValueError(f"decode_chunk must be at least 1; got {decode_chunk}")
        return Problem(
            velocity=self,
            reward=decoded(
                functools.partial(self.decode, preview=self.preview is not None),
                reward,
                chunk=decode_chunk,
            ),
            path=LINEAR,
            kernel=kernel,
            times=self.times(steps) if times is None else times,
            shape=self.shape,
            device=self.device,
            cost=self.cost,
        )


def native_size(pipe: Any) -> int:
    """Side of the pictures a model was made for, in pixels: the default of its `__call__`, and for FLUX.1 that of the
    most tokens its resolution shift knows, so that a small FLUX draws small pictures."""
    if type(pipe).__name__ == "FluxPipeline":
        return math.isqrt(pipe.scheduler.config.max_image_seq_len) * 2 * pipe.vae_scale_factor
    sites = getattr(pipe, "default_sample_size", None) or getattr(pipe.transformer.config, "sample_size", None)
    return sites * pipe.vae_scale_factor if sites else 1024
