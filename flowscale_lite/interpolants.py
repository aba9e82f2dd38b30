"""Affine Gaussian interpolants x_t = alpha_t x0 + sigma_t eps between data (t = 0) and noise (t = 1).

A flow model gives the velocity v = alpha' x0|t + sigma' eps|t, where x0|t = E[x0 | x_t] and eps|t = E[eps | x_t].
The pair (x0|t, eps|t) therefore solves a 2x2 linear system, and everything else here is a reading of that pair:
the score is -eps|t / sigma_t, and a model of one path is a model of every other (`convert`; arXiv 2503.19385).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x (K, *D), t (K,) -> v (K, *D)"""
Curve = Callable[[Tensor], Tensor]
"""An elementwise function of time (or of a ratio)."""


@dataclass(frozen=True)
class Interpolant:
    """A path x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I); alpha falls from 1, sigma rises from 0.

    Attributes:
        name: for plots and error messages.
        alpha, sigma, d_alpha, d_sigma: signal and noise level at time t, and their derivatives in t, elementwise.
        time_of_ratio: inverse of t -> sigma/alpha in [0, inf]. Ratios beyond a path's noisiest state get its last time.
        t_min: the earliest time at which a velocity can be read off (x0, eps): above 0 only where sigma' is infinite
            at 0 (VP).
    """

    name: str
    alpha: Curve
    sigma: Curve
    d_alpha: Curve
    d_sigma: Curve
    time_of_ratio: Curve
    t_min: float = 0.0

    def at(self, t: float) -> tuple[float, float, float, float]:
        """(alpha, sigma, alpha', sigma') at one time, as floats of double precision."""
        u = torch.tensor(t, dtype=torch.float64)
        return self.alpha(u).item(), self.sigma(u).item(), self.d_alpha(u).item(), self.d_sigma(u).item()

    def coeffs(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, alpha', sigma') at times t (K,), each shaped (K, 1, ..., 1) to multiply x (K, *D)."""
        _check_time(t, x)
        t = t.view(-1, *[1] * (x.ndim - 1))
        return self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)

    def endpoints(self, x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means (x0|t, eps|t), each (K, *D), from state x and velocity v (K, *D) at times t (K,).

        Solves x = alpha x0 + sigma eps, v = alpha' x0 + sigma' eps. The determinant is positive on all of [0, 1].
        """
        a, s, da, ds = self.coeffs(t, x)
        det = a * ds - da * s
        return (ds * x - s * v) / det, (a * v - da * x) / det

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """alpha' x0 + sigma' eps, the inverse of `endpoints`: (K, *D), (K, *D), (K,) -> (K, *D)."""
        _, _, da, ds = self.coeffs(t, x0)
        return da * x0 + ds * eps

    def score(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t at x, which is -eps|t / sigma_t (K, *D), for t > 0.

        Exact only if the noise was drawn independently of the data: approximate for reflowed and guided models.
        """
        return -self.endpoints(x, v, t)[1] / self.coeffs(t, x)[1]


def _check_time(t: Tensor, x: Tensor) -> None:
    """Raises ValueError for times that would broadcast along the wrong axis without a word."""
    if not isinstance(t, Tensor) or t.shape != x.shape[:1]:
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"t must be a tensor of shape {tuple(x.shape[:1])}, one time a row of x; got {got}")


LINEAR = Interpolant(
    name="linear",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=torch.ones_like,
    time_of_ratio=lambda r: 1 / (1 + 1 / r),  # r / (1 + r) would be nan at r = inf, which is t = 1
)

COSINE = Interpolant(
    name="cosine",
    alpha=lambda t: torch.sin(math.pi / 2 * (1 - t)),  # cos(pi t / 2), and exactly 0 at t = 1
    sigma=lambda t: torch.sin(math.pi / 2 * t),
    d_alpha=lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    d_sigma=lambda t: math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)),
    time_of_ratio=lambda r: (2 / math.pi * torch.atan(r)).clamp_max(1),
)


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Interpolant:
    """The variance-preserving path: alpha = exp(-T/2), sigma^2 = 1 - exp(-T).

    T(t) = beta_min t + (beta_max - beta_min) t^2/2. With the usual constants the path ends at sigma/alpha = 152. Raises
    ValueError: unless 0 < beta_min < beta_max.
    """
    if not 0 < beta_min < beta_max:
        raise ValueError(f"need 0 < beta_min < beta_max; got {beta_min} and {beta_max}")
    slope = beta_max - beta_min

    def integral(t: Tensor) -> Tensor:
        return t * (beta_min + slope * t / 2)

    def beta(t: Tensor) -> Tensor:
        return beta_min + slope * t

    def sigma(t: Tensor) -> Tensor:
        return (-torch.expm1(-integral(t))).sqrt()  # 1 - exp(-T) would lose every digit near t = 0

    def time_of_ratio(r: Tensor) -> Tensor:
        total = torch.log1p(r * r).clamp_max(beta_min + slope / 2)
        return 2 * total / (beta_min + (beta_min**2 + 2 * slope * total).sqrt())

    return Interpolant(
        name="vp",
        alpha=lambda t: torch.exp(-integral(t) / 2),
        sigma=sigma,
        d_alpha=lambda t: -beta(t) / 2 * torch.exp(-integral(t) / 2),
        # Infinite at 0. A huge finite value keeps `endpoints` finite, and its limit right, there.
        d_sigma=lambda t: beta(t) * torch.exp(-integral(t)) / (2 * sigma(t.clamp_min(1e-30))),
        time_of_ratio=time_of_ratio,
        t_min=1e-6,
    )


VP = vp()


def matching_time(t: float, src: Interpolant, dst: Interpolant) -> float:
    """The time of `dst` at which it holds the states of `src` at time t, up to scale; its last if never that noisy."""
    a, s, _, _ = src.at(t)
    return dst.time_of_ratio(torch.tensor(s / a if a > 0 else math.inf, dtype=torch.float64)).item()


def convert(velocity: Velocity, src: Interpolant, dst: Interpolant) -> Velocity:
    """The velocity on path `dst` of a model trained on path `src`.

    Two paths visit the same states up to scale: where their ratios sigma/alpha agree, x_dst / x_src is the constant
    c = hypot(alpha, sigma)_dst / hypot(alpha, sigma)_src and the posterior means (x0, eps) are the same. Reading the
    velocity off those means equals the chain rule (c'/c) x + c t' u(x/c) of the paper, with no 0/0 at either end.

    Exact but for two limits. At t = 0 of a VP `dst` the velocity is read at t_min (relative error 2e-4). States noisier
    than a VP `src` ever gets, linear times above 0.993, are read at its last time: about 1 % of the velocity.
    """

    def converted(x: Tensor, t: Tensor) -> Tensor:
        _check_time(t, x)
        t = t.clamp_min(dst.t_min)
        a, s, _, _ = dst.coeffs(t, x)
        u = src.time_of_ratio((s / a).view(-1))  # a = 0 gives inf, which every path understands
        b, r, _, _ = src.coeffs(u, x)
        y = x * (torch.hypot(b, r) / torch.hypot(a, s))
        return dst.velocity(*src.endpoints(y, velocity(y.clone(), u.clone()), u), t)

    return converted
