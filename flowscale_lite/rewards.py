"""Rewards: what a search maximises, and three small ways of building one from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """x (K, *D) -> (K,): one finite number a row, larger is better. Rows must not influence one another."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def chunked(fn: Callable[[Tensor], Tensor], chunk: int) -> Callable[[Tensor], Tensor]:
    """The row-wise function fn applied to `chunk` rows at a time, the answers joined: the same numbers in less memory.

    fn is given copies, and its answers are copied, so it may edit and reuse its tensors. Raises ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    return lambda x: torch.cat([fn(rows.clone()).clone() for rows in x.split(chunk)])


def decoded(decode: Callable[[Tensor], Tensor], reward: Reward, chunk: int = 16) -> Reward:
    """A reward of pictures (K, ...) -> (K,) as a reward of latents (K, *D) -> (K,): `chunk` rows decoded at a time."""
    return chunked(lambda latents: reward(decode(latents)), chunk)


def rounded(reward: Reward) -> Reward:
    """The reward to the nearest integer: a judge that only counts, which strict improvement almost never beats."""
    return lambda x: reward(x).round()
