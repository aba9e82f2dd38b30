"""Time grids. A schedule is a tuple of floats that falls strictly from at most 1 (noise) to exactly 0 (data)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from statistics import NormalDist

import torch

from .interpolants import LINEAR, VP

Times = tuple[float, ...]


def check(times: Iterable[float]) -> Times:
    """The schedule as floats. Raises ValueError: fewer than two, one outside [0, 1], not falling strictly to 0."""
    out = tuple(float(t) for t in times)
    if len(out) < 2:
        raise ValueError(f"a schedule needs at least two times, noise and data; got {out}")
    if not all(math.isfinite(t) and 0 <= t <= 1 for t in out):
        raise ValueError(f"times must lie in [0, 1], data at 0 and noise at 1; got {out}")
    for k, (t, s) in enumerate(pairwise(out)):
        if s >= t:
            raise ValueError(f"times must strictly decrease; times[{k}] = {t} is followed by {s}")
    if out[-1] != 0:
        raise ValueError(f"a schedule must finish the sample, at exactly 0; it ends at {out[-1]}")
    return out


def uniform(steps: int) -> Times:
    """1, 1 - 1/steps, ..., 0. Raises ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return tuple((steps - k) / steps for k in range(steps + 1))


def paper_vp(steps: int, finish: int = 1) -> Times:
    """The paper's grid (arXiv 2503.19385): s_k = sqrt(1 - (1 - t_k)^2) in VP time with t_k uniform, as linear times.

    Its steps are small early, where the posterior varies most. It starts at VP's noisiest state, linear time 0.9934.
    Its last interval is long: with 10 steps it goes from linear time 0.71 straight to 0, which is sound for a few-step
    model only. It is crossed in `finish` equal steps, which are among the `steps`; 1 is the paper's grid.

    Raises ValueError: unless 1 <= finish <= steps.
    """
    if not 1 <= finish <= steps:
        raise ValueError(f"need 1 <= finish <= steps; got finish = {finish}, steps = {steps}")
    t = torch.tensor(uniform(steps - finish + 1), dtype=torch.float64)[:-1]
    s = (1 - (1 - t) ** 2).sqrt()
    head = LINEAR.time_of_ratio(VP.sigma(s) / VP.alpha(s)).tolist()
    return check([*head, *(head[-1] * (1 - k / finish) for k in range(1, finish)), 0.0])


def logit_normal(steps: int, mean: float = 0.7, std: float = 0.9) -> Times:
    """Quantiles of the logit-normal distribution of training times (Stable Diffusion 3, arXiv 2403.03206).

    With mean > 0 it leans to the noisy side of the middle, where a multi-step model decides what the picture will hold:
    a search wants steps there. Raises ValueError: steps < 1, std <= 0, or times so far out that neighbours coincide.
    """
    if steps < 1 or not std > 0:
        raise ValueError(f"steps must be at least 1 and std positive; got {steps} and {std}")
    quantiles = [NormalDist(mean, std).inv_cdf(1 - k / steps) for k in range(1, steps)]
    return check([1.0, *torch.tensor(quantiles, dtype=torch.float64).sigmoid().tolist(), 0.0])


def levels(steps: int, high: float = 0.95, low: float = 0.7) -> Times:
    """1, then steps - 1 noise levels evenly from high down to low, then 0; for `Refine`, found on tiny-flux schnell.

    Raises ValueError: steps < 2; unless 0 < low < high < 1.
    """
    if steps < 2 or not 0 < low < high < 1:
        raise ValueError(f"need steps >= 2 and 0 < low < high < 1; got {steps}, {low} and {high}")
    return check([1.0, *(high - (high - low) * k / max(1, steps - 2) for k in range(steps - 1)), 0.0])


def shifted(times: Iterable[float], shift: float) -> Times:
    """FLUX's and SD3's resolution shift t -> shift t / (1 + (shift - 1) t); shift > 1 spends more steps near the noise.

    Raises ValueError: shift not positive and finite, or so far out that neighbours coincide; `times` no schedule.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite; got {shift}")
    return check(t / (t + (1 - t) / shift) for t in check(times))  # in this form 1 stays 1 to the last digit
