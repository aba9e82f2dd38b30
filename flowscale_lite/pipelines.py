"""A diffusers FluxPipeline, the tiny one or FLUX.1, as a Problem: prompt, velocity, time grid and decoder.

States are unpacked latents (C, H, W) in float32, drawn as diffusers draws them: the same generator gives the picture
that `pipe(prompt, generator=...)` gives. Whatever the model's own precision and batch size, only this file knows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .interpolants import LINEAR
from .kernels import Kernel
from .rewards import Decoded, Reward
from .search import Problem

_logger = logging.getLogger("transformers.utils.import_utils")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # it would warn that torchvision is missing, which nothing here needs
from diffusers import FluxPipeline  # noqa: E402
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

_logger.setLevel(_level)


def load(model: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """A FluxPipeline from a folder or a hub id, ready for inference on one device.

    Raises:
        FileNotFoundError: `model` is a path that holds no pipeline.
        ValueError: there is no such device, or the model is no FluxPipeline.
    """
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"no such device: {device!r}; use 'cpu' or 'cuda'") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asked for, but torch sees no CUDA GPU; use 'cpu'")
    folder = Path(model)
    if (folder.exists() or folder.is_absolute() or str(model).startswith(".")) and not (
        folder / "model_index.json"
    ).exists():
        raise FileNotFoundError(f"no model at {folder}: expected a diffusers folder with a model_index.json")
    wanted = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    with _quiet() if folder.exists() else nullcontext():  # a download shows its progress, a folder is read at once
        pipe = FluxPipeline.from_pretrained(str(model), **wanted)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.vae.to(memory_format=torch.channels_last)  # the layout in which CPU convolutions are fast
    return pipe.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' loading bars and their surprise at a small autoencoder."""
    logs = (diffusers_logging, transformers_logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


@dataclass(frozen=True)
class Prompt:
    """A prompt on a pipeline, encoded once; calls give the velocity.

    Attributes:
        pipe: the pipeline.
        embeds, pooled: T5 (1, L, d) and CLIP (1, d) encodings.
        height, width: of the picture, in pixels.
        guidance: distilled guidance scale; not used by a model without guidance embedding.
        chunk: rows a forward pass.
    """

    pipe: FluxPipeline
    embeds: Tensor
    pooled: Tensor
    height: int
    width: int
    guidance: float
    chunk: int

    @classmethod
    def encode(
        cls,
        pipe: FluxPipeline,
        text: str,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance: float = 3.5,
        chunk: int = 16,
        max_tokens: int | None = None,
    ) -> Prompt:
        """Encode `text`; a size of None is the model's own, `max_tokens` of None the tokenizer's limit (at most 512).

        Raises:
            ValueError: a side that is no positive multiple of the latent patch, or chunk < 1.
        """
        height, width = height or native_size(pipe), width or native_size(pipe)
        patch = 2 * pipe.vae_scale_factor
        if height % patch or width % patch or min(height, width) < patch or chunk < 1:
            raise ValueError(
                f"height and width must be multiples of {patch} and chunk at least 1; got {height} x {width}, {chunk}"
            )
        limit = max_tokens or min(512, pipe.tokenizer_2.model_max_length)
        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=limit)
        return cls(pipe, embeds, pooled, height, width, guidance, chunk)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents: (C, H, W)."""
        factor = self.pipe.vae_scale_factor
        return self.pipe.transformer.config.in_channels // 4, self.height // factor, self.width // factor

    @property
    def multi_step(self) -> bool:
        """Whether the model needs many steps (dev) or few (schnell): in FLUX the former has a guidance embedding."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    def times(self, steps: int) -> tuple[float, ...]:
        """The grid that `pipe(..., num_inference_steps=steps)` runs on, resolution shift included.

        Raises:
            ValueError: steps < 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)  # the pipeline's stays untouched
        config, tokens = scheduler.config, self.shape[1] * self.shape[2] // 4
        shift = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
        return tuple(scheduler.sigmas.tolist())

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity eps - x0 at latents x (K, C, H, W) and times t (K,), `chunk` rows at a time."""
        pairs = zip(x.split(self.chunk), t.split(self.chunk), strict=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return torch.cat([self._forward(rows, times) for rows, times in pairs])

    def _forward(self, x: Tensor, t: Tensor) -> Tensor:
        pipe, (rows, channels, high, wide), dtype = self.pipe, x.shape, self.embeds.dtype
        packed = pipe._pack_latents(x, rows, channels, high, wide).to(dtype)
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full((rows,), self.guidance, device=x.device, dtype=torch.float32)
        velocity = pipe.transformer(
            hidden_states=packed,
            timestep=t.to(dtype),  # the model multiplies by 1000 itself
            guidance=guidance,
            pooled_projections=self.pooled.expand(rows, -1),
            encoder_hidden_states=self.embeds.expand(rows, -1, -1),
            txt_ids=self.embeds.new_zeros(self.embeds.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(rows, high // 2, wide // 2, x.device, dtype),
            return_dict=False,
        )[0]
        return pipe._unpack_latents(velocity, self.height, self.width, pipe.vae_scale_factor).to(x.dtype)

    def decode(self, x: Tensor, chunk: int | None = None) -> Tensor:
        """Latents (K, C, H, W) -> pictures (K, 3, height, width) in [0, 1], `chunk` rows at a time."""
        vae = self.pipe.vae
        z = (x / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        z = z.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            pictures = [vae.decode(rows, return_dict=False)[0] for rows in z.split(chunk or self.chunk)]
        return torch.cat(pictures).float().add(1).div(2).clamp(0, 1)

    def problem(
        self,
        reward: Reward,
        kernel: Kernel,
        steps: int = 10,
        times: tuple[float, ...] | None = None,
        decode_chunk: int | None = None,
    ) -> Problem:
        """The search problem: `reward` judges pictures (K, 3, height, width); `times` overrides the pipeline's grid."""
        decode: Callable[[Tensor], Tensor] = self.decode
        return Problem(
            velocity=self,
            reward=Decoded(decode, reward, chunk=decode_chunk or self.chunk),
            path=LINEAR,
            kernel=kernel,
            times=self.times(steps) if times is None else times,
            shape=self.shape,
            device=self.embeds.device,
        )


def native_size(pipe: FluxPipeline) -> int:
    """Side of the pictures a model was made for, in pixels: that of the most tokens its resolution shift knows."""
    return math.isqrt(pipe.scheduler.config.max_image_seq_len) * 2 * pipe.vae_scale_factor
