"""A FluxPipeline as a Problem: equal to diffusers' own call, whatever the chunks; the same seed, the same picture."""

import copy
import shutil

import httpx
import huggingface_hub
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Generator
from transformers.utils import logging as transformers_logging

from flowscale_lite import RBF, BestOfN, Run, ddim, flux, ode, search
from flowscale_lite.flux import FlowModel, hub
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate

TEXT = "three red circles and two blue squares"
REWARD = counter.CountReward(shapes.parse(TEXT))


@pytest.fixture(scope="module", params=["dev", "schnell"])
def pipe(request):
    return flux.load(locate(f"tiny-flux/{request.param}"))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def diffusers_pictures(pipe, number: int, steps: int) -> torch.Tensor:
    return pipe(
        TEXT, height=64, width=64, num_inference_steps=steps, guidance_scale=2.0, max_sequence_length=16,
        num_images_per_prompt=number, generator=seeded(), output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (10, 0.6), (10, 1.0)])
def test_image_to_image_equals_diffusers(pipe, steps, strength):
    """From a picture's latents, noised to where the strength begins, down the pipeline's own grid: equal to 1e-4."""
    picture = torch.rand(1, 3, 8, 8, generator=seeded(1)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = FluxImg2ImgPipeline(**pipe.components)(
        TEXT, image=picture, height=64, width=64, num_inference_steps=steps, strength=strength, guidance_scale=2.0,
        max_sequence_length=16, generator=seeded(), output_type="pt",
    ).images  # fmt: skip

    prompt, generator = FlowModel.encode(pipe, TEXT, guidance=2.0), seeded()
    times = prompt.times(steps)[steps - round(steps * strength) :]
    run = Run(prompt.problem(REWARD, ode, times=times), max_nfe=steps, generator=generator)
    x0 = prompt.latents(picture, generator)
    p = run.start(1, (1 - times[0]) * x0 + times[0] * torch.randn(x0.shape, generator=generator))
    while p.t > 0:
        p = run.propose(p)
    torch.testing.assert_close(prompt.decode(p.x), expected, atol=1e-4, rtol=0)


def test_the_latents_of_a_picture_decode_to_it(pipe):
    prompt = FlowModel.encode(pipe, TEXT, guidance=2.0)
    x = search(prompt.problem(REWARD, ode, 4), BestOfN(1), max_nfe=4, generator=seeded()).best[None]
    picture = prompt.decode(x)
    assert (prompt.decode(prompt.latents(picture)) - picture).abs().mean() < 0.05
    with pytest.raises(ValueError, match=r"pictures must be \(K, 3, 64, 64\); got \(1, 3, 64, 32\)"):
        prompt.latents(picture[..., :32])


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_ode_equals_the_pipelines_own_call(pipe, number, steps, chunk):
    """Same generator, the pipeline's own sigmas and latents: equal pictures to 1e-4."""
    prompt = FlowModel.encode(pipe, TEXT, guidance=2.0, chunk=chunk)
    problem = prompt.problem(REWARD, ode, steps, decode_chunk=chunk)
    result = search(problem, BestOfN(number), max_nfe=number * steps, generator=seeded())
    pictures = prompt.decode(result.particles.x, chunk)
    expected = diffusers_pictures(pipe, number, steps)
    assert result.nfe == number * steps and pictures.shape == (number, 3, 64, 64)
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)
    best = int(REWARD(expected).argmax())
    torch.testing.assert_close(prompt.decode(result.best[None]), expected[best : best + 1], atol=1e-4, rtol=0)


def test_a_lora_loaded_before_the_search_is_searched_with(tmp_path):
    """`load_lora_weights`, as always: the pipeline's own pictures to 1e-4, which are not those without the LoRA."""
    pipe = flux.load(locate("tiny-flux/schnell"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer))

    pipe = flux.load(locate("tiny-flux/schnell"))
    plain = diffusers_pictures(pipe, 2, 4)
    pipe.load_lora_weights(tmp_path)
    problem = FlowModel.encode(pipe, TEXT, guidance=2.0).problem(REWARD, ode, 4)
    found = search(problem, BestOfN(2), max_nfe=8, generator=seeded())
    pictures = FlowModel.encode(pipe, TEXT, guidance=2.0).decode(found.particles.x)
    torch.testing.assert_close(pictures, diffusers_pictures(pipe, 2, 4), atol=1e-4, rtol=0)
    assert (pictures - plain).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_same_seed_same_picture_whatever_the_chunks(pipe):
    results = []
    for chunk, decode_chunk in ((16, 16), (16, 16), (3, 5)):
        problem = FlowModel.encode(pipe, TEXT, guidance=2.0, chunk=chunk).problem(
            REWARD, ddim(), 6, decode_chunk=decode_chunk
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
        problem = FlowModel.encode(pipe, "a green triangle", guidance=guidance).problem(REWARD, ode, 5)
        search(problem, BestOfN(2), max_nfe=10, generator=seeded())
    assert len(calls) == 1
    FlowModel.encode(pipe, "a green triangle", max_tokens=8)
    assert len(calls) == 2, "another token limit, another encoding"
    hook.remove()
    assert dict(pipe.config) == config and torch.equal(torch.get_rng_state(), noise)
    assert all(pipe.components[name] is part for name, part in parts.items())


@pytest.mark.parametrize(
    "text", ["Three red circles and two blue squares.", "THREE RED CIRCLES and two blue squares", f"{TEXT},"]
)
def test_capitals_and_full_stops_are_read_as_the_counter_reads_them(pipe, text):
    """To tiny-flux's T5 each such word is unknown, while the counter knows it."""
    read, expected = (FlowModel.encode(pipe, words).encoded for words in (text, TEXT))
    torch.testing.assert_close(read, expected, rtol=0, atol=0)


def test_unknown_words_and_what_the_token_limit_cuts_off_are_said(pipe):
    with pytest.warns(UserWarning, match=r"does not know these words of the prompt: photo, cats\.$"):
        FlowModel.encode(pipe, "a photo of three red circles and two cats.")
    long = TEXT + " and four green triangles and one yellow circle and two red triangles"
    with pytest.warns(UserWarning, match=r"19 tokens and the model reads 15, up to .* one yellow circle'"):
        FlowModel.encode(pipe, long)


def test_the_look_ahead_is_the_decoded_posterior_mean(pipe):
    seen = []
    problem = FlowModel.encode(pipe, TEXT).problem(
        lambda pictures: seen.append(pictures) or REWARD(pictures), ddim(), 4
    )
    search(problem, RBF(init=2, batch=2), max_nfe=8, generator=seeded())
    assert all(p.shape[1:] == (3, 64, 64) and p.min() >= 0 and p.max() <= 1 for p in seen)


def test_as_many_pictures_as_rows_of_a_forward_pass_are_decoded_at_a_time_by_default(pipe):
    prompt, sizes = FlowModel.encode(pipe, TEXT, chunk=3), []
    judge = lambda pictures: sizes.append(len(pictures)) or REWARD(pictures)  # noqa: E731
    prompt.problem(judge, ode).reward(torch.zeros(7, *prompt.shape))
    prompt.problem(judge, ode, decode_chunk=5).reward(torch.zeros(7, *prompt.shape))
    assert sizes == [3, 3, 1, 5, 2]


def test_bad_input_is_refused_with_a_reason(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        flux.load(tmp_path)
    with pytest.raises(ValueError, match="multiples of 16"):
        FlowModel.encode(pipe, TEXT, height=70)
    for side in ({"height": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="multiples of 16"):
            FlowModel.encode(pipe, TEXT, **side)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        FlowModel.encode(pipe, TEXT, chunk=0)
    prompt = FlowModel.encode(pipe, TEXT)
    with pytest.raises(ValueError, match="decode_chunk must be at least 1"):
        prompt.problem(REWARD, ode, decode_chunk=0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        prompt.decode(torch.zeros(1, *prompt.shape), 0)
    with pytest.raises(ValueError, match="guidance must be a finite number"):
        FlowModel.encode(pipe, TEXT, guidance=float("nan"))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        FlowModel.encode(pipe, TEXT).times(0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            flux.load(locate("tiny-flux/dev"), device="cuda")


def test_tiny_flux_is_a_plain_diffusers_pipeline(pipe):
    """What a reader does who has never heard of us."""
    from diffusers import FluxPipeline

    plain = FluxPipeline.from_pretrained(locate("tiny-flux/schnell"))
    plain.set_progress_bar_config(disable=True)
    image = plain(TEXT, height=64, width=64, num_inference_steps=4, max_sequence_length=16, generator=seeded()).images[
        0
    ]
    assert image.size == (64, 64)
    assert plain.tokenizer_2.tokenize("three red circles") == ["▁three", "▁red", "▁circles"]


def test_a_pipeline_of_another_precision_wants_its_prompts_encoded_again(pipe):
    moved = copy.deepcopy(pipe).to(torch.bfloat16)
    x, t = torch.zeros(1, *FlowModel.encode(pipe, TEXT).shape), torch.full((1,), 0.5)
    assert FlowModel.encode(moved, TEXT)(x, t).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "xpu:99", "abacus", "cuda:99"])
def test_devices_that_hold_no_numbers_are_refused(device):
    with pytest.raises(ValueError, match=r"no such device|no (such )?CUDA GPU"):
        flux.load(locate("tiny-flux/dev"), device)


def test_a_device_may_be_torchs_own():
    assert flux.load(locate("tiny-flux/dev"), torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '"FluxPipeline"'])
def test_a_model_index_that_names_no_pipeline_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model_index.json does not say which pipeline"):
        hub.index(tmp_path)


@pytest.mark.parametrize(("part", "name"), [("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_weights_that_are_pickles_are_refused(tmp_path, part, name):
    folder = shutil.copytree(locate("tiny-flux/dev"), tmp_path / "model")
    (weights,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(weights), folder / part / f"{name}.bin")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="lacks safetensors weights; others are not loaded"):
        hub.load(folder)
    if part == "vae":
        with pytest.raises(FileNotFoundError, match="lacks safetensors weights"):
            hub.preview(folder / part)


def answered(error: type, status: int) -> Exception:
    return error(f"{status} from the hub", response=httpx.Response(status, request=httpx.Request("GET", "https://a.b")))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (answered(RemoteEntryNotFoundError, 404), FileNotFoundError, "a/clip lacks what is asked for: 404"),
        (answered(RevisionNotFoundError, 404), FileNotFoundError, "404 from the hub"),
        (answered(HfHubHTTPError, 429), ConnectionError, "429 from the hub"),
        (LocalEntryNotFoundError("see its cause"), ConnectionError, "429 from the hub"),
    ],
)
def test_what_the_hub_answered_is_said(monkeypatch, error, kind, message):
    """The hub's client wraps an answer such as 429 in a complaint on its cache."""

    def download(*_, **__):
        raise error from answered(HfHubHTTPError, 429) if type(error) is LocalEntryNotFoundError else None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(kind, match=message):
        hub.index("a/clip")


@pytest.mark.skipif(HF_HUB_DISABLE_PROGRESS_BARS is not None, reason="the environment decides on progress bars")
@pytest.mark.parametrize("shown", [(True, True, True), (False, True, True), (True, False, False), (True, True, False)])
def test_progress_bars_are_left_as_they_were(shown):
    """Those of diffusers, transformers and huggingface_hub; transformers switches the hub's with its own."""
    bars = huggingface_hub.utils

    def state():
        logs = (diffusers_logging, transformers_logging)
        return *(log.is_progress_bar_enabled() for log in logs), not bars.are_progress_bars_disabled()

    def switch(d, t, h):
        for on, log in ((d, diffusers_logging), (t, transformers_logging)):
            log.enable_progress_bar() if on else log.disable_progress_bar()
        bars.enable_progress_bars() if h else bars.disable_progress_bars()

    before = state()
    try:
        switch(*shown)
        with hub.quiet():
            assert state() == (False, False, False)
        assert state() == shown
    finally:
        switch(*before)
