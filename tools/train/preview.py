"""`python -m tools.train.preview`: distils tiny-flux's decoder into a smaller one, half an hour of CPU time.

A search decodes every look-ahead, and on tiny-flux that takes as long as the model itself. The small decoder learns to
draw what the full one draws, of latents as a search meets them: look-aheads of both models at all times.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flowscale_lite.flux import FlowModel, hub
from flowscale_lite.tiny import shapes
from flowscale_lite.tiny.data import locate

CHANNELS = 8
OUT = Path("data/tiny-flux/preview")


def build(full: AutoencoderTiny) -> AutoencoderTiny:
    """The model's encoder with a decoder of a third of the channels."""
    small = AutoencoderTiny(
        encoder_block_out_channels=full.config.encoder_block_out_channels,
        num_encoder_blocks=full.config.num_encoder_blocks,
        decoder_block_out_channels=(CHANNELS,) * 4,
        num_decoder_blocks=(4, 4, 3, 1),
        latent_channels=full.config.latent_channels,
        scaling_factor=full.config.scaling_factor,
        shift_factor=full.config.shift_factor,
    )
    small.encoder.load_state_dict(full.encoder.state_dict())
    return small


@torch.no_grad()
def look_aheads(model: str, scenes: int, rows: int, seed: int) -> Tensor:
    """Look-aheads x - t v of random scenes, `rows` of each, at times from 0 to 1, as the decoder is handed them."""
    pipe, rng = hub.load(locate(f"tiny-flux/{model}")), np.random.default_rng(seed)
    generator, config, found = torch.Generator().manual_seed(seed), pipe.vae.config, []
    for _ in tqdm(range(scenes), desc=model):
        scene = shapes.random_scene(rng)
        prompt = FlowModel.encode(pipe, scene.caption(), guidance=2.0)
        pictures = shapes.to_tensor(shapes.render([scene] * rows, rng))
        x0 = (pipe.vae.encoder(pictures * 2 - 1) - config.shift_factor) * config.scaling_factor
        for part in x0.split(rows // 5):  # one time for each fifth
            t = torch.rand((), generator=generator).sqrt()  # more of the noisy end, where look-aheads are blurred
            x = torch.lerp(part, torch.randn(part.shape, generator=generator), t)
            found.append(x - t * prompt.velocity(x, float(t)))
    return torch.cat(found) / config.scaling_factor + config.shift_factor


def train(out: Path, steps: int = 8000, batch: int = 32, scenes: int = 500, rows: int = 25) -> float:
    """Train the decoder and save it; returns its mean absolute error on latents that it has not seen, in [0, 1]."""
    full = hub.load(locate("tiny-flux/dev")).vae
    latents = torch.cat([look_aheads(model, scenes, rows, seed) for seed, model in enumerate(("dev", "schnell"))])
    with torch.no_grad():
        pictures = torch.cat([full.decoder(part).half() for part in tqdm(latents.split(50), desc="pictures")])
    torch.manual_seed(0)
    pick = torch.randperm(len(latents))
    seen, unseen = pick[500:], pick[:500]
    small = build(full).to(memory_format=torch.channels_last)
    small.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(small.decoder.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1)
    for step in (progress := tqdm(range(steps), desc="training")):
        picked = seen[torch.randint(len(seen), (batch,))]
        error = small.decoder(latents[picked]) - pictures[picked].float()
        loss = (error**2).mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.5f}")
    with torch.no_grad():
        apart = F.l1_loss(small.decoder(latents[unseen]), pictures[unseen].float()) / 2  # decoders draw in [-1, 1]
    small.to(memory_format=torch.contiguous_format).save_pretrained(out)
    return float(apart)


if __name__ == "__main__":
    print(f"mean absolute error on new latents: {train(OUT):.5f}")
