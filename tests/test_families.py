"""Every supported pipeline class, as a tiny random pipeline of its own: the pictures of its own call, reproducible by
seed, with an exact account."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from conftest import seeded
from diffusers import AutoencoderTiny, AutoPipelineForImage2Image, DPMSolverMultistepScheduler
from tiny_families import BUILDERS, build

from flowscale_lite import RBF, BestOfN, Run, ddim, ode, search
from flowscale_lite.flux import FlowModel, FlowSDEScheduler, families, hub
from flowscale_lite.flux.model import IMAGE_TO_IMAGE, exact_time
from flowscale_lite.tiny.data import locate

TEXT = "two red circles"
# Arguments under which each pipeline draws 64 x 64 pictures; guidance 2 runs the model twice in all but the first.
CALLS = {name: {"height": 64, "width": 64, "guidance_scale": 2.0, "max_sequence_length": 48} for name in BUILDERS}
CALLS["QwenImagePipeline"] = {"height": 64, "width": 64, "true_cfg_scale": 2.0, "negative_prompt": "a blur"}
CALLS["QwenImagePipeline"]["max_sequence_length"] = 48
CALLS["StableDiffusion3Pipeline"]["negative_prompt"] = CALLS["ZImagePipeline"]["negative_prompt"] = "a blur"
CALLS["SanaPipeline"] |= {"use_resolution_binning": False, "negative_prompt": "a blur"}
TWICE = {name: int("Flux" not in name) or int(name == "Flux2KleinPipeline") for name in BUILDERS}


@pytest.fixture(scope="module", params=BUILDERS)
def named(request):
    return request.param, build(request.param)


def encoded(pipe, name: str, guidance: float = 2.0, **more) -> FlowModel:
    negative = CALLS[name].get("negative_prompt", "")
    return FlowModel.encode(
        pipe, TEXT, height=64, width=64, guidance=guidance, negative=negative, max_tokens=48, **more
    )


def theirs(pipe, name: str, number: int = 3, **more) -> torch.Tensor:
    arguments = {**CALLS[name], "output_type": "pt", "generator": seeded(), **more}
    return pipe(prompt=TEXT, num_images_per_prompt=number, **arguments).images


def reward(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.mean((1, 2, 3))


def test_ode_equals_the_pipelines_own_call(named):
    """Same generator, the pipeline's own grid, packing, clock, sign, guidance and decoder: equal pictures to 1e-4."""
    name, pipe = named
    prompt = encoded(pipe, name, chunk=2)
    result = search(prompt.problem(reward, ode, 4), BestOfN(3), max_nfe=12 * prompt.cost, generator=seeded())
    ours = prompt.decode(result.particles.x)
    expected = theirs(pipe, name, num_inference_steps=4)
    assert ours.shape == (3, 3, 64, 64) and expected.std() > 0.01
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert result.nfe == 12 * prompt.cost


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (5, 0.8), (4, 1.0)])
def test_image_to_image_equals_diffusers(named, steps, strength):
    """From latents drawn by the class's own VAE, noised to where the strength begins: equal pictures to 1e-4."""
    name, pipe = named
    prompt, picture = encoded(pipe, name), torch.rand(1, 3, 64, 64, generator=seeded(1))
    if type(pipe).__name__ not in IMAGE_TO_IMAGE:
        with pytest.raises(ValueError, match=f"the start with {type(pipe).__name__}, only with FluxPipeline"):
            prompt.latents(picture)
        return
    changed = copy.copy(pipe.scheduler)
    whole = AutoPipelineForImage2Image.from_pipe(pipe)
    expected = whole(
        prompt=TEXT, image=picture, num_inference_steps=steps, strength=strength,
        **CALLS[name], output_type="pt", generator=seeded(),
    ).images  # fmt: skip
    pipe.scheduler, generator = changed, seeded()
    times = prompt.times(steps)[steps - round(steps * strength) :]
    x0 = prompt.latents(picture, generator)
    run = Run(prompt.problem(reward, ode, times=times), max_nfe=steps * prompt.cost, generator=generator)
    p = run.start(1, (1 - times[0]) * x0 + times[0] * torch.randn(x0.shape, generator=generator))
    while p.t > 0:
        p = run.propose(p)
    torch.testing.assert_close(prompt.decode(p.x), expected, atol=1e-4, rtol=0)


def test_a_saved_pipeline_is_loaded_with_all_its_parts(named, tmp_path):
    name, pipe = named
    pipe.save_pretrained(tmp_path)
    loaded = hub.load(tmp_path)
    assert type(loaded) is type(pipe) and not any(p.requires_grad for p in loaded.transformer.parameters())
    pictures, expected = (theirs(one, name, 1, num_inference_steps=2) for one in (loaded, pipe))
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


def test_a_model_that_runs_without_guidance_is_taken_to_need_few_steps(named):
    """But FLUX.1-dev, whose guidance is distilled, says itself that it needs many."""
    name, pipe = named
    assert encoded(pipe, name).multi_step == (name != "Flux2KleinPipeline, distilled")
    assert encoded(pipe, name, guidance=0.0).multi_step == (name == "FluxPipeline")


def test_the_velocity_is_that_of_the_linear_path(named):
    """A transformer that predicts, in its own convention, eps - x0 for one x0 must give an ODE that ends at that x0."""
    name, pipe = named
    prompt = encoded(pipe, name)
    x0 = torch.randn(prompt.shape, generator=seeded(8))
    family, own = families.family(pipe), pipe.transformer.forward
    states = []

    def oracle(*args, **kwargs):
        """eps - x0 = (x - x0)/t, packed and signed as this class wants it."""
        del args, kwargs
        rows = (
            (len(states[-1][0]) * prompt.cost)
            if name not in ("FluxPipeline", "QwenImagePipeline")
            else len(states[-1][0])
        )
        rows = rows if "Klein" not in name else len(states[-1][0])
        x, t = states[-1]
        v = ((x - x0) / t).repeat(rows // len(x), 1, 1, 1)
        if name == "ZImagePipeline":
            return ([-row.unsqueeze(1) for row in v],)
        if family.unpack is not None:
            v = family.pack(pipe, v) if family.pack else v.flatten(2).transpose(1, 2)
        return (v,)

    pipe.transformer.forward = oracle
    try:
        for t in (1.0, 0.4):
            x = torch.randn(2, *prompt.shape, generator=seeded(9))
            states.append((x, t))
            torch.testing.assert_close(prompt(x, torch.full((2,), t)), (x - x0) / t, atol=1e-4, rtol=1e-4)
    finally:
        pipe.transformer.forward = own


def test_guidance_that_runs_the_model_twice_costs_twice_and_the_account_is_exact(named):
    name, pipe = named
    prompt = encoded(pipe, name, chunk=3)
    assert prompt.cost == 1 + TWICE[name]
    rows = []

    def count(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        rows.append(len(x))

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    method = RBF(init=3, batch=3)
    result = search(prompt.problem(reward, ddim(), 4), method, max_nfe=41, generator=seeded())
    hook.remove()
    assert sum(rows) == result.nfe <= 41 and result.nfe + result.left == 41
    assert math.isfinite(result.reward) and result.left < prompt.cost


def test_without_guidance_every_model_runs_once(named):
    name, pipe = named
    prompt = encoded(pipe, name, guidance=0.0)
    assert prompt.cost == 1
    x = torch.randn(2, *prompt.shape, generator=seeded())
    assert prompt(x, torch.full((2,), 0.5)).isfinite().all()


def test_rbf_is_reproducible_by_seed_whatever_the_chunks(named):
    name, pipe = named
    results = []
    for chunk, seed in ((16, 0), (16, 0), (1, 0), (16, 1)):
        problem = encoded(pipe, name, chunk=chunk).problem(reward, ddim(), 2)
        results.append(search(problem, RBF(init=2, batch=2), max_nfe=10, generator=seeded(seed)))
    first, again, chunked, other = results
    assert torch.equal(first.best, again.best) and first.trace == again.trace
    torch.testing.assert_close(chunked.best, first.best, atol=1e-3, rtol=1e-3)
    assert not torch.equal(other.best, first.best)


def test_the_sde_scheduler_is_reproducible_by_seed_in_the_pipelines_own_call(named):
    name, pipe = named
    own = pipe.scheduler
    try:
        for kind in ({"kernel": "ddim"}, {"kernel": "sde", "interpolant": "vp"}):
            pipe.scheduler = FlowSDEScheduler.from_config(own.config, **kind)
            first = theirs(pipe, name, 2, num_inference_steps=3)
            other = theirs(pipe, name, 2, num_inference_steps=3)
            pipe.scheduler.manual_seed(0)
            assert torch.equal(theirs(pipe, name, 2, num_inference_steps=3), first) and first.isfinite().all()
            if name == "SanaPipeline":  # the only one that hands its generator on to the scheduler
                other = theirs(pipe, name, 2, num_inference_steps=3, generator=seeded(1))
            assert (first - other).abs().max() > 1e-3
    finally:
        pipe.scheduler = own


def test_rows_may_have_times_of_their_own(named):
    name, pipe = named
    prompt = encoded(pipe, name)
    x = torch.randn(4, *prompt.shape, generator=seeded())
    t = torch.tensor([0.3, 0.9, 0.3, 0.6])
    alone = torch.cat([prompt(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(prompt(x, t), alone, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_velocity_and_decoder(named):
    name, pipe = named
    prompt = encoded(pipe, name)
    x = torch.randn(1, *prompt.shape, generator=seeded()).requires_grad_()
    t = torch.full((1,), 0.6)
    (grad,) = torch.autograd.grad(reward(prompt.decode(x - 0.6 * prompt(x, t))).sum(), x)
    assert grad.isfinite().all() and grad.abs().max() > 0
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        up, down = (reward(prompt.decode(y - 0.6 * prompt(y, t))) for y in (x + step, x - step))
    torch.testing.assert_close((up - down) / 2e-2, grad.norm().view(1), rtol=0.05, atol=1e-6)


def test_half_precision_works_end_to_end(named):
    """States in float32, near those of the float32 model; pictures are finite."""
    name, full = named
    pipe = copy.deepcopy(full).to(torch.float16 if name == "FluxPipeline" else torch.bfloat16)
    prompt, precise = encoded(pipe, name), encoded(full, name)
    x = torch.randn(2, *prompt.shape, generator=seeded())
    v, expected = (p(x, torch.full((2,), 0.7)) for p in (prompt, precise))
    assert v.dtype == torch.float32 and (v - expected).norm() < 0.2 * expected.norm()
    result = search(prompt.problem(reward, ddim(), 2), RBF(init=2, batch=2), max_nfe=8, generator=seeded())
    assert result.best.dtype == torch.float32 and prompt.decode(result.best[None]).isfinite().all()


def test_in_half_precision_distinct_times_stay_distinct(named):
    """Eight times 0.001 apart, of which bfloat16 would make four or fewer: the sinusoid must see each, exactly."""
    name, full = named
    pipe = copy.deepcopy(full).to(torch.bfloat16)
    prompt = encoded(pipe, name)
    seen = []
    clock = families.family(pipe).clock
    sinusoid = next(
        part for path, part in pipe.transformer.named_modules() if path.endswith(("time_proj", "t_embedder"))
    )
    hook = sinusoid.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    times = [0.99 + 0.001 * k for k in range(8)]
    x = torch.randn(1, *prompt.shape, generator=seeded())
    velocities = [prompt(x, torch.tensor([t])) for t in times]
    rounded = torch.tensor(times).bfloat16().unique()
    hook.remove()
    assert len(rounded) <= 4
    assert len({float(s[0]) for s in seen}) >= 8 and all(
        s.dtype == torch.float32 for s in seen if s[0] not in (0, 2000)
    )
    changes = [float((a - b).abs().max()) for a, b in pairwise(velocities)]
    assert min(changes) > 0
    if clock is not None:
        unit = clock.unit
        assert any(float(s[0]) == float(torch.tensor(times[3], dtype=torch.float32) * unit) for s in seen)


def test_exact_time_touches_time_only():
    pipe = build("FluxPipeline")
    sinusoid = pipe.transformer.time_text_embed.time_proj
    seen = []
    sinusoid.register_forward_hook(lambda module, args, out: seen.append(float(args[0][0])))
    with exact_time(pipe, 0.25):
        theirs(pipe, "FluxPipeline", 1, num_inference_steps=2)
    assert seen == [250.0, 2000.0] * 2, "time at both steps, guidance 2 untouched"


def test_exact_time_follows_the_scheduler_through_a_pipelines_own_call():
    pipe = build("FluxPipeline").to(torch.bfloat16)
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, interpolant="vp", finish=1)
    seen = []
    pipe.transformer.time_text_embed.time_proj.register_forward_hook(
        lambda m, args, out: seen.append(float(args[0][0]))
    )
    theirs(pipe, "FluxPipeline", 1, num_inference_steps=10)
    assert len(set(seen[::2])) < 10, "in bfloat16 steps of the grid fall together"
    seen.clear()
    with exact_time(pipe):
        theirs(pipe, "FluxPipeline", 1, num_inference_steps=10)
    assert seen[::2] == [float(1000 * sigma) for sigma in pipe.scheduler.sigmas[:-1]]


def test_hooks_of_exact_time_are_gone_afterwards():
    pipe = build("FluxPipeline")
    sinusoid = pipe.transformer.time_text_embed.time_proj
    before = len(pipe.transformer._forward_pre_hooks)
    with exact_time(pipe, 0.25):
        assert sinusoid._forward_pre_hooks
    assert len(pipe.transformer._forward_pre_hooks) == before and not sinusoid._forward_pre_hooks


def test_a_dpm_solver_pipeline_has_its_grid_read_too():
    """Sana comes with DPM-Solver."""
    pipe = build("SanaPipeline")
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    times = encoded(pipe, "SanaPipeline").times(6)
    assert len(times) == 7 and times[-1] == 0 and 0.99 < times[0] < 1
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler, is not made for flow models"):
        encoded(pipe, "SanaPipeline").times(6)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "ZImagePipeline", "SanaPipeline"])
def test_a_search_judges_previews_and_leaders_by_the_full_autoencoder(name):
    pipe = build(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1), latent_channels=4,
        ).eval()  # fmt: skip
    prompt = encoded(pipe, name, preview=tiny)
    x = torch.randn(3, *prompt.shape, generator=seeded())
    shift = tiny.config.shift_factor if name != "SanaPipeline" else 0.0
    with torch.no_grad():
        by_hand = tiny.decode(x / tiny.config.scaling_factor + shift).sample.add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(prompt.decode(x, preview=True), by_hand, atol=1e-5, rtol=0)
    torch.testing.assert_close(prompt.decode(x), encoded(pipe, name).decode(x), atol=0, rtol=0)
    result = search(prompt.problem(reward, ode, 2), BestOfN(3), max_nfe=6 * prompt.cost, generator=seeded())
    torch.testing.assert_close(result.particles.reward, reward(prompt.decode(result.particles.x, preview=True)))
    pictures, rewards = prompt.leaders(result, reward, 2)
    top = result.particles.x[result.particles.reward.argsort(descending=True)[:2]]
    expected = reward(prompt.decode(top)).sort(descending=True)
    torch.testing.assert_close(rewards, expected.values)
    torch.testing.assert_close(pictures, prompt.decode(top)[expected.indices])


LIMITS = {
    "FluxPipeline": 512,
    "Flux2KleinPipeline": 512,
    "Flux2KleinPipeline, distilled": 512,
    "StableDiffusion3Pipeline": 256,
    "QwenImagePipeline": 512,
    "ZImagePipeline": 512,
    "SanaPipeline": 300,
}


def test_the_longest_text_is_what_the_model_was_made_for(named):
    """By diffusers' own defaults; but FLUX.1-schnell, which has no guidance embedding, was made for 256."""
    name, built = named
    pipe = copy.copy(built)
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        vars(pipe)[tokenizer] = None  # as a skeleton has it: tiny T5 is of 16 tokens
    family = families.family(pipe)
    assert family.tokens(pipe) == LIMITS[name]
    assert len(family.blank(pipe.transformer.config, 7)["prompt_embeds"][0]) == 7
    if name == "FluxPipeline":
        schnell = type(pipe.transformer).from_config(pipe.transformer.config, guidance_embeds=False)
        vars(pipe)["transformer"] = schnell
        assert family.tokens(pipe) == 256
        vars(pipe)["transformer"] = None  # while a plan encodes prompts
        configs = [hub.skeleton(locate(f"tiny-flux/{kind}")).transformer.config for kind in ("dev", "schnell")]
        assert [family.tokens(pipe, config) for config in configs] == [512, 256]


def test_what_the_token_limit_cuts_off_is_said(named):
    """Exactly where the last word makes no difference to what the transformer is given."""
    name, pipe = named
    cuts = []
    if name == "QwenImagePipeline":  # which leaves out 34 tokens, its template's; spelt in letters they are more
        pipe = copy.copy(pipe)
        template = pipe.prompt_template_encode.split("{}")[0]
        pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(template).input_ids)
    for limit in range(1, 48):
        given, told = [], []
        for text in ("two red circles 1", "two red circles 2"):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                prompt = FlowModel.encode(pipe, text, height=64, width=64, guidance=0.0, max_tokens=limit)
            given.append(prompt.encoded["prompt_embeds"][0][-limit:])  # SD3 has CLIP's tokens before
            told.append([str(one.message) for one in said])
        cuts.append(len(given[0]) == len(given[1]) and torch.equal(*given))
        assert [len(lines) == 1 and "the model reads" in lines[0] for lines in told] == [cuts[-1]] * 2, limit
    assert cuts == sorted(cuts, reverse=True) and cuts[0] and not cuts[-1]
    with pytest.raises(ValueError, match="must max_tokens; got 16 and 0"):
        FlowModel.encode(pipe, TEXT, height=64, width=64, max_tokens=0)


def test_unknown_classes_and_sizes_are_refused(named):
    _, pipe = named
    with pytest.raises(ValueError, match="multiples of"):
        FlowModel.encode(pipe, TEXT, height=60, width=64)
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not supported; supported are FluxPipeline"):
        families.family("StableDiffusionPipeline")
    with pytest.raises(ValueError, match="not supported"):
        FlowModel.encode(object(), TEXT)
