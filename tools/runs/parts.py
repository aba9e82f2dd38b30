"""What the runs share: a model and the held-out judge, loaded once a process."""

from __future__ import annotations

import functools
from typing import Any

import torch

from flowscale_lite.flux import load
from flowscale_lite.tiny.data import locate
from flowscale_lite.tiny.judge import HeldOutJudge


@functools.cache
def parts(model: str) -> tuple[Any, HeldOutJudge]:
    """Pipeline of tiny-flux, schnell or dev, and held-out judge."""
    torch.set_num_threads(1)  # as many processes as cores instead
    return load(locate(f"tiny-flux/{model}")), HeldOutJudge.load(locate("judge/held_out.safetensors"))
