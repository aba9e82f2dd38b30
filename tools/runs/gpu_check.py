"""`python -m tools.runs.gpu_check` (`make gpu-check`): what this code does on a CUDA GPU, in some eight minutes.

Nothing is downloaded. tiny-flux is compared with itself on the CPU. FLUX.1's parts are built at their real size, with
random weights, and timed. Plans that offload run under an artificial limit of memory. What was planned stands beside
what was measured. The record goes to data/results/gpu/CARD.json after every row, so a check that fails, or a machine
that is taken away, leaves the others; data/results/README.md describes it. Without a GPU, or with `--tiny`, models of
toy size take FLUX's place and the record goes to build/gpu: a rehearsal, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, TypeAlias

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "psutil", "numpy", "scipy")
missing = " ".join(name for name in NEEDED if util.find_spec(name) is None)
if missing:
    sys.exit(f"gpu-check needs {missing}: pip install {missing}; where there is no network, bring their wheels")

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers.quantizers import DiffusersAutoQuantizer  # noqa: E402
from torch import Generator, Tensor, nn  # noqa: E402

from flowscale_lite import RBF, SMC, SVDD, BestOfN, kernels, schedules, search  # noqa: E402
from flowscale_lite.flux import FlowModel, cost, families, hub, load, memory  # noqa: E402
from flowscale_lite.tiny import counter, shapes  # noqa: E402
from flowscale_lite.tiny.data import locate  # noqa: E402

Row: TypeAlias = dict[str, Any]
LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}
MINUTES = 8
LIMITS: tuple[tuple[int, dict[str, Any]], ...] = (
    (16, {"group_offload": True}), (24, {}), (40, {"text": "offloaded"}),
)  # fmt: skip
"""GiB to plan for, and the fields of the plan that are fixed, so that each kind of offloading runs once."""


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and on models of which size."""

    cuda: bool
    tiny: bool

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "CPU"

    @property
    def gib(self) -> float:
        """Memory of the card; of a host, what is free."""
        return torch.cuda.mem_get_info()[1] / 2**30 if self.cuda else memory.free_gib("cpu")

    @property
    def dtype(self) -> str:
        return memory.best_dtype(self.device)

    @property
    def model(self) -> Path:
        return locate("tiny-flux/schnell") if self.tiny else cost.FLUX1

    @property
    def sizes(self) -> tuple[int, ...]:
        return (64,) if self.tiny else (512, 1024)

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.tiny else (1, 2, 4, 8)

    @property
    def tokens(self) -> int:
        return 16 if self.tiny else 256

    def held(self) -> float | None:
        """GiB that tensors take on the card, once what is not used is given back; None for a CPU: nobody counts."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() / 2**30 if self.cuda else None

    @torch.no_grad()
    def measure(self, call: Callable[[], object], repeats: int = 3) -> Row:
        """Seconds of a first call, the median of more, and the most GiB held beyond what was before; or the error."""
        try:
            held, seconds = self.held(), []
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(1 + repeats):
                start = time.perf_counter()
                call()
                if self.cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            gib = None if held is None else torch.cuda.max_memory_allocated() / 2**30 - held
            return {"first": seconds[0], "seconds": sorted(seconds[1:])[repeats // 2], "gib": gib}
        except Exception as error:  # such as a batch that does not fit: the others are still worth having
            return failed(error)

    def foretold(self, part: str, size: int, rows: int = 1) -> Row:
        """What the planner says of `rows` rows of a part: GiB of activations, and seconds if it knows the card."""
        count, gpu = counted(self, size)[part], known_gpu(self.name, self.gib)
        gib = rows * count.activations * getattr(torch, self.dtype).itemsize / 2 / 2**30
        seconds = cost.estimate({part: count}, gpu, rows, reward_calls=0).seconds if gpu else None
        return {"planned_seconds": seconds, "planned_gib": gib}


def known_gpu(name: str, memory: float) -> cost.Gpu | None:
    """The entry of `cost.GPUS` for a card that CUDA calls by this name and that has so many GiB; None if none has."""
    words = name.replace("-", " ").split()
    fits = (gpu for gpu in cost.GPUS.values() if gpu.name.split("-")[0] in words and 0.9 < memory / gpu.memory < 1.1)
    return next(fits, None)


@functools.cache
def counted(machine: Machine, size: int) -> dict[str, Any]:
    """Operations and activations of FLUX.1's parts at a picture size."""
    return cost.count_pipeline(hub.skeleton(machine.model), size, size, text_tokens=machine.tokens)


def failed(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


# ------------------------------------------------------------------------------------------------------ random models
@torch.no_grad()
def fill(module: nn.Module, machine: Machine, dtype: torch.dtype, kind: str = "full", home: str = "") -> nn.Module:
    """Give a module of the meta device random weights, quantised as they are loaded; they are kept at `home`."""
    nn.Module.to(module, dtype).eval()  # diffusers' own `to` would warn about precision
    quantiser = None
    if kind != "full":
        quantiser = DiffusersAutoQuantizer.from_config(memory.quantisation(diffusers, kind, dtype), pre_quantized=False)
        quantiser.preprocess_model(module, device_map=None, keep_in_fp32_modules=[])
    generator, made = Generator(machine.device).manual_seed(0), {}
    for name, weight in [*module.named_parameters(remove_duplicate=False)]:
        owner, _, last = name.rpartition(".")
        if weight not in made:
            value = torch.empty(weight.shape, dtype=dtype, device=machine.device).normal_(0, 0.02, generator=generator)
            if quantiser is not None and quantiser.check_if_quantized_param(module, value, name, {}):
                quantiser.create_quantized_param(module, value, name, torch.device(machine.device), {}, [])
                continue
            made[weight] = nn.Parameter(value.to(home or machine.device), requires_grad=False)
        setattr(module.get_submodule(owner), last, made[weight])
    for name, buffer in [*module.named_buffers()]:
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, torch.zeros_like(buffer, device=home or machine.device))
    return module if quantiser is None else quantiser.postprocess_model(module)


def pipeline(machine: Machine, places: dict[str, str], kind: str = "full") -> Any:
    """FLUX.1 with random weights in the parts that are named, each at its place; all other models are left out."""
    pipe = hub.skeleton(machine.model)
    dtypes = memory.MemoryPlan("", memory.sizes("FLUX.1-schnell"), 0, dtype=machine.dtype).dtypes
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            held = kind if name == "transformer" else "full"
            dtype = dtypes.get(name, dtypes["default"])
            setattr(pipe, name, fill(part, machine, dtype, held, places[name]) if name in places else None)
    return pipe


def prompt_of(pipe: Any, size: int, machine: Machine, chunk: int) -> Any:
    """A prompt of random numbers."""
    generator, blank = Generator().manual_seed(0), families.family(pipe).blank(pipe.transformer.config, machine.tokens)
    encoded = {
        name: torch.randn(value.shape, generator=generator).to(machine.device, pipe.transformer.dtype)
        for name, value in blank.items()
    }
    return FlowModel(pipe, encoded, size, size, 0.0, chunk=chunk)


def states(prompt: Any, rows: int) -> Tensor:
    return torch.randn(rows, *prompt.shape, generator=Generator().manual_seed(1)).to(prompt.device)


def encoding(encoder: Any, machine: Machine) -> Callable[[], object]:
    """A call that encodes a prompt, as long as FLUX.1 reads it."""
    length = getattr(encoder.config, "max_position_embeddings", machine.tokens)  # CLIP's; T5 has no limit of its own
    tokens = torch.zeros(1, length, dtype=torch.int64, device=machine.device)
    return lambda: encoder(input_ids=tokens)


# ------------------------------------------------------------------------------------------------------------- checks
def parity(machine: Machine) -> Iterator[Row]:
    """tiny-flux in float32 on the device and on the CPU: largest differences, and the accounts of four searches."""
    torch.backends.cudnn.allow_tf32 = False  # by which convolutions keep 10 bits of 23
    text = "two red circles left of three blue squares"
    prompts = [FlowModel.encode(load(locate("tiny-flux/schnell"), d), text) for d in ("cpu", machine.device)]
    x = states(prompts[0], 4)
    for what in ("velocity", "decode"):
        answers = []
        for prompt in prompts:
            at = x.to(prompt.device)
            answers.append((prompt(at, at.new_full((4,), 0.7)) if what == "velocity" else prompt.decode(at)).cpu())
        yield {"what": what, "difference": float((answers[0] - answers[1]).abs().max())}
    kernel, times = kernels.sde(kernels.vp_diffusion()), schedules.paper_vp(10)
    for method in (BestOfN(), RBF.few_step(50), SVDD(), SMC()):
        found = []
        for prompt in prompts:
            problem = prompt.problem(counter.CountReward(shapes.parse(text)), kernel, times=times)
            found.append(search(problem, method, max_nfe=50, generator=Generator().manual_seed(0)))
        one, other = ({"nfe": f.nfe, "reward_calls": f.reward_calls, "reward": f.reward} for f in found)
        gap = float((found[0].best - found[1].best.cpu()).abs().max())
        yield {"what": type(method).__name__, "difference": gap, "cpu": one, "device": other}


def velocity(machine: Machine) -> Iterator[Row]:
    """An evaluation by precision, size and batch; before it, what the weights take."""
    for kind in ("full", *LIBRARIES):
        row = {"weights": machine.dtype if kind == "full" else kind}
        if LIBRARIES.get(kind) and util.find_spec(LIBRARIES[kind]) is None:
            yield row | {"skipped": f"{LIBRARIES[kind]} is not installed"}
            continue
        pipe = prompt = call = None
        machine.held()
        try:
            pipe = pipeline(machine, {"transformer": machine.device}, kind)
        except Exception as error:
            yield row | failed(error)
            continue
        planned = memory.Weights.of(hub.skeleton(machine.model).transformer)
        size_of = getattr(torch, machine.dtype).itemsize
        yield row | {"what": "weights", "gib": machine.held(), "planned_gib": planned.gib(kind, size_of)}
        for size in machine.sizes:
            for batch in machine.batches:
                prompt = prompt_of(pipe, size, machine, batch)
                call = partial(prompt.velocity, states(prompt, batch), 0.7)
                measured = machine.measure(call) | machine.foretold("velocity", size, batch)
                yield row | {"size": size, "batch": batch} | measured


def parts(machine: Machine) -> Iterator[Row]:
    """A decode by size, and a prompt encoded by each text encoder."""
    vae = pipeline(machine, {"vae": machine.device}).vae
    for size in machine.sizes:
        side = size // 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.randn(1, vae.config.latent_channels, side, side).to(machine.device, vae.dtype)
        measured = machine.measure(partial(vae.decode, latents)) | machine.foretold("decode", size)
        yield {"what": "decode", "size": size} | measured
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline(machine, {name: machine.device}), name)
        planned = machine.foretold("text", machine.sizes[0]) if name == "text_encoder_2" else {}
        yield {"what": name} | machine.measure(encoding(encoder, machine)) | planned


def plans(machine: Machine) -> Iterator[Row]:
    """Plans of the package carried out where no more memory can be had than they were made for."""
    size = machine.sizes[-1]
    for limit, fixed in LIMITS:
        row: Row = {"limit": limit, "fixed": fixed}
        if machine.cuda and limit > machine.gib:
            yield row | {"skipped": f"the card has {machine.gib:.1f} GiB"}
            continue
        libraries = {} if util.find_spec("torchao") else {"weights": "full"}
        try:
            plan = memory.plan(
                machine.model if machine.tiny else "FLUX.1-schnell", limit, dtype=machine.dtype,
                host=memory.free_gib("cpu"), height=size, width=size, rows=4,
                **{"text_weights": "full", **libraries, **fixed},
            )  # fmt: skip
            machine.held()
            if machine.cuda:
                torch.cuda.set_per_process_memory_fraction(limit / machine.gib)
            yield from (row | {"plan": plan.summary()} | stage for stage in carried_out(plan, size, machine))
        except Exception as error:
            yield row | failed(error)
        finally:
            if machine.cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)


def carried_out(plan: Any, size: int, machine: Machine) -> Iterator[Row]:
    """The stages of a plan, measured: seconds, and the most GiB that were held."""

    def stage(name: str, call: Callable[[], object]) -> Row:
        held, found = machine.held(), machine.measure(call, repeats=1)
        if held is not None and "gib" in found:
            found["gib"] += held
        return {"what": name, **found, "planned_gib": plan.stages[name]}

    texts = dict.fromkeys(("text_encoder", "text_encoder_2"), machine.device)
    places = {"transformer": "cpu" if plan.host else machine.device, "vae": machine.device}
    if plan.text == "dropped":
        alone = pipeline(machine, texts)
        yield stage("prompts", encoding(alone.text_encoder_2, machine))
        del alone
    else:
        places |= dict.fromkeys(texts, "cpu" if plan.text == "offloaded" else machine.device)
    pipe = pipeline(machine, places, plan.weights)
    memory.place(pipe, plan, torch.device(machine.device))
    if plan.text != "dropped":
        yield stage("prompts", encoding(pipe.text_encoder_2, machine))
    prompt = prompt_of(pipe, size, machine, plan.chunk)
    yield stage("velocities", partial(prompt.velocity, states(prompt, plan.chunk), 0.7))
    yield stage("pictures", partial(prompt.decode, states(prompt, plan.decode_chunk), plan.decode_chunk))


def whole_search(machine: Machine) -> Iterator[Row]:
    """RBF with 50 NFE and a random reward, at the smallest size, in batches of 4."""
    size, luck = machine.sizes[0], Generator().manual_seed(1)
    prompt = prompt_of(pipeline(machine, {"transformer": machine.device, "vae": machine.device}), size, machine, 4)
    kernel = kernels.sde(kernels.vp_diffusion())
    problem = prompt.problem(lambda x: torch.rand(len(x), generator=luck), kernel, times=schedules.paper_vp(10))
    start = time.perf_counter()
    found = search(problem, RBF.few_step(50), max_nfe=50, generator=Generator().manual_seed(0))
    row = {"size": size, "seconds": time.perf_counter() - start, "nfe": found.nfe, "reward_calls": found.reward_calls}
    gpu = known_gpu(machine.name, machine.gib)
    if gpu is not None:
        counts = {part: counted(machine, size)[part] for part in ("velocity", "decode")}
        row["planned_seconds"] = cost.estimate(counts, gpu, found.nfe, reward_calls=found.reward_calls - 1).seconds
    yield row


def compiled(machine: Machine) -> Iterator[Row]:
    """An evaluation without torch.compile and with it, by which each kind of block is compiled once."""
    size = machine.sizes[0]
    pipe = pipeline(machine, {"transformer": machine.device})
    prompt = prompt_of(pipe, size, machine, 1)
    call = partial(prompt.velocity, states(prompt, 1), 0.7)
    yield {"what": "eager", "size": size} | machine.measure(call)
    pipe.transformer.compile_repeated_blocks(backend="inductor" if machine.cuda else "eager")
    yield {"what": "compiled", "size": size} | machine.measure(call)


CHECKS = {
    "parity": parity, "velocity": velocity, "parts": parts, "search": whole_search, "plans": plans, "compile": compiled,
}  # fmt: skip


def rows_of(name: str, machine: Machine, end: float) -> Iterator[Row]:
    """The rows of one check; one that fails or finds no time left ends with a row that says so."""
    try:
        rows = CHECKS[name](machine)
        while time.monotonic() < end:
            row = next(rows, None)
            if row is None:
                return
            yield {"check": name, **row}
        yield {"check": name, "skipped": f"{MINUTES} minutes were over"}
    except Exception as error:
        yield {"check": name, **failed(error)}


def main(argv: list[str] | None = None) -> int:
    """Runs the checks; the status is 1 if a row tells of an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="models of toy size; so it is where there is no GPU")
    parser.add_argument("--only", nargs="*", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--out", type=Path, help="folder for the record")
    args = parser.parse_args(argv)
    machine = Machine(torch.cuda.is_available(), args.tiny or not torch.cuda.is_available())
    out = args.out or Path("build/gpu" if machine.tiny else "data/results/gpu")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{re.sub(r'[^A-Za-z0-9]+', '-', machine.name).strip('-')}{'-tiny' if machine.tiny else ''}.json"
    names = (*NEEDED, *LIBRARIES.values())
    record: dict[str, Any] = {
        "card": machine.name, "gib": round(machine.gib, 1), "tiny": machine.tiny, "dtype": machine.dtype,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {n: metadata.version(n) for n in names if util.find_spec(n)} | {"torch": torch.__version__},
    }  # fmt: skip
    start, rows = time.monotonic(), []
    for name in args.only:
        for row in rows_of(name, machine, start + 60 * MINUTES):
            rows.append(row)
            print(json.dumps(row), flush=True)
            record |= {"seconds": round(time.monotonic() - start, 1), "rows": rows}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"record: {path}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
