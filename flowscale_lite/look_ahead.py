"""How a search judges a state that is not finished: an estimate of the finished sample, and what it costs.

The look-ahead reward of a state is the reward of its estimate (arXiv 2503.19385 takes the posterior mean). A method
asks `Run.score` for it and never calls a model itself; the run charges the price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .interpolants import LINEAR, Interpolant, Velocity


@dataclass(frozen=True)
class LookAhead:
    """An estimate of the sample that a state will become.

    Attributes:
        name: for tables and error messages.
        price: evaluations of a model for each row.
        evaluates: whether the problem's own velocity at the state is one of them, so that the next transition from
            there needs no further one. If not, `estimate` is given a velocity of nan.
        estimate: the problem's velocity, x (K, *D), its velocity there v (K, *D), t -> estimate of the sample (K, *D);
            None for the posterior mean, which every evaluation yields.
    """

    name: str
    price: int = 1
    evaluates: bool = True
    estimate: Callable[[Velocity, Tensor, Tensor, float], Tensor] | None = None


posterior_mean = LookAhead("posterior mean")
"""E[x0 | x_t], read off the velocity: one evaluation, which the next transition needs anyway."""


def ode(steps: int) -> LookAhead:
    """The end of the flow's ODE from the state, in `steps` equal Euler steps: `steps` evaluations, at least 1.

    Near the noise a multi-step model's posterior mean is a blur. This estimate is a picture, at a higher price.
    """
    if steps < 1:
        raise ValueError(f"the look-ahead needs at least 1 step; got {steps}")

    def estimate(velocity: Velocity, x: Tensor, v: Tensor, t: float) -> Tensor:
        for left in range(steps, 0, -1):
            time = t * left / steps
            v = v if left == steps else velocity(x, x.new_full((len(x),), time))
            x = x - t / steps * v
        return x

    return LookAhead(f"ode({steps})", steps, estimate=estimate)


def sibling(velocity: Velocity, path: Interpolant = LINEAR) -> LookAhead:
    """The posterior mean by another model of the same latents, such as the few-step version of a model.

    It is charged as one evaluation of the problem's own model, whose velocity is evaluated for states kept only.
    """

    def estimate(_: Velocity, x: Tensor, v: Tensor, t: float) -> Tensor:
        times = x.new_full((len(x),), t)
        v = velocity(x.clone(), times.clone()).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad and not v.requires_grad:
            raise ValueError("the sibling's velocity is not differentiable: no_grad or detach cuts its answer off")
        return path.endpoints(x, v, times)[0]

    return LookAhead("sibling", evaluates=False, estimate=estimate)
