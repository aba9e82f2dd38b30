"""Models of real size on the GPU at hand: what they take, a plan that fits, and loading by it.

    plan = memory.plan("black-forest-labs/FLUX.1-dev", memory.free_gib())
    print(plan)
    pipe = memory.load("black-forest-labs/FLUX.1-dev", plan, prompts=["a red cube on a blue ball"])

Sizes are counted on PyTorch's meta device, weights from the configs and activations by running the pipeline's own call
there. What counting does not see (the context of CUDA, fragments, buffers of kernels) is left to a reserve.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from . import cost, families, hub
from .prompt import FlowModel, encode_text, known_texts

GIB = 2**30
WEIGHTS = ("full", "int8", "fp8", "nf4")
"""How a transformer's weights are held: as they are; in 8 bits by torchao; in 4 bits by bitsandbytes."""
TEXT = ("resident", "offloaded", "dropped")
"""Where text encoders are: beside the transformer; in host memory, changing places with it for every new prompt; or
nowhere, once the prompts given to `load` are encoded."""
DTYPES = ("bfloat16", "float16", "float32")
RESERVE = 1.0
"""GiB left free by default."""


@dataclass(frozen=True)
class Weights:
    """Parameters of a model: those in linear layers, which quantisation takes; the rows of these layers, each of which
    then has a scale; and all others."""

    linear: int = 0
    rows: int = 0
    other: int = 0

    @classmethod
    def of(cls, *modules: nn.Module) -> Weights:
        """Counted. What the libraries do not quantise (output heads, layers kept in float32) is among the others."""
        layers = []
        for module in modules:
            kept = {"lm_head", *(getattr(module, "_keep_in_fp32_modules", None) or ())}
            named = module.named_modules()
            layers += [part for path, part in named if isinstance(part, nn.Linear) and not kept & set(path.split("."))]
        linear = sum(layer.weight.numel() for layer in layers)
        total = sum(p.numel() for module in modules for p in module.parameters())
        return cls(linear, sum(layer.out_features for layer in layers), total - linear)

    def gib(self, kind: str = "full", size: int = 2) -> float:
        """GiB in memory, with `size` bytes to a parameter that is not quantised."""
        linear = {
            "full": size * self.linear,
            "int8": self.linear + 4 * self.rows,
            "fp8": self.linear + 4 * self.rows,
            "nf4": self.linear * (1 / 2 + 4 / 64),  # a float32 scale for every 64
        }[kind]
        return (linear + size * self.other) / GIB


@dataclass(frozen=True)
class Sizes:
    """What a model takes at one picture size.

    Attributes:
        transformer, text, vae: parameters; text is all text encoders together.
        row: GiB of activations of one row's velocity in 16 bits, the second forward of guidance included.
        decode, tile: GiB of activations for decoding one picture in 16 bits: whole, and in tiles of half its side.
    """

    transformer: Weights
    text: Weights
    vae: Weights
    row: float
    decode: float
    tile: float


SIZES: Mapping[str, Sizes] = MappingProxyType(
    {
        "FLUX.1-schnell": Sizes(
            Weights(11888099328, 3059776, 3079232),
            Weights(3708813312, 967680, 1176557824),
            Weights(2097152, 4096, 81722531),
            0.458,
            1.51,
            0.39,
        ),
        "FLUX.1-dev": Sizes(
            Weights(11898322944, 3065920, 3085376),
            Weights(3708813312, 967680, 1176557824),
            Weights(2097152, 4096, 81722531),
            0.458,
            1.51,
            0.39,
        ),
        "FLUX.2-klein-4B": Sizes(
            Weights(3875536896, 1016960, 7680),
            Weights(3633315840, 1105920, 389152256),
            Weights(2097152, 4096, 81948963),
            0.581,
            1.52,
            0.40,
        ),
        "FLUX.2-klein-9B": Sizes(
            Weights(9078571008, 1790080, 10240),
            Weights(6945767424, 1400832, 1244967936),
            Weights(2097152, 4096, 81948963),
            0.776,
            1.53,
            0.41,
        ),
        "stable-diffusion-3.5-medium": Sizes(
            Weights(2241822720, 1241152, 1348800),
            Weights(4340187136, 1338368, 1240433664),
            Weights(2097152, 4096, 81722531),
            0.346,
            1.51,
            0.40,
        ),
        "stable-diffusion-3.5-large": Sizes(
            Weights(8053694464, 2765248, 2933056),
            Weights(4340187136, 1338368, 1240433664),
            Weights(2097152, 4096, 81722531),
            0.503,
            1.51,
            0.40,
        ),
        "Qwen-Image": Sizes(
            Weights(20424818688, 5548096, 5582400),
            Weights(7199817728, 1822976, 1092348928),
            Weights(0, 0, 126892531),
            0.384,
            3.39,
            0.87,
        ),
        "Z-Image-Turbo": Sizes(
            Weights(6153863168, 1853504, 1045568),
            Weights(3633315840, 1105920, 389152256),
            Weights(2097152, 4096, 81722531),
            0.521,
            1.50,
            0.39,
        ),
        "Sana_1600M_1024px_diffusers": Sizes(
            Weights(848762880, 380832, 755699872),
            Weights(2024275968, 705536, 590065920),
            Weights(70778880, 61440, 281952867),
            0.135,
            1.64,
            0.43,
        ),
    }
)
"""At 1024 x 1024, with the guidance that the makers recommend; printed by `python -m tools.runs.memory`."""
GUIDED: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "stable-diffusion-3.5-medium": (1.0, 0.170, 0.346),
        "stable-diffusion-3.5-large": (1.0, 0.249, 0.503),
        "Qwen-Image": (1.0, 0.377, 0.384),
        "Z-Image-Turbo": (0.0, 0.521, 1.043),
        "Sana_1600M_1024px_diffusers": (1.0, 0.064, 0.135),
    }
)
"""Of the models in SIZES that guidance runs twice: the scale above which it does, and a row's GiB up to it and above.
Most take both forwards as one batch; Qwen-Image one after the other. By default all their pipelines' calls do."""


@dataclass(frozen=True)
class Card:
    """A GPU: the memory that PyTorch finds on it, in GiB, and the 16-bit precision that it computes fast in."""

    gib: float
    dtype: str = "bfloat16"


CARDS: Mapping[str, Card] = MappingProxyType(
    {"T4 16 GB": Card(14.7, "float16"), "L4 24 GB": Card(22.0), "A100 40 GB": Card(39.5), "H100 80 GB": Card(79.1)}
)


@torch.no_grad()
def count(pipe: Any, height: int, width: int, guidance: float) -> Sizes:
    """The sizes of a pipeline whose models are on the meta device; some seconds of CPU time for a large one."""
    texts = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    for module in (pipe.transformer, pipe.vae):
        nn.Module.to(module.eval(), torch.bfloat16)  # past diffusers' warning on precision, void without weights
    family = families.family(pipe)
    encoded, rows = family.blank(pipe.transformer.config), 1
    if family is families.FAMILIES["ZImagePipeline"] and family.guided(pipe, guidance):
        rows, guidance = 2, 0.0  # guided, it reads its clock, which is void here; its batch is that of two rows
    if family.guided(pipe, guidance):
        encoded |= {f"negative_{name}": value for name, value in encoded.items()}
    prompt = FlowModel(pipe, encoded, height, width, guidance, chunk=1)
    small = replace(prompt, height=height // 2, width=width // 2)
    x, y = (torch.empty(1, *p.shape, device="meta") for p in (prompt, small))
    row = cost.count(pipe.transformer, lambda _: prompt.velocity(x.expand(rows, -1, -1, -1), 0.5))
    decode = cost.count(pipe.vae, lambda _: prompt.decode(x))
    tile = cost.count(pipe.vae, lambda _: small.decode(y))
    joined = 4 * 3 * height * width  # the picture that tiles make up
    return Sizes(
        Weights.of(pipe.transformer),
        Weights.of(*texts),
        Weights.of(pipe.vae),
        row.activations / GIB,
        decode.activations / GIB,
        (tile.activations + joined) / GIB,
    )


def sizes(model: str | Path, height: int = 1024, width: int = 1024, guidance: float | None = None) -> Sizes:
    """The sizes of a model: stored for those in SIZES, counted for any other folder or hub id.

    Args:
        guidance: scale; the default of the pipeline's call if None.

    Raises:
        OSError, ValueError: no such model, or its pipeline is not supported.
    """
    name = Path(model).name
    if name in SIZES and not Path(model).exists():
        known, share = SIZES[name], height * width / 2**20
        above, once, twice = GUIDED.get(name, (0.0, known.row, known.row))
        row = once if guidance is not None and guidance <= above else twice
        return replace(known, row=share * row, decode=share * known.decode, tile=share * known.tile)
    pipe = hub.skeleton(model)
    family = families.family(pipe)
    return count(pipe, height, width, family.default(pipe, family.scale) if guidance is None else guidance)


@dataclass(frozen=True)
class Plan:
    """Where each part of a model is, in which precision, and how many rows at a time.

    Attributes:
        model: name.
        sizes: of its parts.
        free: GiB found.
        keep: GiB of them to be left free.
        dtype: what the transformer computes in, one of DTYPES. With float16 the autoencoder, whose values may exceed
            the range, is kept in float32, and text encoders in bfloat16.
        weights: of the transformer, one of WEIGHTS.
        text: where text encoders are, one of TEXT.
        text_weights: "full" or "nf4".
        group_offload: the transformer's weights wait in host memory and pass through the GPU layer by layer.
        tiling: pictures are decoded in tiles, with some change where they overlap.
        chunk, decode_chunk: rows to a forward pass, pictures to a decode.
    """

    model: str
    sizes: Sizes = field(repr=False)
    free: float
    keep: float = RESERVE
    dtype: str = "bfloat16"
    weights: str = "full"
    text: str = "resident"
    text_weights: str = "full"
    group_offload: bool = False
    tiling: bool = False
    chunk: int = 1
    decode_chunk: int = 1

    @property
    def text_dtype(self) -> str:
        """What text encoders compute in, however they are held: T5 and Qwen exceed the range of float16."""
        return "bfloat16" if self.dtype == "float16" else self.dtype

    @property
    def parts(self) -> dict[str, float]:
        """GiB of each part, and of the activations of one row and one decode."""
        size = 4 if self.dtype == "float32" else 2
        fine = 2 if self.dtype == "bfloat16" else 4
        return {
            "transformer": self.sizes.transformer.gib(self.weights, size),
            "text encoders": self.sizes.text.gib(self.text_weights, size),
            "autoencoder": self.sizes.vae.gib(size=fine),
            "a row": self.sizes.row * size / 2,
            "a decode": (self.sizes.tile if self.tiling else self.sizes.decode) * fine / 2,
        }

    @property
    def stages(self) -> dict[str, float]:
        """GiB on the GPU while prompts are encoded, velocities evaluated and pictures decoded.

        Half a GiB each is allowed for the activations of text encoders and for the layers of an offloaded transformer.
        """
        part = self.parts
        resident = part["autoencoder"] + (0.5 if self.group_offload else part["transformer"])
        beside = part["text encoders"] if self.text == "resident" else 0.0
        alone = {"resident": resident, "offloaded": part["autoencoder"], "dropped": 0.0}[self.text]
        return {
            "prompts": part["text encoders"] + 0.5 + alone,
            "velocities": resident + beside + self.chunk * part["a row"],
            "pictures": resident + beside + self.decode_chunk * part["a decode"],
        }

    @property
    def peak(self) -> float:
        """GiB of the hungriest stage."""
        return max(self.stages.values())

    @property
    def host(self) -> float:
        """GiB of host memory that stay in use: what waits there."""
        part = self.parts
        waiting = part["text encoders"] + part["transformer"] if self.text == "offloaded" else 0.0
        return waiting + (part["transformer"] if self.group_offload else 0.0)

    def _filled(self, rows: int, fixed: Mapping[str, Any]) -> Plan:
        """With as many rows at a time as fit, and no more than `rows`."""
        room, alone, part = self.free - self.keep, replace(self, chunk=0, decode_chunk=0).stages, self.parts
        fit = {  # one does, although rounding may say 0.999...
            "chunk": max(1, int((room - alone["velocities"]) / part["a row"])),
            "decode_chunk": max(1, int((room - alone["pictures"]) / part["a decode"])),
        }
        chunk = fixed.get("chunk", min(rows, fit["chunk"]))
        return replace(self, chunk=chunk, decode_chunk=fixed.get("decode_chunk", min(chunk, fit["decode_chunk"])))

    def summary(self) -> str:
        """In a few words."""
        kind = self.dtype if self.weights == "full" else self.weights
        words = [kind + (" by group offload" if self.group_offload else ""), f"text {self.text}"]
        words += ["text in nf4"] * (self.text_weights == "nf4") + ["tiles"] * self.tiling
        return f"{', '.join(words)}, {self.chunk} rows: {self.peak:.1f} GiB"

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.summary()} of {self.free:.1f} free, {self.keep:.1f} kept"]
        lines += [f"  {name:17} {_size(gib)}" for name, gib in self.parts.items()]
        lines += [f"  while {name:11} {_size(gib)}" for name, gib in self.stages.items()]
        return "\n".join(lines)


def _size(gib: float) -> str:
    return f"{gib:6.1f} GiB" if gib >= 0.1 else f"{1024 * gib:6.1f} MiB"


def plan(
    model: str | Path,
    free: float,
    *,
    dtype: str = "bfloat16",
    host: float = math.inf,
    keep: float = RESERVE,
    height: int = 1024,
    width: int = 1024,
    guidance: float | None = None,
    rows: int = 16,
    **fixed: Any,
) -> Plan:
    """The first plan that fits, of those that cost least in quality first, and in speed second.

    In order: all in 16 bits beside one another; text encoders in host memory, or dropped; pictures decoded in tiles;
    the same with the transformer in int8; in nf4; in 16 bits, but streamed from host memory, which is slow.

    Args:
        free: GiB of GPU memory, see `free_gib`.
        dtype: what to compute in, see `Plan.dtype`.
        host: GiB of host memory.
        keep: GiB to leave free: for what is not counted, and for the models that judge.
        guidance: scale; the default of the pipeline's call if None. It may double a row.
        rows: most rows to a forward pass.
        fixed: fields of Plan that are not to be chosen, such as weights="nf4", text="dropped", chunk=4.

    Raises:
        ValueError: nothing fits, or a field is unknown or out of range, or those fixed exclude one another.
    """
    _check({"dtype": dtype, **fixed}, rows)
    allowed = [fields for fields in _candidates() if _allows(fixed, fields)]
    if not allowed:
        raise ValueError(
            f"these choices exclude one another: {fixed}; text='offloaded' and group_offload=True each need full "
            "weights, and not the other"
        )
    start = Plan(Path(model).name, sizes(model, height, width, guidance), free, keep, dtype)
    candidates = [replace(start, **{**fields, **fixed}) for fields in allowed]
    for one in candidates:
        if one.peak <= free - keep and one.host <= host:
            return one._filled(rows, fixed)
    least = min(candidates, key=lambda one: one.peak)
    raise ValueError(
        f"{start.model} does not fit into {free:.1f} GiB with {keep:.1f} kept free and {host:.1f} of host memory; "
        f"the smallest plan takes {least.peak:.1f} and {least.host:.1f}: {least.summary()}"
    )


def _check(fixed: Mapping[str, Any], rows: int) -> None:
    """Raises ValueError if a field of Plan is not to be chosen, or not so, or if `rows` is out of range."""
    flags = (False, True)
    choices: dict[str, tuple[Any, ...]] = {"weights": WEIGHTS, "text": TEXT, "text_weights": ("full", "nf4")}
    choices |= {"dtype": DTYPES, "group_offload": flags, "tiling": flags}
    for name, value in fixed.items():
        if name in choices:
            if value not in choices[name]:
                raise ValueError(f"{name} is one of {choices[name]}; got {value!r}")
        elif name not in ("chunk", "decode_chunk") or not isinstance(value, int) or value < 1:
            raise ValueError(f"no such choice: {name}={value!r}")
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be at least 1, a whole number; got {rows}")


def _candidates() -> Iterator[dict[str, Any]]:
    """Fields of plans, best first."""
    texts = [("resident", "full"), ("offloaded", "full"), ("dropped", "full"), ("dropped", "nf4"), ("resident", "nf4")]
    kinds = [(weights, False) for weights in WEIGHTS] + [("full", True)]
    for (weights, group), tiling, (text, text_weights) in itertools.product(kinds, (False, True), texts):
        if text != "offloaded" or (weights == "full" and not group):  # others do not change places
            yield {
                "weights": weights,
                "group_offload": group,
                "text": text,
                "text_weights": text_weights,
                "tiling": tiling,
            }


def _allows(fixed: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether a candidate has what is fixed; fp8, which takes what int8 takes, only on request."""
    same = all(fields[name] == value for name, value in fixed.items() if name in fields)
    return same and (fields["weights"] != "fp8" or fixed.get("weights") == "fp8")


def free_gib(device: str | torch.device = "cuda") -> float:
    """GiB free: of the GPU's memory, or of the host's for the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    import psutil

    return psutil.virtual_memory().available / GIB


def best_dtype(device: str | torch.device = "cuda") -> str:
    """The precision that a device computes fast in: bfloat16, float16 on GPUs before Ampere, float32 on a CPU."""
    if torch.device(device).type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def load(
    model: str | Path,
    plan: Plan,
    device: str = "cuda",
    *,
    prompts: Sequence[str] = (),
    guidance: float | None = None,
    negative: str = "",
    max_tokens: int | None = None,
) -> Any:
    """A pipeline as planned, ready for `FlowModel.encode(pipe, text, chunk=plan.chunk)`.

    Args:
        prompts: encoded at once. A plan that drops the text encoders needs all that will be used, with the `guidance`,
            `negative` and `max_tokens` that `FlowModel.encode` will be given.

    Raises:
        ValueError: a library that the plan needs is missing, or prompts for a plan that drops text encoders.
        OSError: see `hub.load`.
    """
    hub.check_device(device)
    quantised = _quantisation(plan)
    if plan.text == "dropped" and not prompts:
        raise ValueError(
            "the plan drops the text encoders once prompts are encoded: give `prompts`, or text='resident'"
        )
    fine = torch.float32 if plan.dtype == "float16" else getattr(torch, plan.dtype)
    names = [name for name in hub.index(model) if name.startswith(("text_encoder", "tokenizer"))]
    dtypes = {"transformer": getattr(torch, plan.dtype), "vae": fine, "default": getattr(torch, plan.text_dtype)}

    def encode(pipe: Any) -> None:
        family = families.family(pipe)
        scale = family.default(pipe, family.scale) if guidance is None else guidance
        for prompt in prompts:
            encode_text(pipe, prompt, negative if family.guided(pipe, scale) else None, max_tokens)

    known, absent = {}, {}
    if plan.text == "dropped":
        encoder = hub.fetch(model, dtype=dtypes, transformer=None, vae=None, **quantised("text_encoder"))
        encode(encoder.to(device))
        known, absent = known_texts(encoder), dict.fromkeys(names)
        del encoder
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    pipe = hub.fetch(model, dtype=dtypes, **absent, **quantised("transformer", "text_encoder"))
    known_texts(pipe).update(known)
    _place(pipe, plan, device)
    encode(pipe)
    return pipe


def _place(pipe: Any, plan: Plan, device: str) -> None:
    """Move the parts to where the plan has them."""
    if plan.tiling:
        pipe.vae.enable_tiling()
        if hasattr(pipe.vae, "tile_latent_min_size"):  # whose tiles are as large as the pictures it was trained on
            pipe.vae.tile_sample_min_size //= 2
            pipe.vae.tile_latent_min_size //= 2
    if plan.text == "offloaded":
        order = pipe.model_cpu_offload_seq.split("->")
        pipe.model_cpu_offload_seq = "->".join(name for name in order if name != "vae")
        pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, "vae"]  # a search decodes at every step
        pipe.enable_model_cpu_offload(device=device)
        return
    if plan.group_offload:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device(device),
            offload_type="leaf_level",
            use_stream=torch.device(device).type == "cuda",
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and not (name == "transformer" and plan.group_offload):
            part.to(device)


def _quantisation(plan: Plan) -> Callable[..., dict[str, Any]]:
    """Of names of parts: the argument of from_pretrained that quantises those which the plan quantises.

    Raises:
        ValueError: a library is missing.
    """
    import diffusers
    import transformers

    kinds = {"transformer": plan.weights, "text_encoder": plan.text_weights}
    for kind, library in (("int8", "torchao"), ("fp8", "torchao"), ("nf4", "bitsandbytes")):
        if kind in kinds.values() and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"a plan with {kind} weights needs {library}: pip install {library}, or choose another kind"
            )

    def four(config: Any, dtype: str) -> Any:
        return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype))

    def mapping(*parts: str) -> dict[str, Any]:
        configs: dict[str, Any] = {}
        if "text_encoder" in parts and plan.text_weights == "nf4":
            text = four(transformers.BitsAndBytesConfig, plan.text_dtype)
            configs |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), text)
        if "transformer" in parts and plan.weights == "nf4":
            configs["transformer"] = four(diffusers.BitsAndBytesConfig, plan.dtype)
        elif "transformer" in parts and plan.weights != "full":
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

            kind = Int8WeightOnlyConfig() if plan.weights == "int8" else Float8WeightOnlyConfig()
            configs["transformer"] = diffusers.TorchAoConfig(kind)
        return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=configs)} if configs else {}

    return mapping
