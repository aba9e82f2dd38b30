"""The samplers of this package as a diffusers scheduler, which takes the place of a flow-matching pipeline's own.

    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, kernel="sde", interpolant="vp")

diffusers' `stochastic_sampling` changes the law of the samples, and pipelines do not hand their `generator` to `step`.
This scheduler takes every kernel of `kernels` and every grid of `schedules`, and its noise has a seed. Its noise level
can be chosen, which arXiv 2503.19385 needs.
"""

from __future__ import annotations

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
    """What a step of `FlowSDEScheduler` returns.

    Attributes:
        prev_sample: the state at the next time, in the dtype of the model's output.
        pred_original_sample: the posterior mean x0|t of the data, in float32.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class FlowSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Stochastic and deterministic samplers of linear-path flow models, as a drop-in diffusers scheduler.

    The time grid, its shifts and `scale_noise` (image to image) are those of FlowMatchEulerDiscreteScheduler. The step
    is a kernel of this package, computed in float32 whatever the model's precision. The state that a step returns has
    the dtype of the model's output, as pipelines expect: in bfloat16 it is rounded at every step. (`FlowModel` keeps
    its states in float32.)

    Args:
        kernel: "sde" is Euler-Maruyama, which keeps the flow's marginals for every g, up to the error of few steps.
            "ddim" is the DDPM transition around the posterior means. "ode" is Euler's step, diffusers' own.
        g: scale of the diffusion g t^2 of "sde"; the paper takes 3.
        eta: noise of "ddim"; 0 is DDIM, 1 the DDPM posterior.
        interpolant: "linear", or "vp" for the paper's conversion. In the linear coordinates of pipelines, conversion
            is another grid, `schedules.paper_vp`, and for "sde" another diffusion, `kernels.vp_diffusion`. The grid
            replaces the pipeline's and its shift.
        finish: the number of steps in which the long last interval of the paper's grid is crossed. The paper's 1 is
            sound for models of few steps only. None is half of all steps, rounded down, and at least 1.
        times: a grid of your own, strictly falling to exactly 0, instead of the pipeline's or the paper's. The
            pipeline must then be called with `num_inference_steps=len(times) - 1`.
        seed: of the scheduler's generator. Its noise goes on from call to call, so that calls are independent;
            `manual_seed` starts it again.

    Raises:
        ValueError: the kernel or interpolant is unknown, g < 0, eta is outside [0, 1], `times` is no schedule, or the
            config asks for inverted or stochastic steps.
    """

    # A saved pipeline names the module of its scheduler, and diffusers takes ".flux." in that name for its own FLUX.
    __module__ = "flowscale_lite.flux"
    timesteps: Tensor
    sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        kernel: str = "sde",
        g: float = 3.0,
        eta: float = 1.0,
        interpolant: str = "linear",
        finish: int | None = None,
        times: list[float] | None = None,
        seed: int = 0,
    ):
        if invert_sigmas or stochastic_sampling:
            raise ValueError(
                "invert_sigmas and stochastic_sampling must be False: time runs from noise at 1 to data at 0, "
                "and `kernel` says how noise is added"
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )
        self._kernel = _kernel(kernel, g, eta, interpolant)
        self._times = None if times is None else schedules.check(times)
        self.manual_seed(seed)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for a pipeline whose own scheduler has this config; keyword arguments override its fields.

        The `flow_shift` of DPM-Solver, with which Sana comes, is taken for `shift`.
        """
        if isinstance(config, Mapping) and config.get("use_flow_sigmas"):
            kwargs.setdefault("shift", config["flow_shift"])
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def manual_seed(self, seed: int) -> FlowSDEScheduler:
        """Start the noise again at a seed, and return the scheduler."""
        self.generator = Generator().manual_seed(seed)
        return self

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the grid of the next run: the config's, or what FlowMatchEulerDiscreteScheduler makes of the arguments.

        Raises:
            ValueError: the config's `times` has another number of steps, or the grid does not fall to exactly 0.
        """
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        steps = len(self.timesteps)
        if self._times is not None and len(self._times) != steps + 1:
            raise ValueError(f"the config's times make {len(self._times) - 1} steps; {steps} were asked for")
        times = self._times
        if times is None and self.config.interpolant == "vp":
            finish = max(1, steps // 2) if self.config.finish is None else self.config.finish
            times = schedules.paper_vp(steps, finish)
        if times is not None:
            self.sigmas = torch.tensor(times, dtype=torch.float32, device=device)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        schedules.check(self.sigmas.tolist())

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """The state (1 - t) sample + t noise, at the times of `timestep` (K,), or at that of the run's first step.

        Raises:
            ValueError: no noise is given.
        """
        if noise is None:
            raise ValueError("scale_noise needs the noise that is to be mixed in")
        return super().scale_noise(sample.float(), timestep, noise.float()).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowSDESchedulerOutput | tuple[Tensor, ...]:
        """One step of the kernel from the state `sample` (K, *D) with velocity `model_output` (K, *D).

        Args:
            timestep: one of `self.timesteps`. It counts at the first step of a run only, if no begin index was set.
            generator: draws the noise; the scheduler's own if None.
            return_dict: if False, the next state is returned in a tuple.

        Raises:
            ValueError: `timestep` is an integer, or the run is over.
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


def _kernel(name: str, g: float, eta: float, interpolant: str) -> kernels.Kernel:
    if name not in KERNELS or interpolant not in INTERPOLANTS:
        raise ValueError(f"kernel is one of {KERNELS} and interpolant of {INTERPOLANTS}; got {name!r}, {interpolant!r}")
    if not g >= 0:
        raise ValueError(f"g must not be negative; got {g}")
    diffusion = kernels.quadratic(g)
    if interpolant == "vp":
        diffusion = kernels.vp_diffusion(diffusion)
    return {"ode": kernels.ode, "sde": kernels.sde(diffusion), "ddim": kernels.ddim(eta)}[name]
