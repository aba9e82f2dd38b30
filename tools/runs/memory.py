"""`python -m tools.runs.memory`: counts the models that `flowscale_lite.flux.memory` knows, and prints its table SIZES.

`python -m tools.runs.memory plans` prints the plan chosen for each model on each card, as Markdown.
Models are built without weights from the sizes that their makers publish in the configs of their repositories.
Activations are counted with Python 3.11; later versions drop some temporaries earlier and count about 2 % less at most.
"""

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from flowscale_lite.flux import memory

FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def t5_xxl() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def clip(width: int, layers: int, heads: int, projection: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=projection or width,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def qwen3(width: int, inner: int, tied: bool) -> Any:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(hidden_size=width, intermediate_size=inner, tie_word_embeddings=tied, **QWEN3)
    )


def flux(guidance: bool) -> Any:
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=guidance)
    vae = diffusers.AutoencoderKL(**FLUX_VAE)
    return diffusers.FluxPipeline(None, vae, clip(768, 12, 12), None, t5_xxl(), None, transformer)


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
    vae = diffusers.AutoencoderKL(**FLUX_VAE)
    texts = clip(768, 12, 12, 768), None, clip(1280, 32, 20, 1280), None, t5_xxl(), None
    return diffusers.StableDiffusion3Pipeline(transformer, None, vae, *texts)


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
    vae = diffusers.AutoencoderKL(**FLUX_VAE)
    return diffusers.ZImagePipeline(None, vae, qwen3(2560, 9728, True), None, diffusers.ZImageTransformer2DModel())


def sana() -> Any:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    vae = diffusers.AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks, scaling_factor=0.41407)
    text = transformers.Gemma2Model(transformers.Gemma2Config())
    return diffusers.SanaPipeline(None, text, vae, diffusers.SanaTransformer2DModel(), None)


# Name: how it is built, and the guidance that its makers recommend.
MODELS: dict[str, tuple[Callable[[], Any], float]] = {
    "FLUX.1-schnell": (lambda: flux(False), 0.0),
    "FLUX.1-dev": (lambda: flux(True), 3.5),
    "FLUX.2-klein-4B": (lambda: flux2_klein(5, 20, 24, 2560, 9728, True), 1.0),
    "FLUX.2-klein-9B": (lambda: flux2_klein(8, 24, 32, 4096, 12288, False), 1.0),
    "stable-diffusion-3.5-medium": (lambda: stable_diffusion_3(24, 13, 384), 4.5),
    "stable-diffusion-3.5-large": (lambda: stable_diffusion_3(38, 0, 192), 4.5),
    "Qwen-Image": (qwen_image, 4.0),
    "Z-Image-Turbo": (z_image, 0.0),
    "Sana_1600M_1024px_diffusers": (sana, 4.5),
}


def build(name: str) -> Any:
    """The pipeline of a model without weights."""
    with torch.device("meta"):
        pipe = MODELS[name][0]()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipe


def count(name: str) -> memory.Sizes:
    return memory.count(build(name), 1024, 1024, MODELS[name][1])


def table() -> str:
    """The plan of every model on every card, as Markdown."""
    lines = ["| model | " + " | ".join(memory.CARDS) + " |", "|---|" + "---|" * len(memory.CARDS)]
    for name in MODELS:
        plans = [memory.plan(name, card.gib, dtype=card.dtype) for card in memory.CARDS.values()]
        lines.append(f"| {name} | " + " | ".join(plan.summary() for plan in plans) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sizes", "plans"), nargs="?", default="sizes")
    if parser.parse_args().what == "plans":
        print(table())
        return
    for name in MODELS:
        s = count(name)
        weights = ", ".join(f"Weights({w.linear}, {w.rows}, {w.other})" for w in (s.transformer, s.text, s.vae))
        print(f'"{name}": Sizes({weights}, {s.row:.3f}, {s.decode:.2f}, {s.tile:.2f}),', flush=True)


if __name__ == "__main__":
    main()
