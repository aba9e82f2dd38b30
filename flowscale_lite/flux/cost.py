"""What a picture costs before it is drawn: model, size, budget and GPU turned into seconds, memory and money.

Floating-point operations are counted, not guessed: the model is built without weights, on PyTorch's meta device, and
run there. How fast a GPU works them off is stated: its peak times a utilisation. Prices are assumptions of the user;
the defaults are round numbers, to be replaced by what the provider asks.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PRICED = "2026-11"
"""When the default prices were assumed."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: for tables.
        tflops: peak of dense 16-bit matrix products, in 10^12 operations a second, from its data sheet.
        memory: in GiB.
        dollars: price of an hour, assumed.

    Raises:
        ValueError: a number is not positive.
    """

    name: str
    tflops: float
    memory: float
    dollars: float

    def __post_init__(self) -> None:
        if min(self.tflops, self.memory) <= 0 or self.dollars < 0:
            raise ValueError(f"a GPU's speed and memory must be positive and its price not negative; got {self}")


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("T4", 65, 16, 0.40),
            Gpu("L4", 121, 24, 0.80),
            Gpu("A100-40", 312, 40, 1.80),
            Gpu("A100-80", 312, 80, 2.20),
            Gpu("H100", 989, 80, 3.50),
        )
    }
)
"""Peaks from NVIDIA's data sheets, without sparsity; prices assumed on `PRICED`."""


@dataclass(frozen=True)
class Count:
    """What one call of a model takes.

    Attributes:
        flops: floating-point operations, a multiplication and an addition counted as two.
        parameters: numbers in its weights.
        activations: most bytes alive at once besides the weights.
    """

    flops: float
    parameters: int = 0
    activations: int = 0


class _Alive(TorchDispatchMode):
    """Bytes of the tensors alive that operations have made, and their peak. Weights and inputs were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._new((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for storage in self._new(out):
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _new(self, tensors: Any) -> list[Any]:
        """The storages among these tensors' that were not known yet."""
        found = {id(s): s for t in tree_leaves(tensors) if isinstance(t, Tensor) for s in [t.untyped_storage()]}
        new = [storage for storage in found.values() if storage not in self.known]
        self.known.update(new)
        return new

    def _free(self, size: int) -> None:
        self.bytes -= size


class _FusedAttention(TorchFunctionMode):
    """Attention that does not write its matrix down, as the kernels of a GPU do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, _, value = (args + tuple((kwargs or {}).values()))[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def count(module: nn.Module, call: Callable[[nn.Module], object]) -> Count:
    """Operations, parameters and activations of `call(module)`, a module and inputs on the meta device.

    Attention counts in full; its matrix is not counted as memory, since fused kernels never hold it.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(module)
    with torch.no_grad(), _Alive() as alive, _FusedAttention():
        call(module)
    parameters = sum(p.numel() for p in module.parameters())
    return Count(float(counter.get_total_flops()), parameters, alive.peak)


@dataclass(frozen=True)
class Model:
    """What pictures of one size ask of a machine.

    Attributes:
        name: for tables.
        velocity: of one row, one NFE.
        decode: of one picture.
        text: of one prompt, by the larger text encoder.
        precision: bytes of a parameter.
    """

    name: str
    velocity: Count
    decode: Count
    text: Count
    precision: float = 2.0

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return self.precision * (self.velocity.parameters + self.decode.parameters + self.text.parameters)


FLUX1: Mapping[str, Any] = MappingProxyType(
    {
        "transformer": {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": (16, 56, 56),
        },
        "vae": {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 16,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
    }
)
"""The sizes of FLUX.1 (dev and schnell alike), its autoencoder and its T5."""


@functools.cache
def flux1(height: int = 1024, width: int = 1024, *, text_tokens: int = 512, guidance: bool = False) -> Model:
    """FLUX.1 at a size, counted; a few seconds of CPU time, once for each size.

    Args:
        height, width: of the picture, multiples of 16.
        text_tokens: of the prompt as T5 gives it: 512 for dev, 256 for schnell by default.
        guidance: whether the transformer has a guidance embedding (dev has).

    Raises:
        ValueError: sizes out of range.
    """
    _check(height, width, text_tokens)
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FLUX1["transformer"], guidance_embeds=guidance)
        vae = AutoencoderKL(**FLUX1["vae"])
        text = T5EncoderModel(T5Config(**FLUX1["text"]))
    return _counted(f"FLUX.1 {height} x {width}", transformer, vae, text, height, width, text_tokens, torch.bfloat16)


def of_pipeline(pipe: Any, height: int, width: int, *, text_tokens: int, name: str = "") -> Model:
    """The model of a loaded FluxPipeline at a size, counted on copies without weights.

    Raises:
        ValueError: sizes out of range, another pipeline, or one without its text encoder.
    """
    _check(height, width, text_tokens)
    from diffusers import FluxPipeline

    if not isinstance(pipe, FluxPipeline) or pipe.text_encoder_2 is None:
        raise ValueError(
            f"need a FluxPipeline with its text encoders; got {type(pipe).__name__}; see also memory.sizes"
        )
    transformer, vae, text = (_weightless(m) for m in (pipe.transformer, pipe.vae, pipe.text_encoder_2))
    dtype = pipe.transformer.dtype
    return _counted(name or type(pipe).__name__, transformer, vae, text, height, width, text_tokens, dtype)


def _weightless(module: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying a weight."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, memo)


def _check(height: int, width: int, text_tokens: int) -> None:
    if min(height, width, text_tokens) < 1 or height % 16 or width % 16:
        raise ValueError(
            f"height and width must be multiples of 16 and text_tokens positive; got {height} x {width}, {text_tokens}"
        )


def _counted(
    name: str,
    transformer: nn.Module,
    vae: nn.Module,
    text: nn.Module,
    height: int,
    width: int,
    text_tokens: int,
    dtype: torch.dtype,
) -> Model:
    for module in (transformer, vae, text):
        nn.Module.to(module.eval(), dtype)  # past diffusers' warning on precision, which is void without weights
    config: Any = transformer.config
    tokens, channels = height * width // 256, config.in_channels

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    inputs = {
        "hidden_states": empty(1, tokens, channels),
        "timestep": empty(1),
        "guidance": empty(1) if config.guidance_embeds else None,
        "pooled_projections": empty(1, config.pooled_projection_dim),
        "encoder_hidden_states": empty(1, text_tokens, config.joint_attention_dim),
        "txt_ids": empty(text_tokens, 3),
        "img_ids": empty(tokens, 3),
    }
    latents = empty(1, channels // 4, height // 8, width // 8)
    ids = torch.zeros(1, text_tokens, dtype=torch.int64, device="meta")
    return Model(
        name,
        velocity=count(transformer, lambda m: m(**inputs, return_dict=False)),
        decode=count(vae, lambda m: m.decode(latents, return_dict=False)),  # type: ignore[operator]
        text=count(text, lambda m: m(input_ids=ids)),
        precision=torch.finfo(dtype).bits / 8,
    )


@dataclass(frozen=True)
class Plan:
    """What one picture takes.

    Attributes:
        seconds: on one GPU, loading not included.
        dollars: for them.
        memory: bytes at the peak: weights and the activations of the hungriest call.
        fits: whether the GPU holds that.
        parts: seconds of each part: velocity, decode, text, judge.
    """

    seconds: float
    dollars: float
    memory: float
    fits: bool
    parts: Mapping[str, float]


def plan(
    model: Model,
    gpu: Gpu,
    nfe: int,
    *,
    reward_calls: int | None = None,
    judge: Count = Count(0.0),
    batch: int = 1,
    utilisation: float = 0.4,
) -> Plan:
    """Seconds, memory and money of one picture found with `nfe` velocity evaluations.

    seconds = (nfe F_velocity + (reward_calls + 1) F_decode + reward_calls F_judge + F_text) / (utilisation peak)

    Args:
        reward_calls: pictures decoded and judged on the way; `nfe` by default, since a search by look-ahead rewards
            judges every candidate that it evaluates. The picture itself is decoded once more.
        judge: of one reward call, for a judge on the same GPU; none by default.
        batch: rows a forward pass, for the memory; time does not depend on it as long as the GPU is kept busy.
        utilisation: share of the peak that is reached; 0.4 is assumed, for large 16-bit matrix products. Memory-bound
            work, offloading and quantised weights reach far less: measure, where it matters.

    Raises:
        ValueError: a number out of range.
    """
    calls = nfe if reward_calls is None else reward_calls
    if nfe < 1 or calls < 0 or batch < 1 or not 0 < utilisation <= 1:
        raise ValueError(
            "nfe and batch must be at least 1, reward_calls not negative, utilisation in (0, 1]; "
            f"got {nfe}, {batch}, {calls}, {utilisation}"
        )
    flops = {
        "velocity": nfe * model.velocity.flops,
        "decode": (calls + 1) * model.decode.flops,
        "judge": calls * judge.flops,
        "text": model.text.flops,
    }
    parts = {name: work / (utilisation * gpu.tflops * 1e12) for name, work in flops.items()}
    seconds = sum(parts.values())
    activations = max(
        batch * model.velocity.activations, model.decode.activations, model.text.activations, judge.activations
    )
    memory = model.weights + model.precision * judge.parameters + activations
    return Plan(seconds, seconds / 3600 * gpu.dollars, memory, memory <= gpu.memory * 2**30, MappingProxyType(parts))


@dataclass(frozen=True)
class Fleet:
    """Many pictures on several GPUs: `seconds` until the last is done, `dollars` for all of them, and the `efficiency`,
    the share of the time paid for that is spent on pictures."""

    seconds: float
    dollars: float
    efficiency: float


def fleet(one: Plan, pictures: int, gpus: int, *, startup: float = 0.0) -> Fleet:
    """`pictures` like `one` spread over `gpus` of its kind, all paid for until the last is done.

    A GPU needs `startup` seconds before its first picture, to load the model. Pictures do not split, so the last round
    may leave GPUs idle.

    Raises:
        ValueError: a number out of range.
    """
    if pictures < 1 or gpus < 1 or startup < 0:
        raise ValueError(
            f"need pictures and gpus of at least 1, startup not negative; got {pictures}, {gpus}, {startup}"
        )
    seconds = startup + math.ceil(pictures / gpus) * one.seconds
    paid = gpus * seconds
    return Fleet(seconds, paid * one.dollars / one.seconds, pictures * one.seconds / paid)


def measured(model: Model, nfe: int, seconds: float, *, reward_calls: int = 0, name: str = "measured") -> Gpu:
    """The machine on which `nfe` evaluations took `seconds`, as a Gpu to plan with at utilisation 1.

    Its speed holds for work of the same kind only: small models and small batches run far below the peak.

    Raises:
        ValueError: seconds not positive.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    unit = plan(model, Gpu(name, 1.0, 1.0, 0.0), nfe, reward_calls=reward_calls, utilisation=1.0)
    return Gpu(name, unit.seconds / seconds, math.inf, 0.0)
