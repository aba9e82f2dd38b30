"""Models of real size without a GPU: sizes recounted, plans added up by hand, loading by every kind of plan that a CPU
can carry out, and what the hub may answer."""

import itertools
import math
import sys
import types
from dataclasses import replace
from importlib import metadata

import httpx
import huggingface_hub
import pytest
import torch
from conftest import seeded
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tiny_families import BUILDERS, build

from flowscale_lite import RBF, ddim, flux, look_ahead, ode, search
from flowscale_lite.beyond import Draft
from flowscale_lite.flux import FlowModel, cost, families, hub, memory
from flowscale_lite.flux.cost import GPUS
from flowscale_lite.flux.memory import plan
from flowscale_lite.tiny import counter, shapes
from flowscale_lite.tiny.data import locate
from tools.runs import memory as tool

TINY = locate("tiny-flux/dev")
TEXT = "three red circles"
GIB = 2**30
STORED = memory.stored_sizes()
GUIDED = {name: entry["guided"] for name, entry in STORED.items() if "guided" in entry}


# -------------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("name", STORED)
def test_stored_weights_are_those_of_the_configs(name):
    pipe = tool.build(name)
    texts = [part for key, part in pipe.components.items() if key.startswith("text_encoder") and part is not None]
    weights = [memory.Weights.of(*modules) for modules in ([pipe.transformer], texts, [pipe.vae])]
    stored = memory.sizes(name)
    assert weights == [stored.transformer, stored.text, stored.vae]
    family = families.family(pipe)
    above = GUIDED[name]["above"] if name in GUIDED else math.inf
    assert [family.guided(pipe, scale) for scale in (0, above, above + 0.1)] == [False, False, name in GUIDED]
    assert name not in GUIDED or family.guided(pipe, family.default(pipe, family.scale)), "what no guidance means"


def assert_counted(counted, stored, digits):
    """To the digits stored. Later Pythons than 3.11 drop some temporaries earlier, and count about 2 % less at most."""
    less = 0.0 if sys.version_info < (3, 12) else 0.025
    margin = 0.6 * 10.0**-digits
    assert (1 - less) * stored - margin <= counted <= stored + margin


@pytest.mark.apart
@pytest.mark.parametrize("name", ["Sana_1600M_1024px_diffusers", "FLUX.2-klein-4B"])
def test_stored_activations_are_counted_again(name):
    counted, stored = memory.count_sizes(tool.build(name), 1024, 1024), memory.sizes(name)
    assert_counted(counted.row, stored.row, 3)
    assert_counted(counted.decode, stored.decode, 2)
    assert_counted(counted.tile, stored.tile, 2)


@pytest.mark.apart
@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDED)
def test_stored_rows_without_guidance_are_counted_again(name):
    above = GUIDED[name]["above"]
    assert_counted(memory.count_sizes(tool.build(name), 1024, 1024, above).row, STORED[name]["row"], 3)


def test_a_row_of_schnell_reads_half_of_devs_text():
    """4096 cells with 256 tokens of text, and with 512."""
    rows = {name: memory.sizes(f"FLUX.1-{name}").row for name in ("schnell", "dev")}
    assert rows["schnell"] / rows["dev"] == pytest.approx((4096 + 256) / (4096 + 512), rel=0.01)


def test_parameters_are_the_published_ones():
    """Billions, from the model cards: transformer and text encoders."""
    published = {
        "FLUX.1-dev": (11.9, 4.9),
        "FLUX.2-klein-4B": (3.9, 4.0),
        "FLUX.2-klein-9B": (9.1, 8.2),
        "stable-diffusion-3.5-medium": (2.2, 5.6),
        "stable-diffusion-3.5-large": (8.1, 5.6),
        "Qwen-Image": (20.4, 8.3),
        "Z-Image-Turbo": (6.2, 4.0),
        "Sana_1600M_1024px_diffusers": (1.6, 2.6),
    }
    for name, (transformer, text) in published.items():
        for weights, billions in ((memory.sizes(name).transformer, transformer), (memory.sizes(name).text, text)):
            assert (weights.linear + weights.other) / 1e9 == pytest.approx(billions, abs=0.06)


def test_a_folder_is_counted_from_its_configs_as_its_models_are():
    pipe = hub.load(TINY)
    skeleton, sizes = hub.skeleton(TINY), memory.sizes(TINY, 64, 64)
    for name in ("transformer", "text_encoder_2", "vae"):
        real, bare = getattr(pipe, name), getattr(skeleton, name)
        assert all(p.is_meta for p in bare.parameters())
        assert [p.shape for p in bare.parameters()] == [p.shape for p in real.parameters()]
    assert sizes.transformer.linear + sizes.transformer.other == sum(p.numel() for p in pipe.transformer.parameters())
    assert 0 < sizes.row < 0.05 and 0 < sizes.decode < 0.05


# -------------------------------------------------------------------------------------------------------------- plans
def added_up(name, one) -> dict[str, float]:
    """The stages of a plan, from parameters and bytes alone."""
    sizes, bytes_ = memory.sizes(name), {"full": 2.0, "int8": 1.0, "fp8": 1.0, "nf4": 0.5625}

    def gib(weights, kind, size=2):
        linear = weights.linear * (size if kind == "full" else bytes_[kind])
        return (linear + size * weights.other) / GIB

    fine = 2 if one.dtype == "float16" else 1
    transformer = 0.5 if one.group_offload else gib(sizes.transformer, one.weights)
    text, vae = gib(sizes.text, one.text_weights), gib(sizes.vae, "full", 2 * fine)
    beside = text if one.text == "resident" else 0
    picture = (sizes.tile if one.tiling else sizes.decode) * fine
    return {
        "prompts": 0.5 + text + {"resident": transformer + vae, "offloaded": vae, "dropped": 0}[one.text],
        "velocities": transformer + vae + beside + one.chunk * sizes.row,
        "pictures": transformer + vae + beside + one.decode_chunk * picture,
    }


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_every_model_has_a_plan_that_fits_on_every_gpu(name, gpu):
    gib = gpu.memory
    one = plan(name, gib, dtype=gpu.dtype)
    by_hand = added_up(name, one)
    for stage, takes in one.stages.items():
        assert takes == pytest.approx(by_hand[stage], rel=0.005)
        assert takes <= gib - one.keep
    more = added_up(name, replace(one, chunk=one.chunk + 1))
    assert one.chunk == 16 or more["velocities"] > gib - one.keep - 0.05, "one more row would have fitted"
    assert all(f"{takes:.1f} GiB" in str(one) for takes in one.stages.values()) and name in str(one)


def test_what_is_chosen_for_flux():
    """Sixteen bits where they fit; text encoders leave before the transformer is quantised."""
    chosen = [plan("black-forest-labs/FLUX.1-dev", gpu.memory, dtype=gpu.dtype) for gpu in GPUS.values()]
    fields = [(p.weights, p.text, p.tiling, p.chunk) for p in chosen]
    assert fields == [
        ("int8", "dropped", True, 4),
        ("int8", "dropped", False, 16),
        ("full", "resident", False, 15),
        ("full", "resident", False, 16),
        ("full", "resident", False, 16),
    ]


@pytest.mark.parametrize(
    "gib, chosen",
    [
        (15.6, ("nf4", False, "dropped")),
        (23.5, ("nf4", False, "dropped")),
        (39.5, ("full", True, "resident")),
        (79.1, ("full", False, "resident")),
    ],
    ids=["16", "24", "40", "80"],
)
def test_a_drafting_transformer_has_its_place_on_every_card(gib, chosen):
    """FLUX.1-schnell drafts for dev. GiB that CUDA finds on cards of 16, 24, 40 and 80 GB."""
    one = plan("FLUX.1-dev", gib, draft="FLUX.1-schnell")
    assert (one.weights, one.turns, one.text) == chosen
    one = replace(one, chunk=1, decode_chunk=1)
    alone, second = replace(one, draft=None, turns=False), memory.sizes("FLUX.1-schnell").transformer
    more = second.gib(one.weights)
    for stage, takes in one.stages.items():
        beside = 0 if one.turns or (stage == "prompts" and one.text == "dropped") else more
        assert takes == pytest.approx(alone.stages[stage] + beside), stage
    both = alone.parts["transformer"] + more
    assert one.host == pytest.approx(both if one.turns else 0) and 0.99 < more / alone.parts["transformer"] < 1
    assert "drafting" in str(one) and "drafting" not in str(alone) and ("taking turns" in str(one)) == one.turns


def test_two_transformers_that_take_turns_need_host_memory_and_a_draft():
    little = plan("FLUX.1-dev", 39.5, draft="FLUX.1-schnell", host=40)
    assert not little.turns and little.weights == "int8", "of which both are on the card"
    with pytest.raises(ValueError, match="exclude one another"):
        plan("FLUX.1-dev", 39.5, turns=True)


def test_a_plan_gets_no_worse_with_more_memory_and_less_keeps_it_within():
    order = memory.CHOICES["weights"]
    for name in ("FLUX.1-dev", "Qwen-Image", "FLUX.2-klein-9B"):
        before = None
        for free in (6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80):
            try:
                one = plan(name, free)
            except ValueError:
                assert before is None
                continue
            assert one.peak <= free - 1
            rank = (one.group_offload, order.index(one.weights), one.tiling, memory.CHOICES["text"].index(one.text))
            assert before is None or rank <= before
            before = rank
        assert before == (False, 0, False, 0)


def test_what_waits_in_host_memory_must_fit_there():
    wide = plan("FLUX.1-dev", 26.0)
    assert (wide.weights, wide.text) == ("full", "offloaded") and wide.host == pytest.approx(22.2 + 9.1, abs=0.1)
    assert plan("FLUX.1-dev", 26.0, host=12.0).text == "dropped"
    tight = plan("FLUX.1-dev", 6.5)
    assert tight.group_offload and tight.text_weights == "nf4" and tight.host == pytest.approx(22.2, abs=0.1)
    with pytest.raises(ValueError, match=r"does not fit into 6\.5 GiB with 1\.0 kept free and 8\.0 of host memory"):
        plan("FLUX.1-dev", 6.5, host=8.0)


def test_size_and_judges_and_guidance_count():
    small, large = (plan("FLUX.1-dev", 79.1, width=w, height=w, rows=1000) for w in (512, 1024))
    assert small.parts["a row"] == pytest.approx(large.parts["a row"] / 4) and small.chunk > large.chunk
    assert plan("FLUX.1-dev", 40.0, keep=8.0).text != "resident" and plan("FLUX.1-dev", 40.0).text == "resident"
    once, twice = (memory.sizes(TINY, 64, 64, guidance=g).row for g in (1.0, 3.0))
    assert once == twice, "FLUX's guidance is distilled"
    with torch.device("meta"):
        guided = BUILDERS["StableDiffusion3Pipeline"]()
    assert memory.count_sizes(guided, 64, 64, 4.0).row == pytest.approx(
        2 * memory.count_sizes(guided, 64, 64, 1.0).row, rel=0.2
    )


def test_guidance_counts_for_stored_models_too():
    """By default a pipeline's call is guided wherever it may be; a plan for that is not one for a single forward."""
    rows = {scale: memory.sizes("stable-diffusion-3.5-large", guidance=scale).row for scale in (None, 1.0, 7.0)}
    assert rows[7.0] == rows[None] == GUIDED["stable-diffusion-3.5-large"]["row"] and rows[1.0] < 0.5 * rows[7.0]
    once, twice = (plan("Z-Image-Turbo", 22.0, guidance=scale) for scale in (0.0, None))
    assert (
        once.parts["a row"] == STORED["Z-Image-Turbo"]["row"] < 0.51 * twice.parts["a row"] and once.chunk > twice.chunk
    )
    assert memory.sizes("FLUX.1-dev", guidance=1.0) == memory.sizes("FLUX.1-dev", guidance=7.0)


def test_a_guided_z_image_is_counted(monkeypatch):
    """As two rows; to a few copies what its own call takes, told not to read its clock, which it cannot do there."""
    with torch.device("meta"):
        pipe = BUILDERS["ZImagePipeline"]()
    once, twice = (memory.count_sizes(pipe, 64, 64, scale).row for scale in (0.0, 5.0))
    family = families.FAMILIES["ZImagePipeline"]
    told = replace(family, options={"cfg_truncation": None})
    monkeypatch.setitem(families.FAMILIES, "ZImagePipeline", told)
    encoded = family.blank(pipe.transformer.config, 512)
    encoded |= {f"negative_{name}": value for name, value in encoded.items()}
    prompt = FlowModel(pipe, encoded, 64, 64, 5.0, chunk=1)
    x = torch.empty(1, *prompt.shape, device="meta")
    own = cost.count_operations(pipe.transformer, lambda: prompt.velocity(x, 0.5)).activations / GIB
    assert twice == pytest.approx(own, rel=0.02) and twice > 1.7 * once


def test_plans_can_be_overridden_and_nonsense_is_refused():
    one = plan("FLUX.1-dev", 79.1, weights="nf4", text="dropped", text_weights="nf4", chunk=3, tiling=True)
    assert (one.weights, one.text, one.text_weights, one.chunk, one.tiling) == ("nf4", "dropped", "nf4", 3, True)
    assert plan("FLUX.1-dev", 22.0, weights="fp8").weights == "fp8"
    assert plan("FLUX.1-dev", 79.1, group_offload=True).group_offload
    with pytest.raises(ValueError, match="does not fit"):
        plan("FLUX.1-dev", 22.0, weights="full", group_offload=False)
    with pytest.raises(ValueError, match="does not fit"):
        plan("FLUX.1-dev", 22.0, chunk=64)
    for bad, message in (
        ({"weights": "int3"}, "weights is one of"),
        ({"text": "gone"}, "text is one of"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1; got 0"),
        ({"chunk": 2.5}, "chunk must be a whole number of at least 1; got 2.5"),
        ({"decode_chunk": "a"}, "decode_chunk must be a whole number of at least 1; got 'a'"),
        ({"tiling": "yes"}, "tiling is one of"),
        ({"dtype": "float64"}, "dtype is one of"),
        ({"rows": 0}, "rows must be a whole number of at least 1"),
        ({"rows": 1.5}, "rows must be a whole number of at least 1"),
        ({"text": "offloaded", "weights": "int8"}, "exclude one another"),
        ({"text": "offloaded", "text_weights": "nf4"}, "exclude one another"),
        ({"text": "offloaded", "group_offload": True}, "exclude one another"),
        ({"weights": "int8", "group_offload": True}, "exclude one another"),
    ):
        with pytest.raises(ValueError, match=message):
            plan("FLUX.1-dev", 79.1, **bad)
    with pytest.raises(TypeError, match="colour"):
        plan("FLUX.1-dev", 79.1, colour="red")


@pytest.mark.parametrize("tiling", [False, True])
def test_a_plan_that_just_fits_has_a_row_and_a_picture_at_a_time(tiling):
    """Where what is left is one row or picture exactly, rounding may say that none fits."""
    for name, weights in itertools.product(STORED, ("full", "int8", "nf4")):
        fixed = {"weights": weights, "text": "resident", "text_weights": "full", "tiling": tiling}
        least = plan(name, 100.0, rows=1, **fixed, group_offload=False)
        for keep in (0.0, 0.3, 1.0):
            try:
                one = plan(name, least.peak + keep, keep=keep, **fixed, group_offload=False)
            except ValueError:  # the sum was rounded down
                continue
            assert min(one.chunk, one.decode_chunk) >= 1, (name, weights, keep)


# ------------------------------------------------------------------------------------------------------------- loading
def tiny_plan(**fields):
    return plan(TINY, 4.0, height=64, width=64, **{"dtype": "float32", **fields})


def found(pipe, chunk):
    """A short search by counting, and its picture."""
    prompt = FlowModel.encode(pipe, TEXT, guidance=2.0, chunk=chunk)
    problem = prompt.problem(counter.CountReward(shapes.parse(TEXT)), ddim(), 3)
    result = search(problem, RBF(init=2, batch=2), max_nfe=8, generator=seeded())
    return prompt, prompt.decode(result.best[None])


@pytest.fixture(scope="module")
def usual():
    return found(hub.load(TINY), 2)


def bytes_of(module) -> int:
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        total += sum(getattr(tensor, name).nbytes for name in inner) if inner else tensor.nbytes
    return total


@pytest.mark.parametrize(
    "fields",
    [{}, {"text": "dropped"}, {"text": "offloaded"}, {"group_offload": True, "text": "resident"}],
    ids=["resident", "dropped", "offloaded", "streamed"],
)
def test_each_place_for_the_models_gives_the_same_picture(usual, fields):
    one = tiny_plan(**fields, chunk=2)
    pipe = memory.load_planned(TINY, one, "cpu", prompts=[TEXT])
    prompt, picture = found(pipe, one.chunk)
    torch.testing.assert_close(picture, usual[1], atol=1e-4, rtol=0)
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    assert all((part is None) == (one.text == "dropped") for part in encoders)
    if one.text == "dropped":
        with pytest.raises(ValueError, match="loaded without text encoders"):
            FlowModel.encode(pipe, "a blue square")
    else:
        other = FlowModel.encode(pipe, "a blue square")
        torch.testing.assert_close(other.encoded, FlowModel.encode(usual[0].pipe, "a blue square").encoded)
    if one.text == "offloaded":
        assert len(pipe._all_hooks) == 3 and not hasattr(pipe.vae, "_hf_hook"), "all but the autoencoder change places"
    assert type(pipe.transformer.dtype) is torch.dtype and prompt.device.type == "cpu"


DRAFT = locate("tiny-flux/schnell")


def drafted(pipes):
    """Velocities of both models, and the picture of a search with the one and by the other."""
    one, other = (FlowModel.encode(pipe, TEXT, guidance=2.0, chunk=2) for pipe in pipes)
    x, t = torch.randn(2, *one.shape, generator=seeded()), torch.full((2,), 0.8)
    velocities = torch.stack([other(x, t), one(x, t), other(x, t)])  # there and back
    problem = one.problem(counter.CountReward(shapes.parse(TEXT)), ode, 3)
    problem = replace(problem, look_ahead=look_ahead.sibling(other))
    return velocities, one.decode(search(problem, Draft(init=2), max_nfe=10, generator=seeded()).best[None])


@pytest.mark.parametrize(
    "fields",
    [{"text": "resident"}, {"text": "dropped"}, {"turns": True}, {"turns": True, "text": "dropped"},
     {"group_offload": True}],
    ids=["resident", "dropped", "turns", "turns, dropped", "streamed"],
)  # fmt: skip
def test_a_drafting_pair_draws_as_two_pipelines_do(fields):
    one = tiny_plan(draft=DRAFT, **fields)
    pipe, second = memory.load_planned(TINY, one, "cpu", draft=DRAFT, prompts=[TEXT])
    for name, part in pipe.components.items():
        assert (part is getattr(second, name)) == (name not in ("transformer", "scheduler") or part is None), name
    assert one.turns == hasattr(pipe.transformer, "_hf_hook") or one.group_offload
    for found, expected in zip(drafted((pipe, second)), drafted([hub.load(TINY), hub.load(DRAFT)]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_each_of_a_pair_reads_as_much_text_as_it_was_made_for(monkeypatch):
    """Also where the encoders are dropped, and with them the tokenizers: dev 512 tokens, schnell 256."""
    one, limits = tiny_plan(draft=DRAFT, text="dropped"), []
    monkeypatch.setattr(
        families.Family, "tokens", lambda self, pipe, config=None: limits.append(self.most(config)) or 16
    )
    memory.load_planned(TINY, one, "cpu", draft=DRAFT, prompts=[TEXT])
    assert limits == [512, 256]


def test_a_draft_must_be_in_plan_and_call():
    for one, draft in ((tiny_plan(), DRAFT), (tiny_plan(draft=DRAFT), None)):
        with pytest.raises(ValueError, match="a draft must be given to `plan`"):
            memory.load_planned(TINY, one, "cpu", draft=draft)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_by_plan(usual, dtype):
    """float16 keeps the autoencoder in float32, and its text encoders in bfloat16."""
    one = tiny_plan(dtype=dtype, text="dropped", chunk=2)
    pipe = memory.load_planned(TINY, one, "cpu", prompts=[TEXT])
    assert pipe.transformer.dtype == getattr(torch, dtype)
    assert pipe.vae.dtype == (torch.float32 if dtype == "float16" else torch.bfloat16)
    prompt, picture = found(pipe, one.chunk)
    assert prompt.encoded["prompt_embeds"].dtype == getattr(torch, dtype) and picture.isfinite().all()
    assert bytes_of(pipe.transformer) == pytest.approx(one.parts["transformer"] * GIB, rel=1e-3)
    x, t = torch.randn(2, *prompt.shape, generator=seeded()), torch.full((2,), 0.8)
    torch.testing.assert_close(prompt(x, t), usual[0](x, t), atol=0.15, rtol=0.05)


@pytest.mark.apart
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_by_torchao(usual, kind):
    pytest.importorskip("torchao")
    one = tiny_plan(dtype="bfloat16", weights=kind, chunk=2)
    pipe = memory.load_planned(TINY, one, "cpu", prompts=[TEXT])
    prompt, picture = found(pipe, one.chunk)
    assert bytes_of(pipe.transformer) == pytest.approx(one.parts["transformer"] * GIB, rel=0.01)
    assert bytes_of(pipe.transformer) < 0.55 * bytes_of(hub.load(TINY, dtype=torch.bfloat16).transformer)
    x, t = torch.randn(2, *prompt.shape, generator=seeded()), torch.full((2,), 0.8)
    v, expected = prompt(x, t), usual[0](x, t)
    assert (v - expected).norm() < 0.1 * expected.norm() and picture.isfinite().all()


@pytest.mark.parametrize("dtype", memory.CHOICES["dtype"])
def test_four_bits_are_computed_with_as_sixteen_are(monkeypatch, dtype):
    """Text encoders never in float16, whose range T5 and Qwen exceed."""
    version = metadata.version
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name)  # as if bitsandbytes were there
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "bitsandbytes" else version(name))
    fetch, quantised = hub.fetch, {}

    def unquantised(model, dtypes, absent, configs):
        quantised.update(configs)
        return fetch(model, absent=absent)

    monkeypatch.setattr(hub, "fetch", unquantised)
    one = tiny_plan(dtype=dtype, weights="nf4", text="dropped", text_weights="nf4")
    memory.load_planned(TINY, one, "cpu", prompts=[TEXT])
    computes = {name: config.bnb_4bit_compute_dtype for name, config in quantised.items()}
    assert computes.pop("transformer") == getattr(torch, dtype)
    text = torch.float32 if dtype == "float32" else torch.bfloat16
    assert computes == dict.fromkeys(("text_encoder", "text_encoder_2"), text)


def test_tiles_have_half_the_side(monkeypatch):
    pipe, one = build("StableDiffusion3Pipeline"), tiny_plan(tiling=True)
    monkeypatch.setattr(hub, "index", lambda model: {})
    monkeypatch.setattr(hub, "fetch", lambda *_: pipe)
    prompt = FlowModel.encode(pipe, TEXT, height=64, width=64, max_tokens=16)
    x = torch.randn(1, *prompt.shape, generator=seeded())
    whole, sizes = prompt.decode(x), []
    memory.load_planned("built above", one, "cpu")
    pipe.vae.decoder.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-1]))
    tiled = prompt.decode(x)
    assert tiled.shape == whole.shape and len(sizes) > 1 and max(sizes) == 32 and tiled.isfinite().all()


def test_loading_refuses_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="give `prompts`"):
        memory.load_planned(TINY, tiny_plan(text="dropped"), "cpu")
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    for kind, library in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(ValueError, match=f"pip install {library}"):
            memory.load_planned(TINY, tiny_plan(weights=kind), "cpu", prompts=[TEXT])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA GPU"):
            memory.load_planned(TINY, tiny_plan())


def test_free_memory_and_precision_of_a_cpu():
    assert 0.1 < memory.free_gib("cpu") < 10_000 and memory.best_dtype("cpu") == "float32"


# ----------------------------------------------------------------------------------------------------------- the hub
def answer(error, status=403):
    def download(*args, **kwargs):
        if error in (GatedRepoError, RepositoryNotFoundError):
            raise error("no", response=httpx.Response(status, request=httpx.Request("GET", "https://example.org")))
        raise error("no")

    return download


@pytest.fixture
def no_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (GatedRepoError, PermissionError, "accept its licence: log in at https://huggingface.co/a/flux"),
        (RepositoryNotFoundError, FileNotFoundError, "the hub has no model a/flux"),
        (LocalEntryNotFoundError, ConnectionError, "cannot be reached"),
        (ConnectionError, ConnectionError, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_said_in_plain_words(monkeypatch, no_token, error, kind, message):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer(error))
    for call in (hub.load, hub.skeleton, lambda name: plan(name, 40.0)):
        with pytest.raises(kind, match=message) as told:
            call("a/flux")
    if error is GatedRepoError:
        assert "No token was found" in str(told.value) and "never put it in a cell" in str(told.value)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with pytest.raises(PermissionError) as told:
            hub.load("a/flux")
        assert "No token" not in str(told.value) and "hf_secret" not in str(told.value)


def test_the_token_comes_from_the_environment_then_from_colab(monkeypatch, no_token):
    assert hub.token() is None
    secrets = types.ModuleType("google.colab.userdata")
    secrets.get = lambda name: {"HF_TOKEN": "from colab"}[name]
    colab = types.ModuleType("google.colab")
    colab.userdata = secrets
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert hub.token() == "from colab"
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    assert hub.token() == "from the environment"
    monkeypatch.delenv("HF_TOKEN")
    secrets.get = lambda name: {}[name]  # the secret is missing: Colab raises
    assert hub.token() is None


def test_a_preview_is_a_small_autoencoder(usual):
    vae = hub.preview(TINY / "vae")
    prompt = FlowModel.encode(usual[0].pipe, TEXT, preview=vae)
    x = torch.randn(1, *prompt.shape, generator=seeded())
    torch.testing.assert_close(prompt.decode(x, preview=True), prompt.decode(x), atol=1e-5, rtol=0)


def test_unsupported_pipelines_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not supported"):
        hub.load(tmp_path)
    assert flux.load is hub.load
