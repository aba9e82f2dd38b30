"""Several rewards as one: weighed on a common scale, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rewards import Reward


def weighted(parts: Sequence[tuple[Reward, float]], sample: Tensor) -> Reward:
    """The sum of rewards times their weights, each reward standardised to mean 0 and deviation 1 over a sample.

    `sample` (K, *D), K at least 2, is plain pictures of one prompt: how far a reward ranges differs from judge to judge
    and from prompt to prompt. Raises ValueError if there are no parts, or a reward is the same on the whole sample.
    """
    if not parts:
        raise ValueError("weighted needs at least one pair of a reward and its weight")
    scales = []
    for number, (reward, weight) in enumerate(parts):
        r = reward(sample.clone()).float()
        if len(r) < 2 or not r.std() > 0:
            raise ValueError(f"reward {number} is the same on all {len(r)} pictures of the sample: it has no scale")
        scales.append((reward, weight / float(r.std()), float(r.mean())))
    return lambda x: torch.stack([scale * (reward(x.clone()).float() - mean) for reward, scale, mean in scales]).sum(0)


def lexicographic(first: Reward, second: Reward, least: float) -> Reward:
    """`first`, in steps of `least`; among pictures of one step the larger `second` is better.

    Raises ValueError unless `least`, the smallest difference of `first` that matters (1 for counts), is positive.
    """
    if not least > 0:
        raise ValueError(f"least must be positive; got {least}")
    return lambda x: (
        (first(x.clone()).float() / least).round() + torch.atan(second(x.clone()).float()) / torch.pi * 0.999
    )
