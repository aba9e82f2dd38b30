"""The parts tiny-flux is made of and the way it is trained."""

import json

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Generator, nn

from flowscale_lite.tiny import shapes
from tools.train import tiny_flux
from tools.train.tiny_flux import Averaged, Checkpoint, Denoiser, Log, Recipe, fit


def test_every_word_is_one_token_and_every_caption_fits():
    denoiser = Denoiser()
    for word in tiny_flux.WORDS:
        assert len(denoiser.tokenizer.tokenize(word)) == (2 if word == "10" else 1)  # CLIP's rules read digits singly
        assert denoiser.tokenizer_2.tokenize(word) == [f"▁{word}"]
    rng = np.random.default_rng(0)
    captions = [shapes.random_scene(rng).wording(rng) for _ in range(2000)]
    clip, t5 = denoiser.tokenize(captions)
    assert (clip == denoiser.tokenizer.eos_token_id).any(1).all(), "a prompt was cut"
    assert (t5 == denoiser.tokenizer_2.eos_token_id).any(1).all(), "a prompt was cut"
    assert not (t5 == denoiser.tokenizer_2.unk_token_id).any(), "a word is unknown"


def train(work, steps: int, stop: int | None = None) -> list[float]:
    """Fit a line; with `stop` the run is interrupted before that step. Returns the averaged weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(generator: Generator, rows: int) -> torch.Tensor:
        x = torch.randn(rows, 3, generator=generator)
        if stop is not None and torch.equal(x, torch.randn(rows, 3, generator=Generator().manual_seed(stop))):
            raise KeyboardInterrupt
        return ((model(x).float() - x.sum(1, keepdim=True)) ** 2).mean()

    measure = lambda m: {"norm": m.weight.norm().item()}  # noqa: E731
    recipe = Recipe(steps, rate=1e-2, batch=8)
    return fit("line", model, loss_of, recipe, work, Log(work / "log.jsonl"), measure).weight.tolist()


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    whole = train(tmp_path / "whole", 600)
    try:
        train(tmp_path / "parts", 600, stop=400)
        raise AssertionError("was not interrupted")
    except KeyboardInterrupt:
        pass
    assert train(tmp_path / "parts", 600) == whole
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [250, 500, 600]


def test_the_learning_rate_warms_up_and_falls():
    recipe = Recipe(steps=100, rate=2.0, warmup=10)
    assert recipe.rate_at(0) == 0.2 and recipe.rate_at(100) == 0
    torch.testing.assert_close(recipe.rate_at(50), 1.0)
    rates = [recipe.rate_at(step) for step in range(101)]
    assert rates.index(max(rates)) == 9, "the peak is where the warm-up ends"


def test_checkpoints_hold_models_and_optimiser(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    Checkpoint(tmp_path / "c.safetensors", {"model": model}, optimizer).save(7)
    copy = nn.Linear(2, 2)
    restored = torch.optim.AdamW(copy.parameters())
    assert Checkpoint(tmp_path / "c.safetensors", {"model": copy}, restored).load() == 7
    assert torch.equal(copy.weight, model.weight)
    for a, b in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert Checkpoint(tmp_path / "none.safetensors", {"model": copy}, restored).load() == 0


def test_averaged_weights_follow_and_forget_the_start():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    averaged = Averaged(model, decay=0.9)
    nn.init.constant_(model.weight, 1.0)
    for step in range(200):
        averaged.update(model, step)
    assert abs(averaged.model.weight.item() - 1) < 1e-4 and not averaged.model.weight.requires_grad


def test_the_flow_of_a_straight_line_is_exact_in_one_step():
    x0, eps = torch.randn(4, 16, 32, generator=Generator().manual_seed(0)), torch.ones(4, 16, 32)
    straight = lambda x, t, text, guidance: eps - x0  # noqa: E731
    for times in ((1.0, 0.0), (1.0, 0.7, 0.2, 0.0)):
        torch.testing.assert_close(tiny_flux.euler(straight, eps, (eps, eps), times, None), x0)


def test_guidance_becomes_a_bias():
    """schnell starts as dev at its guidance: same velocity, no guidance embedding."""
    dev, schnell = Denoiser(), Denoiser(guidance=False)
    schnell.load_state_dict(tiny_flux.without_guidance(dev, 2.0))
    x, t = torch.randn(3, 16, 32, generator=Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        text = dev.encode(*dev.tokenize(["one red circle", "two blue squares", ""]))
        ours = schnell(x, t, schnell.encode(*dev.tokenize(["one red circle", "two blue squares", ""])))
        torch.testing.assert_close(ours, dev(x, t, text, torch.full((3,), 2.0)), atol=1e-5, rtol=1e-4)
        assert (ours - dev(x, t, text, torch.full((3,), 4.0))).abs().max() > 1e-3


def test_every_stage_runs_and_ends_in_pipelines(tmp_path):
    """The whole training, a few steps each, from drawings to two folders that diffusers reads."""
    work, out = tmp_path / "work", tmp_path / "out"
    tiny_flux.train_autoencoder(work, out, steps=2, batch=8, pool=200)
    tiny_flux.make_latents(work, 1000)
    tiny_flux.train_dev(work, out, 2, batch=8)
    tiny_flux.distil_guidance(work, out, 2, batch=8)
    tiny_flux.make_pairs(work, 512, steps=1)
    tiny_flux.train_schnell(work, out, 2, batch=8)
    tiny_flux.export(work, out)
    stages = [json.loads(line)["stage"] for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert stages == ["autoencoder", "dev", "guidance", "schnell"]
    pairs = tiny_flux.read_blocks(work / "pairs")
    assert pairs["eps"].shape == pairs["x0"].shape == (512, 16, 32) and not torch.equal(pairs["eps"], pairs["x0"])
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16, "output_type": "pt"}
    for name in ("dev", "schnell"):
        pipe = FluxPipeline.from_pretrained(out / name)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("one red circle", generator=Generator().manual_seed(0), **options).images.shape == (1, 3, 64, 64)
        assert pipe.transformer.config.guidance_embeds == pipe.scheduler.config.use_dynamic_shifting == (name == "dev")
