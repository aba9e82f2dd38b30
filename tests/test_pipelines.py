"""A FluxPipeline as a Problem: equal to diffusers' own call, whatever the chunks; the same seed, the same picture."""

import pytest
import torch
from torch import Generator

from flowscale_lite import RBF, BestOfN, assets, gaussian, ode, pipelines, search, shapes
from flowscale_lite.pipelines import Prompt

TEXT = "three red circles and two blue squares"
REWARD = shapes.CountReward(shapes.parse(TEXT))


@pytest.fixture(scope="module", params=["dev", "schnell"])
def pipe(request):
    return pipelines.load(assets.data(f"tiny-flux/{request.param}"))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def diffusers_pictures(pipe, number: int, steps: int) -> torch.Tensor:
    return pipe(
        TEXT, height=64, width=64, num_inference_steps=steps, guidance_scale=2.0, max_sequence_length=16,
        num_images_per_prompt=number, generator=seeded(), output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_ode_equals_the_pipelines_own_call(pipe, number, steps, chunk):
    """Same generator, the pipeline's own sigmas and latents: equal pictures to 1e-4."""
    last = []
    prompt = Prompt.encode(pipe, TEXT, guidance=2.0, chunk=chunk)
    problem = prompt.problem(REWARD, ode, steps, decode_chunk=chunk)
    result = search(problem, BestOfN(number), max_nfe=number * steps, generator=seeded(),
                    on_step=lambda p, run: last.append(p))  # fmt: skip
    pictures = prompt.decode(last[-1].x, chunk)
    expected = diffusers_pictures(pipe, number, steps)
    assert result.nfe == number * steps and pictures.shape == (number, 3, 64, 64)
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)
    best = int(REWARD(expected).argmax())
    torch.testing.assert_close(prompt.decode(result.best[None]), expected[best : best + 1], atol=1e-4, rtol=0)


def test_same_seed_same_picture_whatever_the_chunks(pipe):
    results = []
    for chunk, decode_chunk in ((16, 16), (16, 16), (3, 5)):
        problem = Prompt.encode(pipe, TEXT, guidance=2.0, chunk=chunk).problem(
            REWARD, gaussian(), 6, decode_chunk=decode_chunk
        )
        results.append(search(problem, RBF(init=4, batch=4), max_nfe=40, generator=seeded(3)))
    first, again, chunked = results
    assert torch.equal(first.best, again.best) and first.trace == again.trace
    torch.testing.assert_close(first.best, chunked.best, atol=1e-4, rtol=0)
    assert (first.nfe, first.reward_calls) == (chunked.nfe, chunked.reward_calls)
    other = search(problem, RBF(init=4, batch=4), max_nfe=40, generator=seeded(4))
    assert (other.best - first.best).abs().max() > 0.1


def test_a_text_is_encoded_once_and_the_pipeline_left_as_it_was(pipe):
    config, parts, noise = dict(pipe.config), dict(pipe.components), torch.get_rng_state()
    calls = []
    hook = pipe.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    for guidance in (2.0, 3.0):
        problem = Prompt.encode(pipe, "a green triangle", guidance=guidance).problem(REWARD, ode, 5)
        search(problem, BestOfN(2), max_nfe=10, generator=seeded())
    assert len(calls) == 1
    Prompt.encode(pipe, "a green triangle", max_tokens=8)
    assert len(calls) == 2, "another token limit, another encoding"
    hook.remove()
    assert dict(pipe.config) == config and torch.equal(torch.get_rng_state(), noise)
    assert all(pipe.components[name] is part for name, part in parts.items())


def test_the_look_ahead_is_the_decoded_posterior_mean(pipe):
    seen = []
    problem = Prompt.encode(pipe, TEXT).problem(
        lambda pictures: seen.append(pictures) or REWARD(pictures), gaussian(), 4
    )
    search(problem, RBF(init=2, batch=2), max_nfe=8, generator=seeded())
    assert all(p.shape[1:] == (3, 64, 64) and p.min() >= 0 and p.max() <= 1 for p in seen)


def test_bad_input_is_refused_with_a_reason(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        pipelines.load(tmp_path)
    with pytest.raises(ValueError, match="multiples of 16"):
        Prompt.encode(pipe, TEXT, height=70)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Prompt.encode(pipe, TEXT, chunk=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Prompt.encode(pipe, TEXT).times(0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            pipelines.load(assets.data("tiny-flux/dev"), device="cuda")


def test_tiny_flux_is_a_plain_diffusers_pipeline(pipe):
    """What a reader does who has never heard of us."""
    from diffusers import FluxPipeline

    plain = FluxPipeline.from_pretrained(assets.data("tiny-flux/schnell"))
    plain.set_progress_bar_config(disable=True)
    image = plain(TEXT, height=64, width=64, num_inference_steps=4, max_sequence_length=16, generator=seeded()).images[
        0
    ]
    assert image.size == (64, 64)
    assert plain.tokenizer_2.tokenize("three red circles") == ["▁three", "▁red", "▁circles"]
