"""Tiny random pipelines, one of each class that the package supports, built from configs: no downloads.

Weights are random, so pictures are noise; but every convention (packing, clocks, signs, guidance) is the class's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from tools.train.tiny_flux import TOKENS, build_tokenizers

TEXT = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
DECODER = {
    **TEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>assistant"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Letters as tokens, with a chat template."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: i for i, letter in enumerate(sorted(bytes_to_unicode().values()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(chr(k) for k in range(32, 127)), "\u2581"]
    return GemmaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])


def clip(projection: bool) -> Any:
    tokenizer, _ = build_tokenizers()
    config = CLIPTextConfig(**TEXT | {"vocab_size": len(tokenizer)}, num_hidden_layers=2, projection_dim=32,
                            max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> T5EncoderModel:
    _, tokenizer = build_tokenizers()
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2))


def autoencoder(cls: type = AutoencoderKL, channels: int = 4, **more: Any) -> Any:
    """8x down, like FLUX's and SD3's."""
    return cls(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
               block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
               sample_size=64, **more)  # fmt: skip


def flux() -> FluxPipeline:
    """FLUX.1-dev: distilled guidance, shift by resolution, 2 x 2 patches packed into tokens."""
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = autoencoder(scaling_factor=0.7, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    words, pieces = build_tokenizers()
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, clip(False), words, t5(),
                        pieces, transformer)  # fmt: skip


def flux2_klein(distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2-klein: guidance by a second forward unless distilled, latents normalised by statistics."""
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = autoencoder(AutoencoderKLFlux2)
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    text = Qwen3ForCausalLM(Qwen3Config(**DECODER | {"num_hidden_layers": 28}))
    return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, text, qwen_tokenizer(),
                              transformer, is_distilled=distilled)  # fmt: skip


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """SD3 and SD3.5: guidance by doubling the batch, times up to 1000, no packing."""
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32 * 2, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    words, pieces = build_tokenizers()
    long = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=64, d_kv=16, d_ff=48, num_layers=2, num_heads=2))
    vae = autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clip(True), words,
                                    clip(True), words, long, pieces)  # fmt: skip


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: guidance by a second forward, rescaled to the norm of the first; a video autoencoder."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 0.7],
    )  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    language = {k: v for k, v in DECODER.items() if k != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**language, "rope_parameters": rope}, vision_config=vision)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
    return QwenImagePipeline(scheduler, vae, text, qwen_tokenizer(), transformer)


def z_image() -> ZImagePipeline:
    """Z-Image: the clock runs backwards and the sign is turned round; prompts and latents in lists."""
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 8, 8], axes_lens=[256, 32, 32],
    )  # fmt: skip
    vae = autoencoder(scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    text = Qwen3ForCausalLM(Qwen3Config(**DECODER))
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text.model, qwen_tokenizer(), transformer)


def sana() -> SanaPipeline:
    """Sana: 32x (here 8x) autoencoder, linear attention, guidance by doubling the batch."""
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
        sample_size=8,
    )  # fmt: skip
    blocks = {f"{side}_block_types": ("ResBlock",) * 4 for side in ("encoder", "decoder")}
    sizes = {f"{side}_block_out_channels": (8, 8, 8, 8) for side in ("encoder", "decoder")}
    depth = {f"{side}_layers_per_block": (1, 1, 1, 1) for side in ("encoder", "decoder")}
    scales = {f"{side}_qkv_multiscales": ((), (), (), ()) for side in ("encoder", "decoder")}
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **blocks, **sizes, **depth, **scales
    )
    text = Gemma2Model(Gemma2Config(**DECODER, query_pre_attn_scalar=16))
    return SanaPipeline(gemma_tokenizer(), text, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))


BUILDERS: dict[str, Callable[[], Any]] = {
    "FluxPipeline": flux,
    "Flux2KleinPipeline": flux2_klein,
    "Flux2KleinPipeline, distilled": lambda: flux2_klein(distilled=True),
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
    "SanaPipeline": sana,
}


def build(name: str) -> Any:
    """A pipeline ready for inference; the same weights every time, and the global generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = BUILDERS[name]()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
                for parameter in part.parameters():  # some layers start at zero, and would hide what they are fed
                    if not parameter.any():
                        parameter.normal_(std=0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe
