"""A plan of precision, places and batch by which a large model fits on the GPU at hand, and loading by that plan.

    plan = memory.plan("black-forest-labs/FLUX.1-dev", memory.free_gib())
    print(plan)
    pipe = memory.load_planned("black-forest-labs/FLUX.1-dev", plan, prompts=["a red cube on a blue ball"])

Weights are counted from the models' configurations, activations by running the pipeline's own call on the meta device.
What counting does not see (the context of CUDA, fragments, buffers of kernels) is left to a reserve.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import psutil
import torch
import transformers
from torch import nn

from . import families, hub
from .cost import GIB, blank_prompt, count_operations
from .model import KNOWN, encode_text

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "dtype": ("bfloat16", "float16", "float32"),
    "weights": ("full", "int8", "fp8", "nf4"),
    "text": ("resident", "offloaded", "dropped"),
    "text_weights": ("full", "nf4"),
    "group_offload": (False, True),
    "tiling": (False, True),
    "turns": (False, True),
}
"""What the fields of a MemoryPlan can be."""
LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""The library that quantises weights of each kind."""


@dataclass(frozen=True)
class Weights:
    """How many parameters a model has.

    `linear` are in the matrices of linear layers, which quantisation makes smaller, and `rows` the rows of these, of
    which in 8 bits each has a scale. `other` are all else, and what libraries do not quantise (heads, float32 layers).
    """

    linear: int
    rows: int
    other: int

    @classmethod
    def of(cls, *modules: nn.Module) -> Weights:
        """Count the parameters of some models together."""
        linear = rows = 0
        for module in modules:
            kept = {"lm_head", *(getattr(module, "_keep_in_fp32_modules", None) or ())}
            for path, part in module.named_modules():
                if isinstance(part, nn.Linear) and kept.isdisjoint(path.split(".")):
                    linear += part.weight.numel()
                    rows += part.out_features
        return cls(linear, rows, sum(p.numel() for module in modules for p in module.parameters()) - linear)

    def gib(self, kind: str = "full", size: int = 2) -> float:
        """GiB in memory, held as `kind`, with `size` bytes to a parameter that is not quantised."""
        scales = {"nf4": 4 / 64 * self.linear, "full": 0.0}.get(kind, 4.0 * self.rows)  # float32
        linear = {"nf4": 0.5, "full": size}.get(kind, 1) * self.linear
        return (linear + scales + size * self.other) / GIB


@dataclass(frozen=True)
class Sizes:
    """What a model takes at one picture size: the parameters of its parts, and GiB of activations in 16 bits.

    `row` is one row's velocity, the second forward of guidance included; `decode` one picture, `tile` in tiles of half
    its side.
    """

    transformer: Weights
    text: Weights
    vae: Weights
    row: float
    decode: float
    tile: float


@functools.cache
def stored_sizes() -> dict[str, dict[str, Any]]:
    """The Sizes of published models at 1024 x 1024, by name, as `python -m tools.runs.memory` has counted them.

    `row` is without guidance. Where that runs the model twice, `guided` has the row, and the scale above which it does.
    """
    return json.loads(Path(__file__).with_name("sizes.json").read_text(encoding="utf-8"))


def sizes(model: str | Path, height: int = 1024, width: int = 1024, guidance: float | None = None) -> Sizes:
    """The sizes of a model: scaled from `stored_sizes` if it is there, counted for any other folder or hub id.

    The guidance scale counts, since it may double a row; None stands for the default of the pipeline's call.
    """
    stored = stored_sizes().get(Path(model).name)
    if stored is None or Path(model).exists():
        return count_sizes(hub.skeleton(model), height, width, guidance)
    guided = stored.get("guided")
    chosen = guided if guided and (guidance is None or guidance > guided["above"]) else stored
    row, decode, tile = (height * width / 1024**2 * gib for gib in (chosen["row"], stored["decode"], stored["tile"]))
    transformer, text, vae = (Weights(**stored[part]) for part in ("transformer", "text", "vae"))
    return Sizes(transformer, text, vae, row, decode, tile)


def count_sizes(pipe: Any, height: int, width: int, guidance: float | None = None) -> Sizes:
    """Count the sizes of a pipeline on the meta device, which takes some seconds of CPU time for a large model."""
    family, rows = families.family(pipe), 1
    guidance = family.guidance(pipe, guidance)
    if type(pipe).__name__ == "ZImagePipeline" and family.guided(pipe, guidance):
        guidance, rows = 0.0, 2  # guided, it reads its clock, which is void here; it takes what two rows take
    whole, half = (blank_prompt(pipe, height // n, width // n, guidance) for n in (1, 2))
    x, small = (torch.empty(rows, *prompt.shape, device="meta") for prompt in (whole, half))
    row = count_operations(pipe.transformer, lambda: whole.velocity(x, 0.5)).activations
    decode = count_operations(pipe.vae, lambda: whole.decode(x[:1])).activations
    tile = count_operations(pipe.vae, lambda: half.decode(small[:1])).activations + 4 * 3 * height * width  # the whole
    text = Weights.of(*families.text_encoders(pipe))
    return Sizes(Weights.of(pipe.transformer), text, Weights.of(pipe.vae), row / GIB, decode / GIB, tile / GIB)


@dataclass(frozen=True)
class MemoryPlan:
    """Where each part of a model is, in which precision, and how many rows at a time.

    Attributes:
        model, sizes: its name, and the sizes of its parts.
        free, keep: GiB found, and GiB of them to be left free.
        dtype: what the transformer computes in. With float16 the autoencoder is in float32, text encoders in bfloat16.
        weights: how the transformer is held: as it is, in 8 bits by torchao, or in 4 bits by bitsandbytes ("nf4").
        text: where text encoders are: "resident", beside the transformer; "offloaded", in host memory, changing places
            with it for every new prompt; "dropped", nowhere, once the prompts given to `load_planned` are encoded.
        text_weights: how text encoders are held.
        group_offload: the transformer's weights wait in host memory and pass through the GPU layer by layer.
        tiling: pictures are decoded in tiles, with some change where they overlap.
        draft: the transformer of a second model, which drafts with the same autoencoder and text encoders; held as the
            other is. None if there is none.
        turns: of the two transformers, the one that is not in use waits in host memory. `Draft` and `Cascade` change
            from one to the other once a search.
        chunk, decode_chunk: rows to a forward pass, pictures to a decode.

    A field that is not one of `CHOICES`, or a chunk that is no positive whole number, raises ValueError.
    """

    model: str
    sizes: Sizes = field(repr=False)
    free: float
    keep: float = 1.0
    dtype: str = "bfloat16"
    weights: str = "full"
    text: str = "resident"
    text_weights: str = "full"
    group_offload: bool = False
    tiling: bool = False
    draft: Weights | None = field(default=None, repr=False)
    turns: bool = False
    chunk: int = 1
    decode_chunk: int = 1

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {choices}; got {getattr(self, name)!r}")
        for name in ("chunk", "decode_chunk"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {getattr(self, name)!r}")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What the transformer ("transformer"), the autoencoder ("vae") and all else ("default") compute in."""
        dtype = getattr(torch, self.dtype)
        vae, default = dtype, dtype
        if dtype is torch.float16:  # whose range T5, Qwen and autoencoders exceed
            vae, default = torch.float32, torch.bfloat16
        return {"transformer": dtype, "vae": vae, "default": default}

    @property
    def parts(self) -> dict[str, float]:
        """GiB of each part, and of the activations of one row and one decode."""
        bytes_of, sizes = {part: dtype.itemsize for part, dtype in self.dtypes.items()}, self.sizes
        return {
            "transformer": sizes.transformer.gib(self.weights, bytes_of["transformer"]),
            "text encoders": sizes.text.gib(self.text_weights, bytes_of["default"]),
            "drafting": self.draft.gib(self.weights, bytes_of["transformer"]) if self.draft else 0.0,
            "autoencoder": sizes.vae.gib(size=bytes_of["vae"]),
            "a row": sizes.row * bytes_of["transformer"] / 2,
            "a decode": (sizes.tile if self.tiling else sizes.decode) * bytes_of["vae"] / 2,
        }

    @property
    def stages(self) -> dict[str, float]:
        """GiB on the GPU while prompts are encoded, velocities evaluated and pictures decoded.

        Half a GiB each is allowed for the activations of text encoders and for the layers of an offloaded transformer.
        """
        part = self.parts
        text, vae = part["text encoders"], part["autoencoder"]
        both = (part["transformer"], part["drafting"])
        resident = vae + (0.5 if self.group_offload else max(both) if self.turns else sum(both))
        resident += text * (self.text == "resident")
        return {
            "prompts": 0.5 + {"resident": resident, "offloaded": text + vae, "dropped": text}[self.text],
            "velocities": resident + self.chunk * part["a row"],
            "pictures": resident + self.decode_chunk * part["a decode"],
        }

    @property
    def peak(self) -> float:
        """GiB on the GPU in the stage that takes most."""
        return max(self.stages.values())

    @property
    def host(self) -> float:
        """GiB of host memory taken by what waits there."""
        part = self.parts
        text = part["text encoders"] if self.text == "offloaded" else 0.0
        waits = bool(text) or self.group_offload or self.turns
        return text + (part["transformer"] + part["drafting"] if waits else 0.0)

    def summary(self) -> str:
        """The plan in a few words, for a table."""
        words = {
            self.dtype if self.weights == "full" else self.weights: True,
            "with a drafting transformer": self.draft is not None,
            "taking turns": self.turns,
            "group offload": self.group_offload,
            f"text {self.text}": True,
            "text in nf4": self.text_weights == "nf4",
            "tiles": self.tiling,
        }
        rows = "1 row" if self.chunk == 1 else f"{self.chunk} rows"
        return f"{', '.join(word for word in words if words[word])}, {rows}: {self.peak:.1f} GiB"

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.summary()} of {self.free:.1f} free, {self.keep:.1f} kept"]
        for name, gib in {**self.parts, **{f"while {stage}": gib for stage, gib in self.stages.items()}}.items():
            if gib == 0:
                continue
            lines.append(f"  {name:17} {gib:6.1f} GiB" if gib >= 0.1 else f"  {name:17} {1024 * gib:6.1f} MiB")
        return "\n".join(lines)


def plan(
    model: str | Path, free: float, *, dtype: str = "bfloat16", host: float = math.inf, keep: float = 1.0,
    height: int = 1024, width: int = 1024, guidance: float | None = None, rows: int = 16,
    draft: str | Path | None = None, **fixed: Any,
) -> MemoryPlan:  # fmt: skip
    """The first plan that fits, of those that cost least in quality first, and in speed second.

    In order: all in 16 bits beside one another; text encoders in host memory, or dropped; two transformers that take
    turns; pictures decoded in tiles; the same with transformers in int8; in nf4; in 16 bits, but streamed from host
    memory, which is slow.

    Args:
        free, host: GiB of GPU and of host memory; see `free_gib`.
        dtype: what to compute in; see `best_dtype`.
        keep: GiB to leave free, for what is not counted and for the models that judge.
        guidance: the scale, which may double a row; the default of the pipeline's call if None.
        rows: the most rows to a forward pass.
        draft: a second model of the same latents and text encoders, of which the transformer is held as well.
        fixed: fields of MemoryPlan that are not to be chosen, such as weights="nf4" or chunk=4. To have fp8, which
            takes what int8 takes, it must be fixed.

    Raises ValueError if nothing fits, or the fields that are fixed exclude one another.
    """
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be a whole number of at least 1; got {rows}")
    second = None if draft is None else sizes(draft, height, width, guidance).transformer
    counted = sizes(model, height, width, guidance)
    start = MemoryPlan(Path(model).name, counted, free, keep, dtype, draft=second, **fixed)
    candidates = [
        replace(start, **fields) for fields in _candidates(draft is not None) if (fields | fixed) == (fixed | fields)
    ]
    if not candidates:
        needs = "text='offloaded', group_offload=True and, for a draft, turns=True each need full weights, and no other"
        raise ValueError(f"these choices exclude one another: {fixed}; {needs}")
    for one in candidates:
        if one.peak <= free - keep and one.host <= host:
            return _fill(one, rows, fixed)
    least = min(candidates, key=lambda one: one.peak)
    room = f"{free:.1f} GiB with {keep:.1f} kept free and {host:.1f} of host memory"
    smallest = f"the smallest plan takes {least.peak:.1f} and {least.host:.1f}: {least.summary()}"
    raise ValueError(f"{start.model} does not fit into {room}; {smallest}")


def _candidates(draft: bool) -> Iterator[dict[str, Any]]:
    """The fields that `plan` chooses, of all plans that can be carried out, best first."""
    held = [("full", False), ("int8", False), ("fp8", False), ("nf4", False), ("full", True)]
    places = [("resident", "full", False), ("offloaded", "full", False), ("dropped", "full", False)]
    if draft:  # of which the transformer, but not the text encoders, can change places with the other
        places = [(text, "full", turns) for turns in (False, True) for text in ("resident", "dropped")]
    places += [("dropped", "nf4", False), ("resident", "nf4", False)]
    for (weights, streamed), tiling, (text, text_weights, turns) in itertools.product(held, (False, True), places):
        if (weights, streamed) == held[0] or not (turns or text == "offloaded"):  # others cannot change places
            one = {"weights": weights, "group_offload": streamed, "tiling": tiling, "turns": turns}
            yield one | {"text": text, "text_weights": text_weights}


def _fill(plan: MemoryPlan, rows: int, fixed: Collection[str]) -> MemoryPlan:
    """The plan, which fits, with as many rows and pictures at a time as fit, unless they are fixed."""
    room, part, stage = plan.free - plan.keep, plan.parts, plan.stages
    chunk, pictures = plan.chunk, plan.decode_chunk
    if "chunk" not in fixed:
        chunk = min(rows, chunk + int((room - stage["velocities"]) / part["a row"]))
    if "decode_chunk" not in fixed:
        pictures = min(chunk, pictures + int((room - stage["pictures"]) / part["a decode"]))
    return replace(plan, chunk=chunk, decode_chunk=pictures)


def free_gib(device: str | torch.device = "cuda") -> float:
    """GiB free: of the GPU's memory, or of the host's for the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    return psutil.virtual_memory().available / GIB


def best_dtype(device: str | torch.device = "cuda") -> str:
    """The precision that a device computes fast in: bfloat16, float16 on GPUs before Ampere, float32 on a CPU."""
    if torch.device(device).type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def _known_ahead(
    models: Sequence[str | Path], plan: MemoryPlan, device: str, encode: Callable[[Any, Any], None]
) -> list[Any]:
    """The prompts as each model reads them, encoded by the first one's text encoders, which are then dropped."""
    encoder, known = _fetch(models[0], plan, ["transformer", "vae"]).to(device), []
    for one in models:  # each reads as many tokens as it was made for
        KNOWN[encoder] = {}
        encode(encoder, hub.skeleton(one).transformer.config)
        known.append(KNOWN[encoder])
    del encoder
    gc.collect()
    torch.cuda.empty_cache()
    return known


def load_planned(
    model: str | Path, plan: MemoryPlan, device: str = "cuda", *, draft: str | Path | None = None,
    prompts: Sequence[str] = (), guidance: float | None = None, negative: str = "", max_tokens: int | None = None,
) -> Any:  # fmt: skip
    """Load a pipeline as planned, ready for `FlowModel.encode(pipe, text, chunk=plan.chunk)`.

    With `draft`, the model whose transformer the plan counts as drafting, it returns two pipelines, the model's and the
    draft's. They share the autoencoder and the text encoders, which are the model's.

    The prompts are encoded at once; a plan that drops the text encoders needs all that will be used. `guidance`,
    `negative` and `max_tokens` are what `FlowModel.encode` will be given with them. Raises ValueError if the prompts or
    a library that the plan needs are missing, or only one of plan and call has a draft, and what `hub.load` does.
    """
    hub.check_device(device)
    for kind in {plan.weights, plan.text_weights} & LIBRARIES.keys():
        library = LIBRARIES[kind]
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"{kind} weights need {library}: pip install {library}, or plan for another kind")
    dropped, models = plan.text == "dropped", [model] if draft is None else [model, draft]
    if dropped and not prompts:
        raise ValueError("the plan drops text encoders once prompts are encoded: give `prompts`, or text='resident'")
    if (draft is None) != (plan.draft is None):
        raise ValueError("a draft must be given to `plan`, which counts it, and to `load_planned`, which loads it")

    def encode(pipe: Any, config: Any = None) -> None:
        family = families.family(pipe)
        against = negative if family.guided(pipe, family.guidance(pipe, guidance)) else None
        for prompt in prompts:
            encode_text(pipe, prompt, against, max_tokens, config)

    known = _known_ahead(models, plan, device, encode) if dropped else []
    absent = [name for name in hub.index(model) if name.startswith(("text_encoder", "tokenizer"))] if dropped else []
    pipes = [_fetch(model, plan, absent)]
    if draft is not None:
        pipes.append(_beside(pipes[0], draft, plan))
    for pipe, texts in zip(pipes, known, strict=dropped):
        KNOWN[pipe] = texts
    place(pipes[0], plan, torch.device(device), *pipes[1:])
    for pipe in pipes:
        encode(pipe)
    return pipes[0] if draft is None else tuple(pipes)


def _beside(pipe: Any, draft: str | Path, plan: MemoryPlan) -> Any:
    """A pipeline of the parts of another, with the transformer and the scheduler of `draft`."""
    own = _fetch(draft, plan, [name for name in pipe.components if name not in ("transformer", "scheduler")])
    if own.transformer.config.in_channels != pipe.transformer.config.in_channels:
        raise ValueError(f"{draft} draws other latents, so it cannot draft for this model")
    parts = pipe.components | {"transformer": own.transformer, "scheduler": own.scheduler}
    beside = type(pipe)(**parts, **families.settings(own.config))
    beside.set_progress_bar_config(disable=True)
    return beside


def _fetch(model: str | Path, plan: MemoryPlan, absent: Collection[str]) -> Any:
    """The pipeline in the plan's precisions, without some of its parts."""
    configs = {}
    if plan.weights != "full":
        configs["transformer"] = quantisation(diffusers, plan.weights, plan.dtypes["transformer"])
    if plan.text_weights != "full":
        for name in (name for name in hub.index(model) if name.startswith("text_encoder")):
            configs[name] = quantisation(transformers, plan.text_weights, plan.dtypes["default"])
    return hub.fetch(model, plan.dtypes, absent, configs)


def quantisation(library: Any, kind: str, dtype: torch.dtype) -> Any:
    """The configuration by which diffusers or transformers quantises a model that computes in `dtype`."""
    if kind == "nf4":
        return library.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return library.TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def place(pipe: Any, plan: MemoryPlan, device: torch.device, *drafting: Any) -> None:
    """Move the parts to where the plan has them; those of a drafting pipeline, if one is given, as well."""
    if plan.tiling:
        pipe.vae.enable_tiling()
        if hasattr(pipe.vae, "tile_latent_min_size"):  # whose tiles are as large as the pictures it was trained on
            pipe.vae.tile_sample_min_size //= 2
            pipe.vae.tile_latent_min_size //= 2
    if plan.turns:
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != "transformer":
                nn.Module.to(part, device)
        one, other = (accelerate.cpu_offload_with_hook(p.transformer, device)[1] for p in (pipe, *drafting))
        one.hook.prev_module_hook, other.hook.prev_module_hook = other, one  # each sends the other away
        return
    for each in (pipe, *drafting):
        if plan.text == "offloaded":
            each.model_cpu_offload_seq = each.model_cpu_offload_seq.replace("->vae", "")
            each._exclude_from_cpu_offload = [*each._exclude_from_cpu_offload, "vae"]  # a search decodes at every step
            each.enable_model_cpu_offload(device=device)
        elif plan.group_offload:
            others = [name for name in each.components if name != "transformer"]
            stream = device.type == "cuda"
            each.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, exclude_modules=others)
        else:
            each.to(device)
