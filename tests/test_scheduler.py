"""The drop-in scheduler: diffusers' own ODE to 1e-5, the right marginals with noise, and the manners of a scheduler."""

import copy
import json
import math

import pytest
import torch
from conftest import covariance, gaussian_flow, moments_along, seeded
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline

from flowscale_lite import LINEAR, GaussianMixture, flux, kernels, schedules
from flowscale_lite.flux import FlowSDEScheduler
from flowscale_lite.tiny.data import locate

MIXTURE = GaussianMixture([[-2.0, -1.0], [1.5, 1.0]], [0.3, 0.5], [0.3, 0.7])
CALL = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 2.0, "max_sequence_length": 16}
KINDS = [
    {"kernel": "ode"},
    {"kernel": "sde"},
    {"kernel": "sde", "g": 1.0},
    {"kernel": "ddim"},
    {"kernel": "ddim", "eta": 0.5},
    {"kernel": "sde", "interpolant": "vp"},
    {"kernel": "ddim", "interpolant": "vp", "finish": 2},
    {"kernel": "ddim", "times": [1.0, 0.8, 0.5, 0.1, 0.0]},
]
NAMES = [" ".join(map(str, kind.values())) for kind in KINDS]
FIRST = {"sde": kernels.sde(kernels.quadratic()), "ddim": kernels.ddim()}


def steps_of(kind: dict) -> int:
    return len(kind["times"]) - 1 if "times" in kind else 10


def run(scheduler, velocity, x, *, generator=None):
    """What a pipeline does: the states after every step, noise first."""
    states = [x]
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        v = velocity(states[-1], torch.full((len(x),), float(sigma)))
        states.append(scheduler.step(v, t, states[-1], generator=generator, return_dict=False)[0])
    return states


# ---------------------------------------------------------------------------------------------------------- marginals
@pytest.mark.parametrize(
    "config",
    [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.02}, {"use_karras_sigmas": True}],
)
def test_the_ode_is_diffusers_own_on_every_grid(config):
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = FlowSDEScheduler.from_config(theirs.config, kernel="ode")
    x = torch.randn(64, 2, generator=seeded())
    both = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(12, sigmas=[1 - k / 12 for k in range(12)], mu=0.7)
        both.append(torch.stack(run(scheduler, MIXTURE.velocity(LINEAR), x)))
    assert torch.equal(theirs.sigmas, ours.sigmas) and torch.equal(theirs.timesteps, ours.timesteps)
    torch.testing.assert_close(both[1], both[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_moments_are_those_of_the_kernel_at_every_time(kind):
    """On Gaussian data the mean and variance of a sampler obey an exact recursion, which `kernels` passes through for
    its own tests; the scheduler's samples must show them: 4 standard errors, of which 100,000 rows leave little."""
    scheduler = FlowSDEScheduler(**kind)
    scheduler.set_timesteps(steps_of(kind))
    times = tuple(scheduler.sigmas.tolist())
    kernel = {"ode": kernels.ode, "sde": FIRST["sde"], "ddim": kernels.ddim(kind.get("eta", 1.0))}[kind["kernel"]]
    if kind["kernel"] == "sde":
        diffusion = kernels.quadratic(kind.get("g", 3.0))
        kernel = kernels.sde(kernels.vp_diffusion(diffusion) if kind.get("interpolant") == "vp" else diffusion)
    rows = 100_000
    (first_mean, first_var), *_ = expected = moments_along(kernel, LINEAR, times)
    x = first_mean + math.sqrt(first_var) * torch.randn(rows, 1, generator=seeded(1))

    def flow(x, t):  # affine, so one row's slope and offset do for all
        probe = gaussian_flow("linear")(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t[:2].double())
        return (probe[0] + (probe[1] - probe[0]) * x.double()).float()

    for state, (mean, var) in zip(run(scheduler, flow, x), expected, strict=True):
        assert abs(float(state.double().mean()) - mean) < 4 * math.sqrt(var / rows)
        assert abs(float(state.double().var()) - var) < 4 * var * math.sqrt(2 / rows) + 1e-6


@pytest.mark.parametrize("kind", [k for k in KINDS if "times" not in k], ids=[n for n in NAMES if "[" not in n])
def test_mixture_is_sampled_and_by_diffusers_stochastic_sampling_it_is_not(kind):
    """Mass of a mode and covariance at 150 steps. 0.02 is left for the steps' own error: diffusers' ODE needs 0.005."""
    rows, exact = 4096, 0.3
    bound = 4 * math.sqrt(exact * (1 - exact) / rows) + 0.02

    def mass(scheduler):
        scheduler.set_timesteps(150)
        x = run(scheduler, MIXTURE.velocity(LINEAR), torch.randn(rows, 2, generator=seeded(2)), generator=seeded(3))[-1]
        return float((x.sum(1) < -0.5).float().mean()), torch.cov(x.T)

    ours, cov = mass(FlowSDEScheduler(**kind))
    assert abs(ours - exact) < bound
    torch.testing.assert_close(cov, covariance(MIXTURE).float(), atol=0.15, rtol=0.06)
    if kind == KINDS[1]:
        theirs, _ = mass(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
        assert abs(theirs - exact) > bound


def test_gaussian_at_eta_1_forgets_a_known_picture_rightly():
    """If the data are one point, the posterior mean is that point and the transition is exact at any step size."""
    point = GaussianMixture([[1.0, -2.0]], 0.0)
    scheduler = FlowSDEScheduler(kernel="ddim")
    scheduler.set_timesteps(4)
    states = run(scheduler, point.velocity(LINEAR), torch.randn(20_000, 2, generator=seeded()))
    for t, x in zip(scheduler.sigmas.tolist(), states, strict=True):
        error = 4 * t / math.sqrt(len(x)) + 1e-5
        assert (x.mean(0) - (1 - t) * torch.tensor([1.0, -2.0])).abs().max() < error
        assert (x.std(0) - t).abs().max() < error


# ---------------------------------------------------------------------------------------------------------- pipelines
@pytest.fixture(scope="module")
def pipe():
    return flux.load(locate("tiny-flux/dev"))


@pytest.fixture
def with_scheduler(pipe):
    """Puts a scheduler into the pipeline, and its own back afterwards."""
    own = pipe.scheduler

    def put(**kind):
        pipe.scheduler = FlowSDEScheduler.from_config(own.config, **kind)
        return pipe

    yield put
    pipe.scheduler = own


def draw(pipe, seed: int = 0, **more):
    arguments = {"generator": seeded(seed), "output_type": "pt", **CALL, **more}
    return pipe("three red circles", **arguments).images


@pytest.mark.parametrize("kind", KINDS[1:7:2], ids=NAMES[1:7:2])
def test_flux_pipeline_repeats_itself_by_seed(with_scheduler, kind):
    pipe = with_scheduler(**kind, seed=4)
    first, second = draw(pipe), draw(pipe)
    assert first.isfinite().all() and (first - second).abs().max() > 0.02, "the noise goes on from call to call"
    pipe.scheduler.manual_seed(4)
    assert torch.equal(draw(pipe), first) and torch.equal(draw(pipe), second)
    assert torch.equal(draw(with_scheduler(**kind, seed=4)), first)
    assert not torch.equal(draw(with_scheduler(**kind, seed=5)), first)


def test_flux_pipeline_with_the_ode_draws_what_it_always_drew(pipe, with_scheduler):
    plain = draw(pipe)
    torch.testing.assert_close(draw(with_scheduler(kernel="ode")), plain, atol=1e-4, rtol=0)


def test_a_grid_of_ones_own_reaches_the_pipeline(with_scheduler):
    times = schedules.logit_normal(6)
    pipe = with_scheduler(kernel="ddim", times=list(times))
    draw(pipe)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(times))
    with pytest.raises(ValueError, match="make 6 steps; 5 were asked for"):
        draw(pipe, num_inference_steps=5)
    pipe = with_scheduler(interpolant="vp", finish=2)
    draw(pipe)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(schedules.paper_vp(6, 2)))


@pytest.mark.parametrize(("steps", "finish"), [(1, 1), (7, 3), (10, 5)])
def test_by_default_half_of_the_steps_finish_the_papers_grid(steps, finish):
    """Stored results rest on it."""
    scheduler = FlowSDEScheduler(interpolant="vp")
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(schedules.paper_vp(steps, finish)))


def test_image_to_image_starts_in_the_middle(pipe):
    """With the ODE, diffusers' own picture; with any kernel, a later start changes the picture less."""
    image = draw(pipe)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}

    def edit(scheduler, strength):
        editor = FluxImg2ImgPipeline(**{**parts, "scheduler": scheduler})
        editor.set_progress_bar_config(disable=True)
        picture = draw(editor, seed=1, image=image, strength=strength, num_inference_steps=10)
        assert scheduler.step_index == 10 and scheduler.begin_index == 10 - round(10 * strength)
        return picture

    theirs = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for kernel in ("ode", "ddim"):
        ours = FlowSDEScheduler.from_config(pipe.scheduler.config, kernel=kernel)
        little, much = edit(ours, 0.3), edit(ours, 0.9)
        assert 0.001 < (little - image).abs().mean() < (much - image).abs().mean()
        if kernel == "ode":
            torch.testing.assert_close(much, edit(theirs, 0.9), atol=1e-4, rtol=0)


def test_a_pipeline_saved_with_it_comes_back_with_it(with_scheduler, tmp_path):
    pipe = with_scheduler(kernel="ddim", eta=0.5, seed=7)
    pipe.save_pretrained(tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is FlowSDEScheduler and again.scheduler.config.eta == 0.5
    torch.testing.assert_close(draw(again), draw(with_scheduler(kernel="ddim", eta=0.5, seed=7)), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------- the manners of diffusers' schedulers
def one_step(scheduler, dtype=torch.float32, **arguments):
    scheduler.set_timesteps(len(scheduler._times) - 1 if scheduler._times else 10)
    x, v = (torch.randn(3, 4, 8, 8, generator=seeded(k)).to(dtype) for k in (0, 1))
    return scheduler.step(v, scheduler.timesteps[2], x, **arguments)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_config_survives_saving_and_changes_nothing(kind, tmp_path):
    scheduler = FlowSDEScheduler(**kind, seed=3, shift=1.7)
    scheduler.save_pretrained(tmp_path)
    again = FlowSDEScheduler.from_pretrained(tmp_path)
    assert again.config == scheduler.config
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "FlowSDEScheduler"
    for other in (again, FlowSDEScheduler.from_config(scheduler.config), copy.deepcopy(scheduler)):
        scheduler.manual_seed(3)
        assert torch.equal(one_step(other).prev_sample, one_step(scheduler).prev_sample)


def test_from_config_takes_over_what_a_pipeline_brings():
    flux = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3)
    ours = FlowSDEScheduler.from_config(flux.config, kernel="ddim", eta=0.3)
    assert (ours.config.max_shift, ours.config.use_dynamic_shifting, ours.config.eta) == (1.3, True, 0.3)
    sana = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert FlowSDEScheduler.from_config(sana.config).config.shift == 3.0
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.max_shift == 1.3


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_keeps_shape_and_dtype_and_counts_in_float32(kind, dtype):
    out = one_step(FlowSDEScheduler(**kind), dtype)
    assert out.prev_sample.shape == (3, 4, 8, 8) and out.prev_sample.dtype == dtype
    x, v = (torch.randn(3, 4, 8, 8, generator=seeded(k)).to(dtype).float() for k in (0, 1))
    scheduler = FlowSDEScheduler(**kind)
    scheduler.set_timesteps(steps_of(kind))
    exact = scheduler.step(v, scheduler.timesteps[2], x)
    assert torch.equal(out.prev_sample, exact.prev_sample.to(dtype)), "rounded once, at the end"
    assert out.pred_original_sample.dtype == torch.float32
    t = float(scheduler.sigmas[2])
    torch.testing.assert_close(exact.pred_original_sample, x - t * v)


def test_tuple_and_named_output_agree_and_inputs_are_left_alone():
    named = one_step(FlowSDEScheduler())
    (plain,) = one_step(FlowSDEScheduler(), return_dict=False)
    assert torch.equal(named.prev_sample, plain) and torch.equal(named[0], plain)
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(5)
    x = torch.ones(2, 3)
    scheduler.step(x.clone(), scheduler.timesteps[0], x)
    assert torch.equal(x, torch.ones(2, 3))


def test_noise_is_from_the_generator_that_is_handed_in():
    a, b = (one_step(FlowSDEScheduler(seed=k), generator=seeded(9)).prev_sample for k in (0, 1))
    assert torch.equal(a, b)
    rows = one_step(FlowSDEScheduler(), generator=[seeded(1), seeded(2), seeded(1)]).prev_sample
    alone = one_step(FlowSDEScheduler(), generator=[seeded(1), seeded(5), seeded(6)]).prev_sample
    assert torch.equal(rows[0], alone[0]) and not torch.equal(rows[1], alone[1])


def test_grid_index_and_public_names():
    scheduler = FlowSDEScheduler(shift=2.0)
    assert scheduler.order == 1 and len(scheduler) == 1000
    scheduler.set_timesteps(7)
    assert len(scheduler.timesteps) == 7 and len(scheduler.sigmas) == 8 and scheduler.sigmas[-1] == 0
    assert (scheduler.timesteps.diff() < 0).all() and scheduler.step_index is None
    scheduler.set_begin_index(3)
    x = torch.randn(2, 3, generator=seeded())
    scheduler.step(x, scheduler.timesteps[3], x)
    assert (scheduler.begin_index, scheduler.step_index) == (3, 4)
    for t in scheduler.timesteps[4:]:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="the run is over after 7 steps"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(7)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.step(x, scheduler.timesteps[5], x)
    assert scheduler.step_index == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_noise_mixes_at_the_time_asked_for(dtype):
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(10)
    x, z = (torch.randn(2, 3, generator=seeded(k)).to(dtype) for k in (0, 1))
    t = scheduler.sigmas[[2, 7]].view(-1, 1)
    mixed = scheduler.scale_noise(x, scheduler.timesteps[[2, 7]], z)
    assert mixed.dtype == dtype and torch.equal(mixed, ((1 - t) * x.float() + t * z.float()).to(dtype))
    scheduler.set_begin_index(4)
    t = scheduler.sigmas[4]
    torch.testing.assert_close(
        scheduler.scale_noise(x, scheduler.timesteps[4:5].expand(2), z), ((1 - t) * x.float() + t * z.float()).to(dtype)
    )
    with pytest.raises(ValueError, match="needs the noise"):
        scheduler.scale_noise(x, scheduler.timesteps[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "heun"}, "kernel is one of"),
        ({"interpolant": "cosine"}, "interpolant of"),
        ({"g": -1.0}, "g must not be negative"),
        ({"g": float("nan")}, "g must not be negative"),
        ({"kernel": "ddim", "eta": 1.5}, "eta must lie"),
        ({"times": [1.0, 0.5]}, "exactly 0"),
        ({"times": [0.5, 1.0, 0.0]}, "strictly decrease"),
        ({"invert_sigmas": True}, "must be False"),
        ({"stochastic_sampling": True}, "must be False"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
    ],
)
def test_bad_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FlowSDEScheduler(**fields)


def test_an_index_is_no_timestep():
    scheduler = FlowSDEScheduler()
    scheduler.set_timesteps(5)
    x = torch.zeros(1, 2)
    for bad in (3, torch.tensor(3), torch.tensor([3, 3])):
        with pytest.raises(ValueError, match="must be one of scheduler"):
            scheduler.step(x, bad, x)
    with pytest.raises(ValueError, match="finish"):
        FlowSDEScheduler(interpolant="vp", finish=9).set_timesteps(5)
