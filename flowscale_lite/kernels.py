"""One step of a sampler, t -> s, as the mean and standard deviation of x_s given x_t.

Kernels draw no noise: the search does, in one place. The paper (arXiv 2503.19385) converts the linear path to VP before
it samples with the SDE. In continuous time that changes the *grid* and the *diffusion coefficient* and nothing else:
`schedules.paper_vp` is the paper's grid, `vp_diffusion` its diffusion, and each can be used without the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .interpolants import LINEAR, VP, Interpolant, matching_time

Diffusion = Callable[[float], float]
"""The diffusion coefficient g at time t; g^2 is a variance per unit of time."""


@dataclass(frozen=True)
class Kernel:
    """A transition law: kernel(path, x, v, t, s) -> (mean (K, *D), std), for state x and velocity v (K, *D) at time t.

    Attributes:
        name: for plots and error messages.
        moments: the function behind the call.
        stochastic: False if std is always 0, so that all candidates from one state coincide.
    """

    name: str
    moments: Callable[[Interpolant, Tensor, Tensor, float, float], tuple[Tensor, float]]
    stochastic: bool = True

    def __call__(self, path: Interpolant, x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        return self.moments(path, x, v, t, s)


def _euler(path: Interpolant, x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    return x + (s - t) * v, 0.0


ode = Kernel("ode", _euler, stochastic=False)
"""Euler's step of the probability-flow ODE: mean x - (t - s) v, no noise."""


def sde(g: Diffusion) -> Kernel:
    """Euler-Maruyama's step of dx = [v - g^2/2 score] dt + g dw, run backwards; it keeps the marginals for every g.

    Mean x - (t - s)(v - g_t^2/2 score), variance g_t^2 (t - s). The step to s = 0 is the posterior mean, on the linear
    path Euler's step of the ODE: noise added there would stay in the sample. Biased at few steps: with g = 3 t^2 and 10
    uniform steps on the linear path, the variance of Gaussian data N(m, 0.5^2) is up to 38 % too high on the way (and
    3 % too low at the end, the ODE's 26 %).
    """

    def moments(path: Interpolant, x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        if not s < t:
            raise ValueError(f"sde steps towards the data, s < t; got t = {t}, s = {s}")
        times = x.new_full((len(x),), t)
        if s == 0:
            return path.endpoints(x, v, times)[0], 0.0
        drift = v - 0.5 * g(t) ** 2 * path.score(x, v, times)
        return x - (t - s) * drift, g(t) * math.sqrt(t - s)

    return Kernel("sde", moments)


def ddim(eta: float = 1.0) -> Kernel:
    """DDIM with noise eta (Song et al., arXiv 2010.02502); `ddim(1)` is the DDPM posterior.

    The transition x_s | x_t, x0 of the Gaussian path with x0 and eps replaced by their posterior means. Its mean is
    alpha_s x0|t + sqrt(sigma_s^2 - std^2) eps|t and its std eta sigma_s sqrt(1 - rho^2), with rho the ratio of
    sigma/alpha at s and at t. At eta = 1 it is exact where x0 is known. Where it is not, the spread of x0 around its
    mean is left out, and few steps give too little variance (40 % too little in the example of `sde`). It depends on
    the path through sigma/alpha only, so converting the interpolant changes nothing but the grid.
    Raises ValueError: eta outside [0, 1]; when called, s >= t.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]: 0 is the ODE, 1 the full posterior; got {eta}")

    def moments(path: Interpolant, x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        if not s < t:
            raise ValueError(f"ddim steps towards the data, s < t; got t = {t}, s = {s}")
        (a, sg, _, _), (b, ss, _, _) = path.at(t), path.at(s)
        rho = min(1.0, ss * a / (b * sg))  # 0 at t = 1 of the linear path, whose state holds no signal: drawn afresh
        x0, eps = path.endpoints(x, v, x.new_full((len(x),), t))
        return b * x0 + ss * math.sqrt(1 - eta**2 * (1 - rho**2)) * eps, eta * ss * math.sqrt(1 - rho**2)

    return Kernel(f"ddim({eta:g})", moments, stochastic=eta > 0)


def _renoise(path: Interpolant, x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    if not s > t:
        raise ValueError(f"renoise steps towards the noise, s > t; got t = {t}, s = {s}")
    (a, sg, _, _), (b, ss, _, _) = path.at(t), path.at(s)
    return b / a * x, math.sqrt(max(0.0, ss**2 - (b / a * sg) ** 2))


renoise = Kernel("renoise", _renoise)
"""The forward transition from t up to s > t: mean b x with b = alpha_s/alpha_t, variance sigma_s^2 - b^2 sigma_t^2."""


def quadratic(scale: float = 3.0) -> Diffusion:
    """g(t) = scale t^2, the paper's choice with scale 3: noisy early, quiet near the data."""
    return lambda t: scale * t**2


def memoryless(path: Interpolant) -> Diffusion:
    """The one g whose *forward* SDE is linear in x, with no score: g^2 = 2 (sigma sigma' - sigma^2 alpha'/alpha).

    On VP it is sqrt(T'), the diffusion of the VP-SDE in the literature. The name is of arXiv 2409.08861.
    Raises ValueError: when called where alpha = 0 (t = 1 of the linear path), where it is infinite.
    """

    def g(t: float) -> float:
        a, s, da, ds = path.at(max(t, path.t_min))  # VP's is sqrt(beta_min) at 0, of which sigma' = inf knows nothing
        if a <= 0:
            raise ValueError(f"the memoryless diffusion of the {path.name} path is infinite at t = {t}; start below it")
        return math.sqrt(2 * s * (a * ds - da * s) / a)

    return g


def equivalent_sde(
    times: Iterable[float], g: Diffusion, src: Interpolant = VP, dst: Interpolant = LINEAR
) -> tuple[tuple[float, ...], Diffusion]:
    """The SDE on `dst` that makes the same samples as the SDE with diffusion g on `src`: its grid and its diffusion.

    The states of `src` at time s are those of `dst` at t(s), where sigma/alpha agree, times c. Scaling x_src = c x and
    changing the clock turn dx = [v - g^2/2 score] dt + g dw into the same equation on `dst` with
    g_dst(t)^2 = (g(s)/c)^2 ds/dt. Since ds/dt = c^2 det_dst/det_src with det = alpha sigma' - alpha' sigma, c drops
    out: g_dst(t) = g(s) sqrt(det_dst/det_src).

    Args:
        times: of `src`, strictly decreasing.
    Raises ValueError: two of the times, strictly decreasing on `src`, fall together on `dst`.
    """

    def moved(t: float) -> float:
        a, s, da, ds = dst.at(t)
        u = matching_time(t, dst, src)
        b, r, db, dr = src.at(u)
        return g(u) * math.sqrt((a * ds - da * s) / (b * dr - db * r))

    grid = tuple(matching_time(s, src, dst) for s in times)
    for t, s in pairwise(grid):
        if not s < t:
            raise ValueError(f"two times of the {src.name} path fall together at {t} of the {dst.name} path: {times}")
    return grid, moved


def vp_diffusion(g: Diffusion | None = None) -> Diffusion:
    """The diffusion of an SDE on VP (g in VP time; None for the paper's 3 s^2), written on the linear path.

    It is large near t = 1 (11.7 at linear time 0.993) and wants small steps there: `schedules.paper_vp`.
    """
    return equivalent_sde((), quadratic() if g is None else g)[1]
