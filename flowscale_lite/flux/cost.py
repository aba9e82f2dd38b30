"""What a search costs before it is run: model, picture size, budget and GPU turned into seconds, memory and money.

    counts = cost.count_pipeline(hub.skeleton(cost.FLUX1), 1024, 1024)
    print(cost.estimate(counts, cost.GPUS["H100"], nfe=500).dollars)

Operations are counted: models run without weights on PyTorch's meta device, where tensors have a shape and no contents.
How fast a GPU works them off is stated: its peak times a utilisation. Prices are assumed: put in your provider's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import families
from .model import FlowModel

GIB = 2**30
FLUX1 = Path(__file__).with_name("flux1")
"""A folder with the configurations of FLUX.1-schnell, without weights, to be read by `hub.skeleton`. FLUX.1-dev differs
in a guidance embedding alone."""
PRICED = "2026-11"
"""When the default prices were assumed."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Raises ValueError if the speed or the memory is not positive, or the price is negative.

    `tflops` is the peak of dense 16-bit matrix products, in 10^12 operations a second, from its data sheet; `memory`
    the GiB that PyTorch finds on it, somewhat less than its name says; `dollars` the assumed price of an hour; `dtype`
    the 16-bit precision that it computes fast in.
    """

    name: str
    tflops: float
    memory: float
    dollars: float
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.tflops, self.memory) <= 0 or self.dollars < 0:
            raise ValueError(f"a GPU's speed and memory must be positive and its price not negative; got {self}")


_GPUS = (
    Gpu("T4", 65, 14.7, 0.40, "float16"),
    Gpu("L4", 121, 22.0, 0.80),
    Gpu("A100-40", 312, 39.5, 1.80),
    Gpu("A100-80", 312, 79.1, 2.20),
    Gpu("H100", 989, 79.1, 3.50),
)
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _GPUS})
"""Common GPUs by name. Peaks are from NVIDIA's data sheets, without sparsity; prices were assumed in `PRICED`."""


@dataclass(frozen=True)
class Count:
    """What one call of a model takes.

    These are floating-point operations, of which a multiplication and an addition are two, the number of its weights,
    and the most bytes that are alive at once besides the weights.
    """

    flops: float
    parameters: int = 0
    activations: int = 0


class _LiveBytes(TorchDispatchMode):
    """The bytes of the tensors that operations have made and that still live, and their peak.

    Weights and inputs were there before and do not count, nor do views, which share the memory of another tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = (
            {leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}
            for tensors in ((args, kwargs), out)
        )
        for storage in written - read:
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _free(self, size: int) -> None:
        self.bytes -= size


class _FusedAttention(TorchFunctionMode):
    """Attention does not write its matrix to memory, as the fused kernels of a GPU do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            func = self._output
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _output(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])


@torch.no_grad()
def count_operations(module: nn.Module, call: Callable[[], object]) -> Count:
    """Count what `call()` takes, which runs `module`, on the meta device.

    The operations of attention count in full. Its matrix does not count as memory, since fused kernels never hold it.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    with _LiveBytes() as live, _FusedAttention():
        call()
    return Count(float(counter.get_total_flops()), sum(p.numel() for p in module.parameters()), live.peak)


def count_pipeline(pipe: Any, height: int, width: int, *, text_tokens: int | None = None) -> dict[str, Count]:
    """Count a pipeline at a picture size, in 16 bits; for a large model that takes some seconds of CPU time.

    "velocity" is one evaluation for one row, which is one NFE; "decode" one picture decoded; "text" one prompt encoded
    by the last text encoder, which is the large one where there are several. The transformer reads `text_tokens`; if
    None, as many as the model was made for. Raises ValueError unless the pipeline is as `hub.skeleton` builds it.
    """
    if text_tokens is not None and text_tokens < 1:
        raise ValueError(f"text_tokens must be at least 1; got {text_tokens}")
    prompt = blank_prompt(pipe, height, width, text_tokens=text_tokens)
    x = torch.empty(1, *prompt.shape, device="meta")
    tokens = torch.zeros(1, text_tokens or prompt.family.tokens(pipe), dtype=torch.int64, device="meta")
    encoder = nn.Module.to(families.text_encoders(pipe)[-1].eval(), torch.bfloat16)
    return {
        "velocity": count_operations(pipe.transformer, lambda: prompt.velocity(x, 0.5)),
        "decode": count_operations(pipe.vae, lambda: prompt.decode(x)),
        "text": count_operations(encoder, lambda: encoder(input_ids=tokens)),
    }


def blank_prompt(
    pipe: Any, height: int, width: int, guidance: float = 0.0, text_tokens: int | None = None
) -> FlowModel:
    """A prompt without content to count velocities with, of so many tokens or as long as the model was made for.

    The transformer and the autoencoder, which must hold no weights, are cast to bfloat16 and set to inference.
    """
    family = families.family(pipe)
    family.shape(pipe, height, width)
    for part in (pipe.transformer, pipe.vae):
        if part.device.type != "meta":
            raise ValueError("only models without weights are counted: build the pipeline by hub.skeleton(model)")
        nn.Module.to(part.eval(), torch.bfloat16)  # diffusers' own `to` would warn about precision
    encoded = family.blank(pipe.transformer.config, text_tokens or family.tokens(pipe) + family.beside)
    if family.guided(pipe, guidance):
        encoded |= {f"negative_{name}": value for name, value in encoded.items()}
    return FlowModel(pipe, encoded, height, width, guidance, chunk=1)


@dataclass(frozen=True)
class Estimate:
    """What one picture takes: seconds of one GPU, without loading the model, and their price.

    `memory` is bytes at the peak: all weights in 16 bits, and the activations of the call that has most. `fits` says
    whether the GPU holds that; if not, `memory.plan` finds a way. `parts` are the seconds of each part.
    """

    seconds: float
    dollars: float
    memory: float
    fits: bool
    parts: Mapping[str, float]


def estimate(
    counts: Mapping[str, Count], gpu: Gpu, nfe: int, *, reward_calls: int | None = None, batch: int = 1,
    utilisation: float = 0.4,
) -> Estimate:  # fmt: skip
    """Seconds, memory and money of one picture found with `nfe` velocity evaluations.

    seconds = (nfe F_velocity + (reward_calls + 1) F_decode + reward_calls F_judge + F_text) / (utilisation peak)

    Args:
        counts: what `count_pipeline` gives, and "judge", one reward call, if a judge is on the same GPU.
        reward_calls: pictures decoded and judged on the way; `nfe` if None, since a search by look-ahead rewards judges
            every candidate that it evaluates. The final picture is decoded once more.
        batch: rows to a forward pass. It counts for the memory; time does not depend on it as long as the GPU is busy.
        utilisation: share of the peak that is reached: 0.4 for large 16-bit matrix products, far less where memory,
            offloading or quantised weights bound the work. Measured, it is the seconds estimated with utilisation 1
            by the seconds that a search took.
    """
    rewards = nfe if reward_calls is None else reward_calls
    if nfe < 1 or rewards < 0 or batch < 1 or not 0 < utilisation <= 1:
        rule = "nfe and batch must be at least 1, reward_calls not negative, utilisation in (0, 1]"
        raise ValueError(f"{rule}; got {nfe}, {batch}, {rewards}, {utilisation}")
    calls = {"velocity": nfe, "decode": rewards + 1, "judge": rewards, "text": 1}
    parts = {part: calls[part] * count.flops / (utilisation * gpu.tflops * 1e12) for part, count in counts.items()}
    seconds = sum(parts.values())
    activations = max((batch if part == "velocity" else 1) * count.activations for part, count in counts.items())
    memory = 2 * sum(count.parameters for count in counts.values()) + activations
    return Estimate(seconds, seconds / 3600 * gpu.dollars, memory, memory <= gpu.memory * GIB, MappingProxyType(parts))
