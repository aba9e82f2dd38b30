"""What a picture costs: counts against closed forms, plans against hand arithmetic, both against a CPU's clock."""

import time
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_families import BUILDERS, build
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowscale_lite import RBF, BestOfN, ddim, ode, search
from flowscale_lite.flux import FlowModel, cost, hub, load
from flowscale_lite.flux.cost import GPUS, Count, Gpu, estimate
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate


# ------------------------------------------------------------------------------------------------------------- counts
def flux_flops(tokens, text, guidance):
    """The matrix products of FLUX.1 written out: twice the weights a token passes, and 4 n^2 d for each attention."""
    d, n = 3072, tokens + text
    double = 19 * (12 * d * d * n + 2 * 6 * d * d)  # qkv, out and MLP of each stream; modulation once a row
    single = 38 * (12 * d * d * n + 3 * d * d)
    into = 64 * d * tokens + 4096 * d * text + (256 + d) * d * (2 if guidance else 1) + (768 + d) * d
    out = 2 * d * d + 64 * d * tokens
    return 2 * (double + single + into + out) + 57 * 4 * n * n * d


def t5_flops(tokens):
    d, layer = 4096, 4 * 4096 * 4096 + 3 * 4096 * 10240
    return 24 * (2 * layer * tokens + 4 * tokens * tokens * d)


@pytest.fixture(scope="module")
def flux():
    pipe = hub.skeleton(cost.FLUX1)
    with torch.device("meta"):
        pipe.transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    return cost.count_pipeline(pipe, 512, 768, text_tokens=128)


@pytest.fixture(scope="module")
def square():
    return cost.count_pipeline(hub.skeleton(cost.FLUX1), 1024, 1024, text_tokens=256)


def test_counted_operations_equal_the_closed_form(flux, square):
    assert flux["velocity"].flops == flux_flops(32 * 48, 128, True)
    assert square["velocity"].flops == flux_flops(64 * 64, 256, False)
    assert flux["text"].flops == t5_flops(128)


def test_parameters_are_the_published_ones(flux):
    """12 billion (model card of FLUX.1), 4.7 of T5-XXL's 11 for its encoder; the autoencoder as diffusers has it."""
    assert flux["velocity"].parameters == pytest.approx(11.9e9, rel=0.005)
    assert flux["text"].parameters == pytest.approx(4.76e9, rel=0.005)
    assert flux["decode"].parameters == 83_819_683


def meta(*shape):
    return torch.empty(shape, device="meta")


def test_activations_are_the_most_bytes_alive_at_once():
    """By hand: at the ReLU its input and its output live, 5 x 8 floats each; weights and inputs do not count."""
    with torch.device("meta"):
        chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = meta(5, 4)
    assert cost.count_operations(chain, lambda: chain(x)) == Count(2 * 5 * (4 * 8 + 8 * 2), 58, 2 * 5 * 8 * 4)


def test_attention_counts_as_work_and_its_matrix_not_as_memory():
    class Attention(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    q = meta(1, 2, 1000, 16)
    attention = Attention()
    counted = cost.count_operations(attention, lambda: attention(q))
    assert counted.flops == 4 * 1000 * 1000 * 32
    assert counted.activations == 4 * 1000 * 32


def test_a_view_or_a_change_in_place_takes_no_memory():
    x = meta(1000)
    assert cost.count_operations(nn.Identity(), lambda: (x + 1).add_(1).view(10, 100)[0].mul_(2)).activations == 4000


def test_activations_of_a_decode_grow_with_the_area_and_weights_do_not(flux, square):
    assert square["velocity"].parameters == pytest.approx(flux["velocity"].parameters, rel=1e-3)
    assert square["decode"].parameters == flux["decode"].parameters
    pipe, taken = hub.skeleton(cost.FLUX1), []
    for side in (64, 128, 256):
        prompt = cost.blank_prompt(pipe, side, side)
        x = meta(1, *prompt.shape)
        taken.append(cost.count_operations(pipe.vae, lambda p=prompt, x=x: p.decode(x)).activations)
    assert taken[2] - taken[1] == 4 * (taken[1] - taken[0]), "what does not depend on the area is the prompt alone"


def test_what_cannot_be_counted_is_refused():
    pipe = hub.skeleton(cost.FLUX1)
    for size in ({"height": 1000}, {"width": 0}):
        with pytest.raises(ValueError, match="multiples of 16"):
            cost.count_pipeline(pipe, **{"height": 64, "width": 64} | size)
    with pytest.raises(ValueError, match="text_tokens must be at least 1"):
        cost.count_pipeline(pipe, 64, 64, text_tokens=0)
    real = build("FluxPipeline")
    with pytest.raises(ValueError, match="only models without weights are counted"):
        cost.count_pipeline(real, 64, 64)
    assert real.transformer.dtype == torch.float32, "its weights were left alone"


@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_is_counted_as_it_runs(name):
    with torch.device("meta"):
        pipe = BUILDERS[name]()
    prompt = FlowModel.encode(build(name), "three red circles", height=64, width=64, guidance=0.0, max_tokens=64)
    counts = cost.count_pipeline(pipe, 64, 64, text_tokens=len(prompt.encoded["prompt_embeds"][0]))
    x = torch.zeros(1, *prompt.shape)
    for part, run in (("velocity", lambda: prompt.velocity(x, 0.5)), ("decode", lambda: prompt.decode(x))):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
            run()
        assert counter.get_total_flops() == counts[part].flops > 0
    assert counts["text"].flops > 0


# -------------------------------------------------------------------------------------------------------------- plans
TOY = {
    "velocity": Count(3e12, 10**9, 10**9),
    "decode": Count(1e12, 10**8, 2 * 10**9),
    "text": Count(5e12, 10**9, 0),
}
CARD = Gpu("card", 100, 10, 3.6)


def test_an_estimate_by_hand():
    """At half of 100 TFLOP/s: 300 of velocity, 41 of decoding, 80 of judging, 5 of text, in TFLOP."""
    judged = TOY | {"judge": Count(2e12, 10**8, 0)}
    p = estimate(judged, CARD, 100, reward_calls=40, utilisation=0.5)
    assert dict(p.parts) == pytest.approx({"velocity": 6.0, "decode": 0.82, "judge": 1.6, "text": 0.1})
    assert p.seconds == pytest.approx(8.52) and p.dollars == pytest.approx(8.52 / 1000)
    assert p.memory == 2 * (10**9 + 10**8 + 10**9) + 2 * 10**8 + 2 * 10**9
    assert p.fits and not estimate(TOY, replace(CARD, memory=5.7), 100).fits
    assert estimate(TOY, CARD, 100, batch=4).memory == 4.2e9 + 4e9
    assert estimate(TOY, CARD, 100).parts["decode"] == pytest.approx(101e12 / 40e12)  # all judged, by default


def test_seconds_are_linear_in_nfe_and_inverse_in_speed():
    one, two = (estimate(TOY, CARD, n, reward_calls=0).seconds for n in (100, 200))
    assert two - one == pytest.approx(100 * 3e12 / 40e12)
    assert estimate(TOY, replace(CARD, tflops=200), 100).seconds == pytest.approx(estimate(TOY, CARD, 100).seconds / 2)


def test_by_default_as_much_text_is_counted_as_the_model_was_made_for(square):
    """FLUX.1-schnell reads 256 tokens, and T5 encodes as many."""
    assert cost.count_pipeline(hub.skeleton(cost.FLUX1), 1024, 1024) == square


def test_a_search_on_flux_costs_what_its_authors_say_it_does(square):
    """Under a dollar an image at 500 NFE (arXiv 2503.19385), on every GPU of the list, at the prices assumed."""
    for gpu in GPUS.values():
        assert estimate(square, gpu, 500).dollars < 1
    assert estimate(square, GPUS["H100"], 500).fits and not estimate(square, GPUS["L4"], 500).fits


def test_numbers_out_of_range_are_refused():
    for options in ({"nfe": 0}, {"reward_calls": -1}, {"batch": 0}, {"utilisation": 0.0}, {"utilisation": 1.5}):
        with pytest.raises(ValueError, match="must be at least 1"):
            estimate(TOY, CARD, **{"nfe": 10} | options)
    for options in ({"tflops": 0}, {"memory": -1}, {"dollars": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            replace(CARD, **options)


# ------------------------------------------------------------------------------------------------------------ a clock
@pytest.fixture(scope="module")
def tiny():
    folder, text = locate("tiny-flux/dev"), "three red circles and two blue squares"
    counts = cost.count_pipeline(hub.skeleton(folder), 64, 64, text_tokens=16)
    return counts, FlowModel.encode(load(folder), text, guidance=2.0)


def test_what_is_counted_without_weights_is_what_the_pipeline_does(tiny):
    counts, prompt = tiny
    assert prompt.encoded["prompt_embeds"].shape[1] == 16
    for rows in (1, 3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
            prompt(torch.zeros(rows, *prompt.shape), torch.full((rows,), 0.5))
        assert counter.get_total_flops() == rows * counts["velocity"].flops
        with FlopCounterMode(display=False) as counter:
            prompt.decode(torch.zeros(rows, *prompt.shape))
        assert counter.get_total_flops() == rows * counts["decode"].flops
    assert counts["velocity"].parameters == sum(p.numel() for p in prompt.pipe.transformer.parameters())


@pytest.mark.slow
def test_counted_operations_predict_a_cpus_seconds(tiny):
    """One machine speed, measured on best-of-N, foretells RBF and other budgets within a factor of 1.8 either way.

    They decode 15 and 100 pictures for about the same NFE, and a decode costs three evaluations here, so counts that
    left it out would be three times off. CPU time of one thread, best of two.
    """
    counts, prompt = tiny
    reward = counter.CountReward(shapes.parse("three red circles and two blue squares"))

    def seconds(method, kernel, nfe):
        problem, taken = prompt.problem(reward, kernel, steps=10), []
        for _ in range(2):
            start = time.process_time()
            result = search(problem, method, max_nfe=nfe, generator=torch.Generator().manual_seed(0))
            taken.append(time.process_time() - start)
        assert result.nfe == nfe
        return min(taken), result.reward_calls

    taken, calls = seconds(BestOfN(), ode, 150)
    idle = estimate(counts, GPUS["T4"], 150, reward_calls=calls, utilisation=1.0).seconds
    machine = Gpu("this CPU", GPUS["T4"].tflops * idle / taken, 1.0, 0.0)
    for method, kernel, nfe in ((BestOfN(), ode, 300), (RBF(), ddim(), 100)):
        taken, calls = seconds(method, kernel, nfe)
        foretold = estimate(counts, machine, nfe, reward_calls=calls, utilisation=1.0).seconds
        assert 1 / 1.8 < foretold / taken < 1.8, (method, nfe, foretold, taken)
