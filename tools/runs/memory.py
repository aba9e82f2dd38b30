"""`python -m tools.runs.memory`: counts the models that `flowscale_lite.flux.memory` knows, and writes its sizes.json.

`python -m tools.runs.memory plans` prints the plan chosen for each model on each GPU, as Markdown.
Models are built without weights from the sizes that their makers publish in the configs of their repositories.
Activations are counted with Python 3.11; later versions drop some temporaries earlier and count about 2 % less at most.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from flowscale_lite.flux import cost, families, hub, memory

QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def clip(width: int, layers: int, heads: int) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def qwen3(width: int, inner: int, tied: bool) -> Any:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(hidden_size=width, intermediate_size=inner, tie_word_embeddings=tied, **QWEN3)
    )


def flux(guidance: bool) -> Any:
    pipe = hub.skeleton(cost.FLUX1)
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=guidance)
    return pipe


def flux2_klein(double: int, single: int, heads: int, width: int, inner: int, tied: bool) -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=double, num_single_layers=single, num_attention_heads=heads, joint_attention_dim=3 * width,
        guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2()
    return diffusers.Flux2KleinPipeline(None, vae, qwen3(width, inner, tied), None, transformer, is_distilled=True)


def stable_diffusion_3(layers: int, dual: int, positions: int) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=layers, num_attention_heads=layers, caption_projection_dim=64 * layers, qk_norm="rms_norm",
        pos_embed_max_size=positions, dual_attention_layers=tuple(range(dual)),
    )  # fmt: skip
    other = hub.skeleton(cost.FLUX1)
    texts = clip(768, 12, 12), None, clip(1280, 32, 20), None, other.text_encoder_2, None
    return diffusers.StableDiffusion3Pipeline(transformer, None, other.vae, *texts)


def qwen_image() -> Any:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    language = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": rope}  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=language, vision_config=vision)
    text = transformers.Qwen2_5_VLForConditionalGeneration(config)
    transformer = diffusers.QwenImageTransformer2DModel()
    return diffusers.QwenImagePipeline(None, diffusers.AutoencoderKLQwenImage(), text, None, transformer)


def z_image() -> Any:
    text, transformer = qwen3(2560, 9728, True), diffusers.ZImageTransformer2DModel()
    return diffusers.ZImagePipeline(None, hub.skeleton(cost.FLUX1).vae, text, None, transformer)


def sana() -> Any:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    vae = diffusers.AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks, scaling_factor=0.41407)
    text = transformers.Gemma2Model(transformers.Gemma2Config())
    return diffusers.SanaPipeline(None, text, vae, diffusers.SanaTransformer2DModel(), None)


MODELS: dict[str, Callable[[], Any]] = {
    "FLUX.1-schnell": lambda: flux(False),
    "FLUX.1-dev": lambda: flux(True),
    "FLUX.2-klein-4B": lambda: flux2_klein(5, 20, 24, 2560, 9728, True),
    "FLUX.2-klein-9B": lambda: flux2_klein(8, 24, 32, 4096, 12288, False),
    "stable-diffusion-3.5-medium": lambda: stable_diffusion_3(24, 13, 384),
    "stable-diffusion-3.5-large": lambda: stable_diffusion_3(38, 0, 192),
    "Qwen-Image": qwen_image,
    "Z-Image-Turbo": z_image,
    "Sana_1600M_1024px_diffusers": sana,
}


def build(name: str) -> Any:
    """The pipeline of a model without weights."""
    with torch.device("meta"):
        pipe = MODELS[name]()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipe


def count(name: str) -> dict[str, Any]:
    """The entry of a model in sizes.json, see `memory.stored_sizes`."""
    pipe = build(name)
    above = guided_above(pipe)
    with hub.quiet():
        once = memory.count_sizes(pipe, 1024, 1024, 0.0)
        most = once if above is None else memory.count_sizes(pipe, 1024, 1024, above + 1)
    entry = asdict(most) | {"row": round(once.row, 3), "decode": round(most.decode, 2), "tile": round(most.tile, 2)}
    if above is not None:
        entry["guided"] = {"above": above, "row": round(most.row, 3)}
    return entry


def guided_above(pipe: Any) -> float | None:
    """The guidance scale above which a pipeline runs its model twice; None if it never does."""
    guided = families.family(pipe).guided
    return next((scale for scale in (0.0, 1.0) if guided(pipe, scale + 0.1)), None)


def table() -> str:
    """The plan of every model on every GPU, as Markdown."""
    lines = ["| model | " + " | ".join(cost.GPUS) + " |", "|---|" + "---|" * len(cost.GPUS)]
    for name in MODELS:
        plans = [memory.plan(name, gpu.memory, dtype=gpu.dtype) for gpu in cost.GPUS.values()]
        lines.append(f"| {name} | " + " | ".join(plan.summary() for plan in plans) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sizes", "plans"), nargs="?", default="sizes")
    if parser.parse_args().what == "plans":
        print(table())
        return
    lines = []
    for name in MODELS:
        lines.append(f"{json.dumps(name)}: {json.dumps(count(name))}")
        print(lines[-1], flush=True)
    path = Path(memory.__file__).with_name("sizes.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
