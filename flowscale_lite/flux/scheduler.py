"""The samplers of this package as a diffusers scheduler, which takes the place of a flow-matching pipeline's own.

    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, kernel="sde", interpolant="vp")

diffusers' `stochastic_sampling` changes the law of the samples, and pipelines do not hand their `generator` to `step`.
This scheduler takes every grid of `schedules`, its noise has a seed, and its level can be chosen (arXiv 2503.19385).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from .. import kernels, schedules
from ..interpolants import LINEAR

KERNELS = ("ode", "sde", "ddim")
INTERPOLANTS = ("linear", "vp")


@dataclass
class FlowSDESchedulerOutput(BaseOutput):
    """A step's next state, in the dtype of the model's output, and posterior mean x0|t of the data, in float32."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class FlowSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Stochastic and deterministic samplers of linear-path flow models, as a drop-in diffusers scheduler.

    The time grid, its shifts and `scale_noise` (image to image) are those of FlowMatchEulerDiscreteScheduler. The step
    is a kernel of this package, computed in float32. The state that it returns has the dtype of the model's output, as
    pipelines expect: in bfloat16 it is rounded at every step. (`FlowModel` keeps its states in float32.)

    Args:
        kernel: "sde", Euler-Maruyama, which keeps the flow's marginals for every g, up to the error of few steps;
            "ddim", the DDPM transition around the posterior means; "ode", Euler's step, diffusers' own.
        g: scale of the diffusion g t^2 of "sde"; the paper takes 3.
        eta: noise of "ddim"; 0 is DDIM, 1 the DDPM posterior.
        interpolant: "linear", or "vp" for the paper's conversion: in the linear coordinates of pipelines another grid,
            `schedules.paper_vp`, in place of the pipeline's, and for "sde" another diffusion, `kernels.vp_diffusion`.
        finish: steps in which the long last interval of the paper's grid is crossed. The paper's 1 is sound for models
            of few steps only. None is half of all steps, rounded down, and at least 1.
        times: a grid of your own, strictly falling to exactly 0. The pipeline must then be called with
            `num_inference_steps=len(times) - 1`.
        seed: of the noise, which goes on from call to call; `manual_seed` starts it again.

    Raises ValueError if one of these is out of range, or the config asks for inverted or stochastic steps.
    """

    # A saved pipeline names the module of its scheduler, and diffusers takes ".flux." in that name for its own FLUX.
    __module__ = "flowscale_lite.flux"
    timesteps: Tensor
    sigmas: Tensor

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5, max_shift: float | None = 1.15, base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096, invert_sigmas: bool = False, shift_terminal: float | None = None,
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential", stochastic_sampling: bool = False,  # up to here diffusers' own
        kernel: str = "sde", g: float = 3.0, eta: float = 1.0, interpolant: str = "linear", finish: int | None = None,
        times: list[float] | None = None, seed: int = 0,
    ):  # fmt: skip
        if invert_sigmas or stochastic_sampling:
            why = "time runs from noise at 1 to data at 0, and `kernel` says how noise is added"
            raise ValueError(f"invert_sigmas and stochastic_sampling must be False: {why}")
        own = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.keys() & self.config.keys()
        super().__init__(**{name: self.config[name] for name in own - {"invert_sigmas", "stochastic_sampling"}})
        if kernel not in KERNELS or interpolant not in INTERPOLANTS:
            choices = f"kernel is one of {KERNELS} and interpolant of {INTERPOLANTS}"
            raise ValueError(f"{choices}; got {kernel!r}, {interpolant!r}")
        if not g >= 0:
            raise ValueError(f"g must not be negative; got {g}")
        diffusion = kernels.quadratic(g) if interpolant == "linear" else kernels.vp_diffusion(kernels.quadratic(g))
        self._kernel = {"ode": kernels.ode, "sde": kernels.sde(diffusion), "ddim": kernels.ddim(eta)}[kernel]
        self._times = None if times is None else schedules.check(times)
        self.manual_seed(seed)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for a pipeline whose own scheduler has this config; keyword arguments override its fields."""
        if isinstance(config, Mapping) and config.get("use_flow_sigmas"):
            kwargs.setdefault("shift", config["flow_shift"])  # DPM-Solver's, with which Sana comes
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def manual_seed(self, seed: int) -> FlowSDEScheduler:
        """Start the noise again at a seed, and return the scheduler."""
        self.generator = Generator().manual_seed(seed)
        return self

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None,
        timesteps: Any = None,
    ) -> None:  # fmt: skip
        """Set the grid of the next run: the config's, or what FlowMatchEulerDiscreteScheduler makes of the arguments.

        Raises ValueError if the config's `times` has another number of steps, or the grid does not fall to exactly 0.
        """
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        steps, times = len(self.timesteps), self._times
        if times is not None and len(times) != steps + 1:
            raise ValueError(f"the config's times make {len(times) - 1} steps; {steps} were asked for")
        if times is None and self.config.interpolant == "vp":
            finish = max(1, steps // 2) if self.config.finish is None else self.config.finish
            times = schedules.paper_vp(steps, finish)
        if times is not None:
            self.sigmas = torch.tensor(times, dtype=torch.float32, device=device)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        schedules.check(self.sigmas.tolist())

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """The state (1 - t) sample + t noise, at the times of `timestep` (K,), or at that of the run's first step."""
        if noise is None:
            raise ValueError("scale_noise needs the noise that is to be mixed in")
        return super().scale_noise(sample.float(), timestep, noise.float()).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> FlowSDESchedulerOutput | tuple[Tensor, ...]:
        """One step of the kernel from the state `sample` (K, *D) with velocity `model_output` (K, *D).

        `timestep`, one of `self.timesteps`, counts at the first step of a run only, if no begin index was set. The
        generator draws the noise, the scheduler's own if None. Without `return_dict` the next state comes in a tuple.
        Raises ValueError if `timestep` is an integer, or the run is over.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError("timestep must be one of scheduler.timesteps, a float; got an integer, an index perhaps")
        if self.step_index is None:
            self._init_step_index(timestep)
        if self.step_index >= len(self.timesteps):
            raise ValueError(f"the run is over after {len(self.timesteps)} steps; call set_timesteps first")
        t, s = self.sigmas[self.step_index : self.step_index + 2].tolist()
        x, v = sample.float(), model_output.float()
        mean, std = self._kernel(LINEAR, x, v, t, s)
        if std > 0:
            z = randn_tensor(x.shape, generator=generator or self.generator, device=x.device, dtype=x.dtype)
            mean = mean + std * z
        self._step_index += 1
        state = mean.to(model_output.dtype)
        if not return_dict:
            return (state,)
        x0, _ = LINEAR.endpoints(x, v, x.new_full((len(x),), t))
        return FlowSDESchedulerOutput(prev_sample=state, pred_original_sample=x0)
