"""A diffusers pipeline, tiny-flux, FLUX.1 or one of its relatives, as a Problem: prompt, velocity, time grid, decoder.

States are unpacked latents (C, H, W) in float32. They are drawn as diffusers draws them, so a generator gives the
picture that `pipe(prompt, generator=...)` gives. The model's own precision and batch size matter in this file only.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import schedules
from ..interpolants import LINEAR
from ..kernels import Kernel
from ..rewards import Reward, chunked, decoded
from ..search import Problem, Result
from . import families, hub

_KNOWN: WeakKeyDictionary[Any, dict[tuple[str, str | None, int | None], families.Arguments]] = WeakKeyDictionary()


def known_texts(pipe: Any) -> dict[tuple[str, str | None, int | None], families.Arguments]:
    """The texts that a pipeline has encoded, by (text, negative text, token limit); forgotten with the pipeline."""
    return _KNOWN.setdefault(pipe, {})


def encode_text(
    pipe: Any,
    text: str,
    negative: str | None = None,
    tokens: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> families.Arguments:
    """The arguments of the pipeline's `__call__` that stand for a prompt. A pipeline encodes each prompt once.

    `tokens` limits the text; None stands for what the model was made for. `config` is that of a transformer not loaded.

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
        limit = families.family(pipe).tokens(pipe, config) if tokens is None else tokens
        with torch.no_grad(), hub.quiet():
            known[key] = families.family(pipe).encode(pipe, _readable(pipe, text, limit), negative, limit)
    model = pipe.transformer
    return known[key] if model is None else _cast(known[key], model.dtype, pipe._execution_device)


def _readable(pipe: Any, text: str, limit: int) -> str:
    """The text as the model's tokenizer knows it. Warns of words that it does not know, and of what the limit cuts off.

    A judge that is given the whole text would ask for what the model cannot draw. Words unknown as they stand (to
    tiny-flux those with capitals or full stops) are passed on in lower case and without punctuation, if known so.
    """
    family, unknown = families.family(pipe), []
    reader = getattr(pipe, family.tokenizer)
    if reader is None:  # SD3 without T5
        return text

    def known(word: re.Match[str]) -> str:
        for form in (word[0], re.sub(r"\W", "", word[0]).lower()):
            if reader.unk_token_id not in reader(form, add_special_tokens=False).input_ids:
                return form
        unknown.append(word[0])
        return word[0]

    text = text if reader.unk_token_id is None else re.sub(r"\S+", known, text)
    tokens = reader(text, add_special_tokens=False).input_ids
    room = max(0, limit - family.around(pipe))
    if unknown:
        warnings.warn(f"the model does not know these words of the prompt: {', '.join(unknown)}", stacklevel=4)
    if len(tokens) > room:
        read = " ".join(reader.decode(tokens[:room]).split()[-5:])
        warnings.warn(
            f"the prompt has {len(tokens)} tokens and the model reads {room}, up to '... {read}'; a judge of the whole "
            "prompt asks for more",
            stacklevel=4,
        )
    return text


def _cast(arguments: families.Arguments, dtype: torch.dtype, device: Any = None) -> families.Arguments:
    """The arguments on another device and their floating-point tensors, also those in lists, in another precision."""

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
    """Within it, the transformer is told the time in float32: t, or that of the scheduler's next step if t is None.

    FLUX, FLUX.2 and Qwen-Image round time to the model's precision before they take its sinusoid. bfloat16 has 8 bits,
    so near t = 1 it can tell times apart that differ by 0.004 or more, and neighbours on a fine grid become one.
    `FlowModel` uses this function; you can put it around a call of a pipeline in half precision.
    """
    clock, transformer = families.family(pipe).clock, pipe.transformer
    if clock is None:
        yield
        return
    exact = _ExactTime(functools.partial(_next_time, pipe) if t is None else lambda: t, clock.unit)
    sinusoid = transformer.get_submodule(clock.sinusoid)
    hooks = [
        transformer.register_forward_pre_hook(exact.begin),
        sinusoid.register_forward_pre_hook(exact.replace),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _next_time(pipe: Any) -> float:
    """The time of the step that the pipeline's scheduler takes next."""
    scheduler = pipe.scheduler
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    return float(scheduler.sigmas[index or 0])


class _ExactTime:
    """Two hooks, for a transformer and its sinusoid, that replace the rounded time by the exact one, times a unit.

    A transformer takes the sinusoid of time first. It may take the sinusoid of the guidance scale afterwards, so the
    hook answers to the first call in each forward pass only.
    """

    def __init__(self, now: Callable[[], float], unit: float):
        self.now, self.unit, self.first = now, unit, False

    def begin(self, transformer: Any, args: Any) -> None:
        self.first = True

    def replace(self, sinusoid: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.first:
            return args
        self.first = False
        return (torch.full_like(args[0], self.now(), dtype=torch.float32) * self.unit, *args[1:])


class _Listener:
    """A stand-in for the scheduler. The pipeline's loop runs once, at the time t, or not at all if t is None.

    Attributes:
        asked: the arguments of `set_timesteps`, from which the scheduler would make its time grid.
        velocity: what the pipeline handed to `step`; None before.
    """

    order = 1

    def __init__(self, scheduler: Any, t: float | None = None):
        self.config, self.t = scheduler.config, t
        self.asked: dict[str, Any] = {}
        self.velocity: Tensor | None = None

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "mu": mu}
        self.asked = {name: value for name, value in given.items() if value is not None}
        times = [] if self.t is None else [self.t * self.config.num_train_timesteps]
        self.timesteps = torch.tensor(times, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> tuple[Tensor]:
        self.velocity = model_output
        return (sample,)


def _fixed_to(device: torch.device, cls: Any) -> Any:
    """A pipeline class that stays on a device. diffusers' own walks through all modules twice in every call: to find
    the device, and at the end to move models away."""

    class Pipeline(cls):
        _execution_device = device

        def maybe_free_model_hooks(self) -> None:
            pass

    return Pipeline


@dataclass(frozen=True)
class FlowModel:
    """A pipeline with a prompt, as a velocity: a call with states and times gives eps - x0.

    The velocity, the time grid and the picture of a latent all come from the pipeline's own `__call__`. It is run with
    a listener in the scheduler's place, which is handed the velocity.

    Attributes:
        pipe: the pipeline, of one of `families.FAMILIES`; it is left as it was.
        encoded: the arguments of its `__call__` that stand for the prompt, in the pipeline's precision and on its
            device. If the pipeline is moved or cast, call `encode` again, which is quick.
        height, width: of the picture, in pixels.
        guidance: the guidance scale. Guidance is distilled into the model, or takes a second forward pass, which
            doubles `cost`; a model that has neither ignores it.
        chunk: rows in one forward pass.
        preview: a small autoencoder (`AutoencoderTiny`) that decodes the pictures which a search judges; None for the
            pipeline's own.
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
            height, width: in pixels; the model's own size if None.
            guidance: the default of the pipeline's `__call__` if None.
            negative: the text that guidance leads away from, where guidance takes a second forward pass.
            max_tokens: the most tokens of the text that count; as many as the model was made for if None (FLUX.1-dev
                512, schnell 256).

        Raises:
            ValueError: the pipeline is not supported, a side is no positive multiple of the latent patch, chunk < 1,
                max_tokens < 1, guidance is not finite, or the text is new to a pipeline without text encoders.
        """
        family = families.family(pipe)
        height, width = (native_size(pipe) if side is None else side for side in (height, width))
        family.shape(pipe, height, width)
        if chunk < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"chunk must be at least 1, and so must max_tokens; got {chunk} and {max_tokens}")
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
        """The encoded prompt (1, L, d)."""
        return self.encoded["prompt_embeds"]

    @property
    def pooled(self) -> Tensor:
        """The pooled encoding of the prompt (1, d), for the families that have one."""
        return self.encoded["pooled_prompt_embeds"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one state, a latent picture: (C, H, W)."""
        return self.family.shape(self.pipe, self.height, self.width)

    @property
    def cost(self) -> int:
        """Function evaluations (NFE) of one row: 2 where guidance runs the model twice, else 1."""
        return 1 + self.family.guided(self.pipe, self.guidance)

    @property
    def multi_step(self) -> bool:
        """Whether the model needs many steps to draw a picture, as FLUX.1-dev does and FLUX.1-schnell does not.

        Of FLUX.1 those with a guidance embedding need many. No config of another family says. The models made for few
        steps (FLUX.2-klein, SD3.5-large-turbo, Z-Image-Turbo) run without guidance; so a model of these families is
        taken to need many steps if guidance runs it twice. Give a turbo model `guidance=0`.
        """
        if type(self.pipe).__name__ == "FluxPipeline":
            return bool(self.pipe.transformer.config.guidance_embeds)
        return self.cost > 1

    def times(self, steps: int) -> tuple[float, ...]:
        """The time grid that `pipe(..., num_inference_steps=steps)` runs on, with its shift for the resolution.

        Raises:
            ValueError: steps < 1, or the pipeline's scheduler is not made for flow models.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        families.check_scheduler(self.pipe.scheduler)
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)  # the pipeline's stays untouched
        asked = self._ask(torch.zeros(1, *self.shape, device=self.device), steps=steps)[1].asked
        scheduler.set_timesteps(**asked)
        return schedules.check(scheduler.sigmas.tolist())

    @property
    def device(self) -> torch.device:
        """The device that the pipeline computes on."""
        return self.pipe._execution_device

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity eps - x0 (K, C, H, W) at latents x (K, C, H, W) and times t (K,), `chunk` rows at a time."""
        groups = [(t == time).nonzero()[:, 0] for time in t.unique()]  # one call of the pipeline has one time
        chunks = [rows for group in groups for rows in group.split(self.chunk)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            parts = [self.velocity(x[rows], float(t[rows[0]])) for rows in chunks]
            return torch.cat(parts)[torch.cat(chunks).argsort()]

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """The velocity at latents x (K, C, H, W) and one time t for all rows, in one forward pass."""
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
        """The best pictures of a search that judged previews, decoded in full and judged again.

        Decoded are the `number` finished particles with the highest rewards, or all if the search kept fewer.

        Returns:
            Pictures (number, 3, height, width) and their new rewards (number,), best first.
        """
        p = result.particles
        pictures = self.decode(p.x[p.reward.argsort(descending=True)[:number]])
        rewards, order = reward(pictures).sort(descending=True)
        return pictures[order], rewards

    @functools.cached_property
    def _twin(self) -> Any:
        """A second pipeline of the same parts. It shows no progress and moves no models from device to device."""
        distilled = {"is_distilled": True} if self.pipe.config.get("is_distilled") else {}
        twin = _fixed_to(self.device, type(self.pipe))(**self.pipe.components, **distilled)
        twin.set_progress_bar_config(disable=True)
        return twin

    def _ask(self, x: Tensor, t: float | None = None, *, steps: int = 1, vae: Any = None) -> tuple[Tensor, _Listener]:
        """Run the pipeline's `__call__` on latents x, at the time t or at none.

        Returns its latents, or its pictures if an autoencoder is given, and the listener.
        """
        pipe, listener, encoded = copy.copy(self._twin), _Listener(self.pipe.scheduler, t), self.encoded
        pipe.scheduler = listener
        if vae is not None:
            pipe.vae, encoded = vae, _cast(encoded, vae.dtype)  # the call casts latents to the precision of `encoded`
        call = inspect.unwrap(type(pipe).__call__)  # without its no_grad, for a gradient may be wanted
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
        """The search problem of this prompt.

        Args:
            reward: judges pictures (K, 3, height, width), which `preview` decodes if there is one.
            kernel: the transition from one time to the next.
            steps: of the pipeline's own time grid.
            times: a time grid to use instead.
            decode_chunk: rows decoded and judged at a time; `chunk` if None.

        Raises:
            ValueError: steps < 1, or decode_chunk < 1.
        """
        decode_chunk = self.chunk if decode_chunk is None else decode_chunk
        if decode_chunk < 1:
            raise ValueError(f"decode_chunk must be at least 1; got {decode_chunk}")
        return Problem(
            velocity=self,
            reward=decoded(functools.partial(self.decode, preview=self.preview is not None), reward, decode_chunk),
            path=LINEAR,
            kernel=kernel,
            times=self.times(steps) if times is None else times,
            shape=self.shape,
            device=self.device,
            cost=self.cost,
        )


def native_size(pipe: Any) -> int:
    """The side, in pixels, of the pictures that a model was made for.

    For FLUX.1 it follows from the most tokens that its scheduler knows, so that a small FLUX draws small pictures. For
    others it is the default of `__call__`.
    """
    if type(pipe).__name__ == "FluxPipeline":
        return math.isqrt(pipe.scheduler.config.max_image_seq_len) * 2 * pipe.vae_scale_factor
    sites = getattr(pipe, "default_sample_size", None) or getattr(pipe.transformer.config, "sample_size", None)
    return sites * pipe.vae_scale_factor if sites else 1024
