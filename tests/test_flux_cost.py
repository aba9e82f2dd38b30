"""What a picture costs: counts against closed forms, plans against hand arithmetic, both against a CPU's clock."""

import math
import time
from dataclasses import replace

import pytest
import torch
from tiny_families import build
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowscale_lite import RBF, BestOfN, ddim, ode, search
from flowscale_lite.flux import FlowModel, cost, load
from flowscale_lite.flux.cost import GPUS, Count, Gpu, Model, fleet, plan
from flowscale_lite.tiny import shapes
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
    return cost.flux1(512, 768, text_tokens=128, guidance=True)


@pytest.fixture(scope="module")
def square():
    return cost.flux1(1024, 1024, text_tokens=256)


def test_counted_operations_equal_the_closed_form(flux, square):
    assert flux.velocity.flops == flux_flops(32 * 48, 128, True)
    assert square.velocity.flops == flux_flops(64 * 64, 256, False)
    assert flux.text.flops == t5_flops(128)


def test_parameters_are_the_published_ones(flux):
    """12 billion (model card of FLUX.1), 4.7 of T5-XXL's 11 for its encoder; the autoencoder as diffusers has it."""
    assert flux.velocity.parameters == pytest.approx(11.9e9, rel=0.005)
    assert flux.text.parameters == pytest.approx(4.76e9, rel=0.005)
    assert flux.decode.parameters == 83_819_683
    assert flux.weights == 2 * (flux.velocity.parameters + flux.text.parameters + flux.decode.parameters)


def meta(*shape):
    return torch.empty(shape, device="meta")


def test_activations_are_the_most_bytes_alive_at_once():
    """By hand: at the ReLU its input and its output live, 5 x 8 floats each; weights and inputs do not count."""
    with torch.device("meta"):
        chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = meta(5, 4)
    assert cost.count(chain, lambda m: m(x)) == Count(2 * 5 * (4 * 8 + 8 * 2), 58, 2 * 5 * 8 * 4)


def test_attention_counts_as_work_and_its_matrix_not_as_memory():
    class Attention(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    q = meta(1, 2, 1000, 16)
    counted = cost.count(Attention(), lambda m: m(q))
    assert counted.flops == 4 * 1000 * 1000 * 32
    assert counted.activations == 4 * 1000 * 32


def test_activations_grow_with_the_picture_and_weights_do_not(flux, square):
    assert square.velocity.parameters == pytest.approx(flux.velocity.parameters, rel=1e-3)
    assert square.decode.parameters == flux.decode.parameters
    assert square.decode.activations * 512 * 768 == flux.decode.activations * 1024**2


def test_sizes_out_of_range_are_refused():
    for size in ({"height": 1000}, {"width": 0}, {"text_tokens": 0}):
        with pytest.raises(ValueError, match="multiples of 16 and text_tokens positive"):
            cost.flux1(**{"height": 64, "width": 64} | size)


# -------------------------------------------------------------------------------------------------------------- plans
TOY = Model("toy", Count(3e12, 10**9, 10**9), Count(1e12, 10**8, 2 * 10**9), Count(5e12, 10**9, 0))
CARD = Gpu("card", 100, 10, 3.6)


def test_a_plan_by_hand():
    """At half of 100 TFLOP/s: 300 of velocity, 41 of decoding, 80 of judging, 5 of text, in TFLOP."""
    p = plan(TOY, CARD, 100, reward_calls=40, judge=Count(2e12, 10**8, 0), utilisation=0.5)
    assert dict(p.parts) == pytest.approx({"velocity": 6.0, "decode": 0.82, "judge": 1.6, "text": 0.1})
    assert p.seconds == pytest.approx(8.52) and p.dollars == pytest.approx(8.52 / 1000)
    assert p.memory == 2 * (10**9 + 10**8 + 10**9) + 2 * 10**8 + 2 * 10**9
    assert p.fits and not plan(TOY, replace(CARD, memory=5.7), 100).fits
    assert plan(TOY, CARD, 100, batch=4).memory == 4.2e9 + 4e9
    assert plan(TOY, CARD, 100).parts["decode"] == pytest.approx(101e12 / 40e12)  # every candidate judged, by default


def test_seconds_are_linear_in_nfe_and_inverse_in_speed():
    one, two = (plan(TOY, CARD, n, reward_calls=0).seconds for n in (100, 200))
    assert two - one == pytest.approx(100 * 3e12 / 40e12)
    assert plan(TOY, replace(CARD, tflops=200), 100).seconds == pytest.approx(plan(TOY, CARD, 100).seconds / 2)


def test_a_fleet_by_hand():
    """Ten pictures of 20 s on four GPUs: three rounds; 5 s of loading each; 260 s paid for, 200 of them worked."""
    one = plan(TOY, CARD, 265, reward_calls=0, utilisation=0.401)
    one = replace(one, seconds=20.0, dollars=0.02)
    f = fleet(one, 10, 4, startup=5)
    assert (f.seconds, f.dollars, f.efficiency) == pytest.approx((65, 0.26, 200 / 260))
    alone = fleet(one, 10, 1)
    assert (alone.seconds, alone.dollars, alone.efficiency) == pytest.approx((200, 0.2, 1))


def test_a_search_on_flux_costs_what_its_authors_say_it_does(square):
    """Under a dollar an image at 500 NFE (arXiv 2503.19385), on every GPU of the list, at the prices assumed."""
    for gpu in GPUS.values():
        assert plan(square, gpu, 500).dollars < 1
    assert plan(square, GPUS["H100"], 500).fits and not plan(square, GPUS["L4"], 500).fits


def test_numbers_out_of_range_are_refused():
    for options in ({"nfe": 0}, {"reward_calls": -1}, {"batch": 0}, {"utilisation": 0.0}, {"utilisation": 1.5}):
        with pytest.raises(ValueError, match="must be at least 1"):
            plan(TOY, CARD, **{"nfe": 10} | options)
    for options in ({"pictures": 0}, {"gpus": 0}, {"startup": -1.0}):
        with pytest.raises(ValueError, match="startup not negative"):
            fleet(plan(TOY, CARD, 10), **{"pictures": 1, "gpus": 1} | options)
    for options in ({"tflops": 0}, {"memory": -1}, {"dollars": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            replace(CARD, **options)
    assert cost.measured(TOY, 10, 3.6, name="here") == Gpu("here", 10.0, math.inf, 0.0)  # 36 TFLOP
    with pytest.raises(ValueError, match="seconds must be positive"):
        cost.measured(TOY, 10, 0.0)


# ------------------------------------------------------------------------------------------------------------ a clock
@pytest.fixture(scope="module")
def tiny():
    pipe = load(locate("tiny-flux/dev"))
    text = "three red circles and two blue squares"
    return cost.of_pipeline(pipe, 64, 64, text_tokens=16), FlowModel.encode(pipe, text, guidance=2.0)


def test_a_pipeline_is_counted_on_copies_without_weights(tiny):
    model, prompt = tiny
    assert prompt.embeds.shape[1] == 16
    for rows in (1, 3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
            prompt(torch.zeros(rows, *prompt.shape), torch.full((rows,), 0.5))
        assert counter.get_total_flops() == rows * model.velocity.flops
        with FlopCounterMode(display=False) as counter:
            prompt.decode(torch.zeros(rows, *prompt.shape))
        assert counter.get_total_flops() == rows * model.decode.flops
    assert all(p.device.type == "cpu" for p in prompt.pipe.transformer.parameters())
    assert model.velocity.parameters == sum(p.numel() for p in prompt.pipe.transformer.parameters())


def test_only_flux_with_its_text_encoders_is_counted():
    flux = build("FluxPipeline")
    flux.text_encoder_2 = None  # as a plan that drops text encoders leaves it
    for pipe in (flux, build("SanaPipeline")):
        with pytest.raises(ValueError, match="need a FluxPipeline with its text encoders"):
            cost.of_pipeline(pipe, 64, 64, text_tokens=16)


@pytest.mark.slow
def test_counted_operations_predict_a_cpus_seconds(tiny):
    """One machine speed, measured on best-of-N, foretells RBF and other budgets within a factor of 1.8 either way.

    They decode 15 and 100 pictures for about the same NFE, and a decode costs three evaluations here, so counts that
    left it out would be three times off. CPU time of one thread, best of two.
    """
    model, prompt = tiny
    reward = shapes.CountReward(shapes.parse("three red circles and two blue squares"))

    def seconds(method, kernel, nfe):
        problem, taken = prompt.problem(reward, kernel, steps=10), []
        for _ in range(2):
            start = time.process_time()
            result = search(problem, method, max_nfe=nfe, generator=torch.Generator().manual_seed(0))
            taken.append(time.process_time() - start)
        assert result.nfe == nfe
        return min(taken), result.reward_calls

    taken, calls = seconds(BestOfN(), ode, 150)
    machine = cost.measured(model, 150, taken, reward_calls=calls)
    for method, kernel, nfe in ((BestOfN(), ode, 300), (RBF(accept="best"), ddim(), 100)):
        taken, calls = seconds(method, kernel, nfe)
        foretold = plan(model, machine, nfe, reward_calls=calls, utilisation=1.0).seconds
        assert 1 / 1.8 < foretold / taken < 1.8, (method, nfe, foretold, taken)
