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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import schedules
from ..interpolants import LINEAR
from ..kernels import Kernel
from ..rewards import Reward, chunked, decoded
from ..schedules import Times
from ..search import Problem, Result
from . import families, hub

KNOWN: WeakKeyDictionary[Any, dict[tuple[str, str | None, int | None], families.Arguments]] = WeakKeyDictionary()
"""The texts that each pipeline has encoded, by (text, negative text, token limit); forgotten with the pipeline."""

IMAGE_TO_IMAGE = ("FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "ZImagePipeline")
"""The pipelines for which diffusers has a sibling that starts from a picture."""


def encode_text(
    pipe: Any, text: str, negative: str | None, tokens: int | None, config: Mapping[str, Any] | None = None
) -> families.Arguments:
    """The arguments of the pipeline's `__call__` that stand for a prompt. A pipeline encodes each prompt once.

    `tokens` limits the text; None stands for what the model was made for. `config` is that of a transformer not loaded.
    """
    known, key = KNOWN.setdefault(pipe, {}), (text, negative, tokens)
    if key not in known:
        if not families.text_encoders(pipe):
            raise ValueError(f"this pipeline was loaded without text encoders, and had not been given {text!r}")
        pipe.maybe_free_model_hooks()  # makes room where models change places
        family = families.family(pipe)
        limit = family.tokens(pipe, config) if tokens is None else tokens
        with torch.no_grad(), hub.quiet():
            known[key] = family.encode(pipe, _readable(pipe, text, limit), negative, limit)
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

    if reader.unk_token_id is not None:
        text = re.sub(r"\S+", known, text)
    tokens, room = reader(text, add_special_tokens=False).input_ids, max(0, limit - family.around(pipe))
    if unknown:
        warnings.warn(f"the model does not know these words of the prompt: {', '.join(unknown)}", stacklevel=4)
    if len(tokens) > room:
        read = " ".join(reader.decode(tokens[:room]).split()[-5:])
        what = f"the prompt has {len(tokens)} tokens and the model reads {room}, up to '... {read}'"
        warnings.warn(f"{what}; a judge of the whole prompt asks for more", stacklevel=4)
    return text


def _cast(arguments: families.Arguments, dtype: torch.dtype, device: Any = None) -> families.Arguments:
    """The arguments on another device and their floating-point tensors, also those in lists, in another precision."""
    return tree_map(lambda v: v.to(device=device, dtype=dtype if v.is_floating_point() else None), arguments)


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
    due = False  # the first sinusoid of a forward pass is that of time; one of the guidance scale may follow

    def begin(*_: Any) -> None:
        nonlocal due
        due = True

    def replace(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal due
        if not due:
            return args
        due, now, scheduler = False, t, pipe.scheduler
        if now is None:
            index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
            now = float(scheduler.sigmas[index or 0])
        return (torch.full_like(args[0], now, dtype=torch.float32) * clock.unit, *args[1:])

    with ExitStack() as hooks:
        hooks.callback(transformer.register_forward_pre_hook(begin).remove)
        hooks.callback(transformer.get_submodule(clock.sinusoid).register_forward_pre_hook(replace).remove)
        yield


class _Listener:
    """A stand-in for the scheduler. The pipeline's loop runs once, at the time t, or not at all if t is None.

    `asked` are the arguments of `set_timesteps`, which would make the grid; `velocity` is what `step` was handed.
    """

    order = 1

    def __init__(self, scheduler: Any, t: float | None = None):
        self.config, self.t = scheduler.config, t
        self.asked: dict[str, Any] = {}
        self.velocity: Any = None

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None):
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "mu": mu}
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
    """A pipeline with a prompt, as a velocity: a call with states and times gives eps - x0.

    The velocity, the time grid and the picture of a latent all come from the pipeline's own `__call__`. It is run with
    a listener in the scheduler's place, which is handed the velocity.

    Attributes:
        pipe: the pipeline, of one of `families.FAMILIES`; it is left as it was.
        encoded: the arguments of its `__call__` that stand for the prompt, in the pipeline's precision and on its
            device. If the pipeline is moved or cast, call `encode` again, which is quick.
        height, width: of the picture, in pixels.
        guidance: its scale. Guidance is distilled into the model, or takes a second forward pass, which doubles `cost`.
        chunk: rows in one forward pass.
        preview: a small autoencoder (`AutoencoderTiny`) that decodes what a search judges; None for the pipeline's own.
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
        cls, pipe: Any, text: str, *, height: int | None = None, width: int | None = None,
        guidance: float | None = None, negative: str = "", chunk: int = 16, max_tokens: int | None = None,
        preview: Any = None,
    ) -> FlowModel:  # fmt: skip
        """Encode `text`, unless this pipeline has encoded it before.

        Sides and guidance are by default the model's own. `negative` is the text that guidance leads away from, where
        it takes a second forward pass. `max_tokens` of the text count; if None, as many as the model was made for.

        Raises ValueError if the pipeline is not supported, a side is no positive multiple of the latent patch, another
        number is out of range, the preview is of other latents, or the text is new to a pipeline without text encoders.
        """
        family = families.family(pipe)
        height, width = (native_size(pipe) if side is None else side for side in (height, width))
        family.shape(pipe, height, width)
        if chunk < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"chunk must be at least 1, and so must max_tokens; got {chunk} and {max_tokens}")
        if preview is not None and preview.config.latent_channels != pipe.vae.config.latent_channels:
            channels = preview.config.latent_channels, pipe.vae.config.latent_channels
            raise ValueError("the preview decodes latents of {} channels, the model has {}".format(*channels))
        guidance = family.guidance(pipe, guidance)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number; got {guidance}")
        encoded = encode_text(pipe, text, negative if family.guided(pipe, guidance) else None, max_tokens)
        return cls(pipe, encoded, height, width, guidance, chunk, preview)

    @property
    def family(self) -> families.Family:
        return families.family(self.pipe)

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

        No config of another family says. Models made for few steps (FLUX.2-klein, SD3.5-large-turbo, Z-Image-Turbo) run
        without guidance, so others are taken to be those that guidance runs twice. Give a turbo model `guidance=0`.
        """
        if type(self.pipe).__name__ == "FluxPipeline":
            return bool(self.pipe.transformer.config.guidance_embeds)
        return self.cost > 1

    @property
    def device(self) -> torch.device:
        """The device that the pipeline computes on."""
        return self.pipe._execution_device

    def times(self, steps: int) -> Times:
        """The time grid that `pipe(..., num_inference_steps=steps)` runs on, with its shift for the resolution."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        families.check_scheduler(self.pipe.scheduler)
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)  # the pipeline's stays untouched
        asked = self._ask(torch.zeros(1, *self.shape, device=self.device), steps=steps)[1].asked
        scheduler.set_timesteps(**asked)
        return schedules.check(scheduler.sigmas.tolist())

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
        unpack = self.family.unpack
        return (v if unpack is None else unpack(self.pipe, v, x.shape)).to(x.dtype)

    def decode(self, x: Tensor, chunk: int | None = None, *, preview: bool = False) -> Tensor:
        """Latents (K, C, H, W) -> pictures (K, 3, height, width) in [0, 1], `chunk` rows, at least 1, at a time."""
        vae = self.preview if preview else self.pipe.vae
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return chunked(lambda rows: self._ask(rows, vae=vae)[0].float(), self.chunk if chunk is None else chunk)(x)

    def latents(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (K, 3, height, width) in [0, 1] -> their latents (K, C, H, W), float32, by the pipeline's VAE.

        What `decode` undoes. For image-to-image start at a time t below 1 from (1 - t) latents + t noise. With a
        generator the latents are drawn from the VAE's distribution, if it has one, as diffusers does; else its mean.

        Raises ValueError if the pictures are of another size, or diffusers has no image-to-image for such pipelines.
        """
        size, pipe = (self.height, self.width), self.pipe
        if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2:] != size:
            raise ValueError(f"pictures must be (K, 3, {size[0]}, {size[1]}); got {tuple(pictures.shape)}")
        vae, kind = pipe.vae, type(pipe).__name__
        if kind not in IMAGE_TO_IMAGE:
            raise ValueError(f"pictures cannot be the start with {kind}, only with {', '.join(IMAGE_TO_IMAGE)}")
        video = vae.config.get("latents_mean") is not None  # Qwen-Image's: pictures are videos of one frame
        pictures = 2 * pictures.to(self.device, vae.dtype) - 1
        with torch.no_grad():
            found = vae.encode(pictures.unsqueeze(2) if video else pictures)
        if hasattr(found, "latent_dist"):
            found = found.latent_dist.mode() if generator is None else found.latent_dist.sample(generator)
        else:  # AutoencoderTiny
            found = found.latents
        if video:
            mean, std = (found.new_tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
            return ((found.squeeze(2) - mean) / std).float()
        return ((found - vae.config.shift_factor) * vae.config.scaling_factor).float()

    def leaders(self, result: Result, reward: Reward, number: int = 4) -> tuple[Tensor, Tensor]:
        """The best finished particles of a search that judged previews, decoded in full and judged again.

        Returns their pictures (number, 3, height, width) and new rewards (number,), best first.
        """
        p = result.particles
        pictures = self.decode(p.x[p.reward.argsort(descending=True)[:number]])
        rewards, order = reward(pictures).sort(descending=True)
        return pictures[order], rewards

    @functools.cached_property
    def _twin(self) -> Any:
        """The same parts, without progress bars and fixed to a device, which diffusers looks for in every call."""
        base: Any = type(self.pipe)

        class Twin(base):
            _execution_device = self.device

            def maybe_free_model_hooks(self) -> None:
                pass

        twin = Twin(**self.pipe.components, **families.settings(self.pipe.config))
        twin.set_progress_bar_config(disable=True)
        return twin

    def _ask(self, x: Tensor, t: float | None = None, *, steps: int = 1, vae: Any = None) -> tuple[Tensor, _Listener]:
        """What the pipeline's `__call__` makes of latents x at one time or none, pictures if by `vae`; the listener."""
        pipe, listener, encoded = copy.copy(self._twin), _Listener(self.pipe.scheduler, t), self.encoded
        pipe.scheduler = listener
        if vae is not None:
            # The call casts latents to the precision of `encoded`. (`vae.dtype` would walk through all of its modules.)
            pipe.vae, encoded = vae, _cast(encoded, next(vae.parameters()).dtype)
        call = inspect.unwrap(type(pipe).__call__)  # without its no_grad, for a gradient may be wanted
        kind = "latent" if vae is None else "pt"
        given: families.Arguments = {"height": self.height, "width": self.width, "num_inference_steps": steps}
        given["latents"] = x if self.family.pack is None else self.family.pack(pipe, x)
        for name, one in encoded.items():  # of one prompt, for a batch of rows
            given[name] = one * len(x) if isinstance(one, list) else one.repeat_interleave(len(x), 0)
        given |= self.family.call(pipe, self.guidance)
        output = call(pipe, output_type=kind, return_dict=False, **given)[0]
        return output, listener

    def problem(
        self, reward: Reward, kernel: Kernel, steps: int = 10, times: Times | None = None,
        decode_chunk: int | None = None,
    ) -> Problem:  # fmt: skip
        """The search problem of this prompt, on the pipeline's own grid of so many steps, or on the grid `times`.

        The reward judges pictures (K, 3, height, width), which `preview` decodes if there is one, `decode_chunk` rows
        (at least 1; `chunk` if None) at a time.
        """
        rows = self.chunk if decode_chunk is None else decode_chunk
        if rows < 1:
            raise ValueError(f"decode_chunk must be at least 1; got {rows}")
        judged = decoded(functools.partial(self.decode, preview=self.preview is not None), reward, rows)
        grid = self.times(steps) if times is None else times
        return Problem(self, judged, LINEAR, kernel, grid, self.shape, device=self.device, cost=self.cost)


def native_size(pipe: Any) -> int:
    """The side, in pixels, of the pictures that a model was made for: the default of `__call__`."""
    if type(pipe).__name__ == "FluxPipeline":  # a small FLUX draws small pictures: its scheduler knows fewer tokens
        return math.isqrt(pipe.scheduler.config.max_image_seq_len) * 2 * pipe.vae_scale_factor
    sites = getattr(pipe, "default_sample_size", None) or getattr(pipe.transformer.config, "sample_size", None)
    return sites * pipe.vae_scale_factor if sites else 1024
