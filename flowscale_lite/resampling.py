"""Resampling schemes: functions from log weights (K,) to n row indices, each unbiased.

The expected number of copies of row k is n w_k under all four. The variance around it falls in the order multinomial,
residual or stratified, systematic (Douc, Cappe & Moulines 2005 compare them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Resampler = Callable[[Tensor, int, Generator], Tensor]
"""log weights (K,), n, generator -> indices (n,), int64"""


def _weights(logw: Tensor) -> Tensor:
    """Normalised weights (K,) in float64; ValueError for none, for a nan or +inf, or for -inf throughout."""
    if logw.ndim != 1 or len(logw) == 0:
        raise ValueError(f"log weights must have shape (K,) with K >= 1; got {tuple(logw.shape)}")
    w = logw.double().softmax(0)
    if not w.isfinite().all():
        raise ValueError("log weights must be finite or -inf, with at least one finite")
    return w


def _uniforms(n: int, generator: Generator, like: Tensor) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64).to(like.device)


def _invert(w: Tensor, u: Tensor) -> Tensor:
    """The row in whose stretch of the cumulative weights each u (n,) in [0, 1) falls; never a row of weight 0."""
    edges = w.cumsum(0)
    return torch.searchsorted(edges / edges[-1], u.clamp_max(1 - 2**-53), right=True)


def multinomial(logw: Tensor, n: int, generator: Generator) -> Tensor:
    """n independent draws."""
    w = _weights(logw)
    return _invert(w, _uniforms(n, generator, w))


def stratified(logw: Tensor, n: int, generator: Generator) -> Tensor:
    """One independent uniform in each of n equal strata."""
    w = _weights(logw)
    return _invert(w, (torch.arange(n, device=w.device) + _uniforms(n, generator, w)) / n)


def systematic(logw: Tensor, n: int, generator: Generator) -> Tensor:
    """One uniform shared by n equal strata: row k is copied floor(n w_k) or ceil(n w_k) times."""
    w = _weights(logw)
    return _invert(w, (torch.arange(n, device=w.device) + _uniforms(1, generator, w)) / n)


def residual(logw: Tensor, n: int, generator: Generator) -> Tensor:
    """floor(n w_k) copies of each row for certain, the rest multinomial on what the floors left over."""
    w = _weights(logw)
    copies = (n * w + 1e-9).floor()  # the margin lets K equal weights, whose sum is only nearly 1, give one copy each
    sure = torch.arange(len(w), device=w.device).repeat_interleave(copies.long())
    rest = (n * w - copies).clamp_min(0)
    if len(sure) == n:
        return sure
    return torch.cat([sure, _invert(rest, _uniforms(n - len(sure), generator, w))])


SCHEMES: dict[str, Resampler] = {f.__name__: f for f in (multinomial, stratified, systematic, residual)}


def ess(logw: Tensor) -> float:
    """Effective sample size 1 / sum w_k^2 of log weights (K,): K if all are equal, 1 if one row holds everything."""
    return float(1 / _weights(logw).square().sum())
