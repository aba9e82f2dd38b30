"""The small FLUX: a genuine diffusers FluxPipeline, trained from scratch on a CPU on pictures of shapes.

`python -m tools.train.tiny_flux STAGE --work runs/tiny-flux --out data/tiny-flux` runs one stage; in their order:
autoencoder, latents, dev, guidance, pairs, schnell, export. Every stage writes what it can resume from; training also
writes a log.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flowscale_lite import schedules
from flowscale_lite.tiny import counter, shapes

Loss = Callable[[Generator, int], Tensor]  # draws so many rows with the generator; their mean loss
LATENT_CHANNELS = 8
TOKENS = 16  # longest prompt of both tokenizers, end mark included
DEV_SHIFT = 2.0  # resolution shift of dev's time grid; schnell has none
PLAIN = "a an and with to the left right of above below picture drawing image please draw there are on white paper"
FORMS = [shape + ending for shape in shapes.SHAPES for ending in ("", "s")]
WORDS = sorted({*PLAIN.split(), *shapes.NUMBERS, *map(str, range(1, 11)), *shapes.COLOURS, *FORMS})


# ---------------------------------------------------------------------------------------------------------- the model
def build_autoencoder() -> AutoencoderTiny:
    """8x down like FLUX's, 8 latent channels. Without the block at full size faint stripes remain."""
    return AutoencoderTiny(
        encoder_block_out_channels=(24,) * 4,
        decoder_block_out_channels=(24,) * 4,
        num_encoder_blocks=(0, 1, 1, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )


def byte_pairs(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of a word: the pair that was learnt first is joined first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while known := [pair for pair in pairwise(pieces) if pair in merges]:
        at = list(pairwise(pieces)).index(min(known, key=merges.index))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def build_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Local vocabularies in which every word of the data set is one token (CLIP's rules read digits one by one)."""
    letters = sorted(bytes_to_unicode().values())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in (word for word in WORDS if not word.isdigit()):
        while len(pieces := byte_pairs(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    pieces_t5 = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    return clip, T5Tokenizer(vocab=pieces_t5, extra_ids=0, model_max_length=TOKENS)


def build_text_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP of width 64, whose pooled output modulates the transformer, and T5 of width 128, whose tokens it attends."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {f"{mark}_token_id": getattr(clip, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    pooled = CLIPTextConfig(vocab_size=len(clip), projection_dim=64, max_position_embeddings=TOKENS, **size, **marks)
    size = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    words = T5Config(vocab_size=len(t5), dropout_rate=0.0, feed_forward_proj="gated-gelu", **size)
    return CLIPTextModel(pooled), T5EncoderModel(words)


def build_transformer(guidance: bool) -> FluxTransformer2DModel:
    """One double-stream and five single-stream blocks of width 128; `guidance` adds FLUX.1-dev's guidance embedding."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
    )


class Denoiser(nn.Module):
    """The trainable part of a FluxPipeline: two text encoders and the transformer, on packed latents."""

    def __init__(self, guidance: bool = True):
        super().__init__()
        self.tokenizer, self.tokenizer_2 = build_tokenizers()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(self.tokenizer, self.tokenizer_2)
        self.transformer = build_transformer(guidance)
        side = shapes.SIZE // 16
        places = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        self.register_buffer("image_ids", places, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TOKENS, 3), persistent=False)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of both encoders, CLIP's and T5's, each (K, 16)."""
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        return self.tokenizer(list(prompts), **options).input_ids, self.tokenizer_2(list(prompts), **options).input_ids

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the transformer needs to know of the prompts: pooled (K, 64) and word by word (K, 16, 128)."""
        return self.text_encoder(clip_ids.long()).pooler_output, self.text_encoder_2(t5_ids.long())[0]

    def forward(self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor | None = None) -> Tensor:
        """Velocity eps - x0 at packed latents x (K, 16, 32) and times t (K,)."""
        return self.transformer(
            hidden_states=x,
            timestep=t,
            guidance=guidance,
            pooled_projections=text[0],
            encoder_hidden_states=text[1],
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]

    def pipeline(self, vae: AutoencoderTiny, scheduler: FlowMatchEulerDiscreteScheduler) -> FluxPipeline:
        """The whole as diffusers knows it."""
        text = (self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2)
        return FluxPipeline(scheduler, vae, *text, self.transformer)


def euler(
    model: Denoiser, x: Tensor, text: tuple[Tensor, Tensor], times: Sequence[float], guidance: float | None
) -> Tensor:
    """The deterministic flow from noise x (K, 16, 32) down the given times."""
    g = None if guidance is None else torch.full((len(x),), guidance)
    for t, s in pairwise(times):
        x = x + (s - t) * model(x, torch.full((len(x),), t), text, g)
    return x


def decode(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    """Packed latents (K, 16, 32) -> pictures (K, 3, 64, 64) in [0, 1]."""
    z = FluxPipeline._unpack_latents(x, shapes.SIZE, shapes.SIZE, 8)
    z = (z / vae.config.scaling_factor + vae.config.shift_factor).to(memory_format=torch.channels_last)
    return torch.cat([vae.decoder(part) for part in z.split(50)]).add(1).div(2).clamp(0, 1)


# -------------------------------------------------------------------------------------------------- files and processes
class Log:
    """Prints a line and appends it to a JSON-lines file."""

    def __init__(self, path: Path):
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **fields: Any) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Checkpoint:
    """Everything needed to go on after an interruption, in one safetensors file, written whole or not at all."""

    def __init__(self, path: Path, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer):
        self.path, self.models, self.optimizer = path, models, optimizer
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> int:
        """Restore and return the number of steps done; 0 when there is no checkpoint."""
        if not self.path.exists():
            return 0
        state = load_file(self.path)
        step = int(state.pop("step"))
        for name, model in self.models.items():
            prefix = f"{name}/"
            model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, index, moment = key.split("/")
                moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        return step

    def save(self, step: int) -> None:
        state = {"step": torch.tensor(step)}
        for name, model in self.models.items():
            state |= {f"{name}/{key}": value.contiguous().clone() for key, value in model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{key}": value.contiguous().clone() for key, value in moments.items()}
        save_whole(state, self.path)


def own_blocks(folder: Path, blocks: int) -> Iterator[tuple[Path, int]]:
    """The block files that this process of a torchrun job has still to write."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = rank_and_ranks()
    for block in tqdm(range(rank, blocks, ranks), disable=rank > 0):
        path = folder / f"{block:04d}.safetensors"
        if not path.exists():
            yield path, block


def read_blocks(folder: Path) -> dict[str, Tensor]:
    """All blocks of a folder, joined.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    blocks = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    if not blocks:
        raise FileNotFoundError(f"{folder} holds no .safetensors: nothing was written, or less than one block")
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


# ----------------------------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Recipe:
    """How to descend: optimiser steps, peak learning rate, rows a step, steps of warm-up, weight decay; and every how
    many steps to measure, log and save."""

    steps: int
    rate: float
    batch: int = 128
    warmup: int = 300
    decay: float = 0.01
    every: int = 250

    def rate_at(self, step: int) -> float:
        """Linear warm-up, times half a cosine down to zero."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.rate * (warm * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2)


class Averaged(nn.Module):
    """Exponential moving average of a model's parameters, with a short memory at first."""

    def __init__(self, model: nn.Module, decay: float = 0.9995):
        super().__init__()
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)


def average_gradients(model: nn.Module) -> None:
    """Mean of the gradients over the processes of a torchrun job; nothing to do in a single process."""
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def fit(
    name: str,
    model: nn.Module,
    loss_of: Loss,
    recipe: Recipe,
    work: Path,
    log: Log,
    measure: Callable[[Any], dict[str, float]],
) -> nn.Module:
    """AdamW with gradients averaged over processes; trains `model` in place and returns its moving average.

    `loss_of(generator, rows)` draws a batch with the generator it is given, which depends on step and process only, so
    that a resumed run sees what an uninterrupted one would have seen.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay)
    averaged = Averaged(model)
    checkpoint = Checkpoint(work / f"{name}.safetensors", {"model": model, "averaged": averaged}, optimizer)
    (rank, ranks), start, losses = rank_and_ranks(), time.monotonic(), []
    for step in range(checkpoint.load(), recipe.steps):
        generator = Generator().manual_seed(ranks * step + rank)
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        losses.append(descend(model, optimizer, loss_of, generator, recipe.batch // ranks))
        averaged.update(model, step)
        if rank == 0 and ((step + 1) % recipe.every == 0 or step + 1 == recipe.steps):
            seconds, loss = round(time.monotonic() - start), float(np.mean(losses))
            log(stage=name, step=step + 1, loss=loss, **measure(averaged.model), seconds=seconds)
            checkpoint.save(step + 1)
            losses.clear()
    return averaged.model


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Loss, generator: Generator, rows: int
) -> float:
    """One step of the optimiser, on every process; returns this one's loss."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fused CPU backward is slower
        loss = loss_of(generator, rows)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


class Measure:
    """Exact-count accuracy of a denoiser on fixed prompts and noise, of all and of those with few objects."""

    def __init__(self, work: Path, guidance: float | None, steps: int, shift: float = DEV_SHIFT, prompts: int = 96):
        self.vae = AutoencoderTiny.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
        rng = np.random.default_rng(3)
        self.scenes = [shapes.random_scene(rng) for _ in range(prompts)]
        tokens = (shapes.SIZE // 16) ** 2
        self.noise = torch.randn(prompts, tokens, 4 * LATENT_CHANNELS, generator=Generator().manual_seed(3))
        self.guidance, self.times = guidance, schedules.shifted(schedules.uniform(steps), shift)

    @torch.no_grad()
    def __call__(self, model: Denoiser) -> dict[str, float]:
        text = model.encode(*model.tokenize([scene.caption() for scene in self.scenes]))
        x = euler(model, self.noise, text, self.times, self.guidance)
        counts = counter.count(decode(self.vae, x))
        right = (counts == np.stack([scene.target for scene in self.scenes])).all(1)
        few = np.array([scene.total <= 3 for scene in self.scenes])
        return {"exact": float(right.mean()), "exact_1_to_3": float(right[few].mean())}


# ------------------------------------------------------------------------------------------------------------- stages
def random_pictures(number: int, seed: int) -> Tensor:
    """Pictures of random scenes, (number, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    scenes = [shapes.random_scene(rng) for _ in range(number)]
    parts = [torch.from_numpy(shapes.render(scenes[i : i + 1000], rng)) for i in range(0, number, 1000)]
    return torch.cat(parts).permute(0, 3, 1, 2)


def autoencoder_loss(model: AutoencoderTiny, x: Tensor, generator: Generator) -> Tensor:
    """Squared plus a little absolute error of pictures in [-1, 1], and latents held near mean 0 and variance 1.

    Noise on the latents makes the decoder snap to clean shapes.
    """
    z = model.encoder(x.to(memory_format=torch.channels_last))
    level = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
    error = model.decoder(z + level * torch.randn(z.shape, generator=generator)).float() - x
    z = z.float()  # autocast has left it in bfloat16
    mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3))
    return (error**2).mean() + 0.1 * error.abs().mean() + 0.01 * (mean**2 + (variance - 1) ** 2).mean()


def train_autoencoder(work: Path, out: Path, steps: int = 3600, batch: int = 32, pool: int = 12_000) -> None:
    """Train on a pool of pictures; the scale and shift that FLUX gives its latents are measured and kept with it."""
    pictures = random_pictures(pool, seed=1)
    torch.manual_seed(0)
    model = build_autoencoder().to(memory_format=torch.channels_last)

    def loss_of(generator: Generator, rows: int) -> Tensor:
        x = pictures[torch.randint(pool, (rows,), generator=generator)].float() / 127.5 - 1
        return autoencoder_loss(model, x, generator)

    @torch.no_grad()
    def encoded(pictures: Tensor) -> Tensor:
        return torch.cat([model.encoder(part.float() / 127.5 - 1) for part in pictures.split(50)])

    @torch.no_grad()
    def measure(_: nn.Module) -> dict[str, float]:
        z = encoded(pictures[:100])
        error = model.decoder(z) - (pictures[:100].float() / 127.5 - 1)
        return {"mse": float((error**2).mean()), "variance": float(z.var())}

    recipe = Recipe(steps, rate=2e-3, batch=batch, warmup=100, decay=1e-4, every=100)
    fit("autoencoder", model, loss_of, recipe, work, Log(out / "training_log.jsonl"), measure)
    z = encoded(pictures[:2000])
    model.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    model.to(memory_format=torch.contiguous_format).save_pretrained(work / "vae")


def make_latents(work: Path, number: int) -> None:
    """Draw and encode the training set once: packed latents and token ids, in blocks of 1,000."""
    vae, denoiser = AutoencoderTiny.from_pretrained(work / "vae").to(memory_format=torch.channels_last), Denoiser()
    for path, block in own_blocks(work / "latents", number // 1000):
        rng = np.random.default_rng([2, block])
        scenes = [shapes.random_scene(rng) for _ in range(1000)]
        clip_ids, t5_ids = denoiser.tokenize([scene.wording(rng) for scene in scenes])
        pictures = shapes.to_tensor(shapes.render(scenes, rng)).to(memory_format=torch.channels_last)
        with torch.no_grad():
            z = torch.cat([vae.encoder(part * 2 - 1) for part in pictures.split(50)])
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        packed = FluxPipeline._pack_latents(z, len(z), LATENT_CHANNELS, *z.shape[2:]).half()
        save_whole({"latents": packed, "clip": clip_ids.to(torch.int16), "t5": t5_ids.to(torch.int16)}, path)


def sample_times(rows: int, generator: Generator) -> Tensor:
    """Logit-normal times leaning to the noisy end, where the number of objects is decided."""
    return torch.sigmoid(1.1 * torch.randn(rows, generator=generator) + 0.7)


def flow_matching_loss(
    model: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor | None
) -> Tensor:
    """Mean squared error of the velocity at x_t = (1 - t) x0 + t eps."""
    x = torch.lerp(x0, eps, t[:, None, None])
    return ((model(x, t, text, guidance).float() - (eps - x0)) ** 2).mean()


def train_dev(work: Path, out: Path, steps: int, batch: int = 128) -> None:
    """Flow matching on the latents, text encoders trained with the transformer; one prompt in ten is empty."""
    data = read_blocks(work / "latents")
    torch.manual_seed(0)
    model = Denoiser()
    empty = model.tokenize([""])

    def loss_of(generator: Generator, rows: int) -> Tensor:
        pick = torch.randint(len(data["latents"]), (rows,), generator=generator)
        drop = (torch.rand(rows, generator=generator) < 0.1)[:, None]
        ids = (torch.where(drop, none, data[key][pick]) for none, key in zip(empty, ("clip", "t5"), strict=True))
        x0, t = data["latents"][pick].float(), sample_times(rows, generator)
        eps = torch.randn(x0.shape, generator=generator)
        return flow_matching_loss(model, x0, eps, t, model.encode(*ids), torch.ones(rows))

    measure = Measure(work, guidance=1.0, steps=10)
    fit("dev", model, loss_of, Recipe(steps, 1.2e-3, batch), work, Log(out / "training_log.jsonl"), measure)


def load_averaged(work: Path, name: str, guidance: bool = True) -> Denoiser:
    """The averaged weights of a finished stage."""
    model = Denoiser(guidance)
    prefix = "averaged/model."
    state = load_file(work / f"{name}.safetensors")
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return model.requires_grad_(False).eval()


def distil_guidance(work: Path, out: Path, steps: int, batch: int = 128) -> None:
    """Teach dev's guidance embedding, as in FLUX.1-dev: one pass gives what two passes of the teacher give at scale g.

    The target is v_empty + g (v_prompt - v_empty) with g uniform in [1, 4]; the text encoders stay as they are.
    """
    data = read_blocks(work / "latents")
    teacher, model = load_averaged(work, "dev"), load_averaged(work, "dev")
    model.transformer.requires_grad_(True)
    pooled, words = teacher.encode(*teacher.tokenize([""]))

    def loss_of(generator: Generator, rows: int) -> Tensor:
        pick = torch.randint(len(data["latents"]), (rows,), generator=generator)
        t, eps = sample_times(rows, generator), torch.randn(rows, *data["latents"].shape[1:], generator=generator)
        x = torch.lerp(data["latents"][pick].float(), eps, t[:, None, None])
        text = teacher.encode(data["clip"][pick], data["t5"][pick])
        g, one = 1 + 3 * torch.rand(rows, generator=generator), torch.ones(rows)
        with torch.no_grad():
            with_prompt = teacher(x, t, text, one)
            without = teacher(x, t, (pooled.expand(rows, -1), words.expand(rows, -1, -1)), one)
            target = torch.lerp(without, with_prompt, g[:, None, None].to(without.dtype)).float()
        return ((model(x, t, text, g).float() - target) ** 2).mean()

    measure = Measure(work, guidance=2.0, steps=10)
    fit("guidance", model, loss_of, Recipe(steps, 4e-4, batch), work, Log(out / "training_log.jsonl"), measure)


def make_pairs(work: Path, number: int, guidance: float = 2.0, steps: int = 16) -> None:
    """Noise and where dev's deterministic flow takes it, for reflow; resumable in blocks of 512."""
    data, teacher = read_blocks(work / "latents"), load_averaged(work, "guidance")
    times = schedules.shifted(schedules.uniform(steps), DEV_SHIFT)
    for path, block in own_blocks(work / "pairs", number // 512):
        pick = torch.arange(block * 512, (block + 1) * 512) % len(data["latents"])
        eps = torch.randn(512, *data["latents"].shape[1:], generator=Generator().manual_seed(10_000 + block))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            text = teacher.encode(data["clip"][pick], data["t5"][pick])
            rows = zip(eps.split(64), text[0].split(64), text[1].split(64), strict=True)
            x0 = torch.cat([euler(teacher, noise, (pooled, words), times, guidance) for noise, pooled, words in rows])
        save_whole({"eps": eps.half(), "x0": x0.half(), "pick": pick}, path)


@torch.no_grad()
def without_guidance(dev: Denoiser, guidance: float) -> dict[str, Tensor]:
    """Weights of a model without guidance embedding that equals dev at one scale: the embedding, now constant, is added
    to the time embedding's last bias."""
    embed = dev.transformer.time_text_embed
    constant = embed.guidance_embedder(embed.time_proj(torch.tensor([1000 * guidance])))[0]
    state = {name: value.clone() for name, value in dev.state_dict().items() if "guidance_embedder" not in name}
    state["transformer.time_text_embed.timestep_embedder.linear_2.bias"] += constant
    return state


def train_schnell(work: Path, out: Path, steps: int, batch: int = 128, guidance: float = 2.0) -> None:
    """Reflow: flow matching on dev's own noise-sample pairs straightens the paths, so that few steps suffice.

    Starts from dev at its guidance; as FLUX.1-schnell, it has no guidance embedding.
    """
    data, pairs = read_blocks(work / "latents"), read_blocks(work / "pairs")
    model = Denoiser(guidance=False)
    model.load_state_dict(without_guidance(load_averaged(work, "guidance"), guidance))
    model.requires_grad_(False).transformer.requires_grad_(True)

    def loss_of(generator: Generator, rows: int) -> Tensor:
        pick = torch.randint(len(pairs["pick"]), (rows,), generator=generator)
        eps, x0, prompt = pairs["eps"][pick].float(), pairs["x0"][pick].float(), pairs["pick"][pick]
        text = model.encode(data["clip"][prompt], data["t5"][prompt])
        t = 1 - torch.rand(rows, generator=generator) ** 2  # most weight on the first steps, which must jump farthest
        return flow_matching_loss(model, x0, eps, t, text, None)

    measure = Measure(work, guidance=None, steps=4, shift=1.0)
    fit("schnell", model, loss_of, Recipe(steps, 6e-4, batch), work, Log(out / "training_log.jsonl"), measure)


def export(work: Path, out: Path) -> None:
    """Write the two FluxPipeline folders, those of which the last stage was trained."""
    vae = AutoencoderTiny.from_pretrained(work / "vae")
    shift = {"base_image_seq_len": 4, "max_image_seq_len": 16, "base_shift": 0.5, "max_shift": math.log(DEV_SHIFT)}
    for name, stage in (("dev", "guidance"), ("schnell", "schnell")):
        if not (work / f"{stage}.safetensors").exists():
            continue
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=name == "dev", **shift)
        load_averaged(work, stage, guidance=name == "dev").pipeline(vae, scheduler).save_pretrained(out / name)
        config = out / name / "vae" / "config.json"
        fields = json.loads(config.read_text())
        del fields["block_out_channels"], fields["_name_or_path"]  # read with a warning; the name of a work folder
        config.write_text(json.dumps(fields, indent=2) + "\n")
        write_sums(out / name)


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, by which `flux.hub.fetch` sees that no file of the folder has changed."""
    lines = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "SHA256SUMS":
            lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["autoencoder", "latents", "dev", "guidance", "pairs", "schnell", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-flux"))
    parser.add_argument("--out", type=Path, default=Path("data/tiny-flux"))
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps; for latents and pairs, their number")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
    stages: dict[str, Callable[[], None]] = {
        "autoencoder": lambda: train_autoencoder(args.work, args.out),
        "latents": lambda: make_latents(args.work, args.steps),
        "dev": lambda: train_dev(args.work, args.out, args.steps),
        "guidance": lambda: distil_guidance(args.work, args.out, args.steps),
        "pairs": lambda: make_pairs(args.work, args.steps),
        "schnell": lambda: train_schnell(args.work, args.out, args.steps),
        "export": lambda: export(args.work, args.out),
    }
    stages[args.stage]()


if __name__ == "__main__":
    main()
