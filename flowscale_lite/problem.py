"""What a search is about: the problem, the particles it moves, and the account it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import schedules
from .interpolants import Interpolant, Velocity
from .kernels import Kernel
from .look_ahead import LookAhead, posterior_mean
from .rewards import Reward


@dataclass(frozen=True)
class Problem:
    """What is sampled, and what is wanted. Time runs from noise at t = 1 to data at t = 0.

    Attributes:
        velocity: x (K, *D), t (K,) -> (K, *D), the model. It may split the rows into chunks as it likes.
        reward: x (K, *D) -> (K,), finite.
        path: the interpolant that the velocity belongs to.
        kernel: the transition between neighbouring times.
        times: the schedule, strictly decreasing to exactly 0.
        shape: D, the shape of one sample.
        device, dtype: of states and of times; half precision, which merges neighbouring times, is refused.
        cost: NFE of one row's velocity; 2 for guidance that runs the model twice.
        gradient_cost: evaluations that one row's gradient is charged as: 1 forward, and backward twice its work.
        gradient_chunk: rows differentiated at a time, which bounds the memory; None for all at once.
        look_ahead: how states are judged before they are finished.

    Raises ValueError: a field is out of range.
    """

    velocity: Velocity
    reward: Reward
    path: Interpolant
    kernel: Kernel
    times: tuple[float, ...]
    shape: tuple[int, ...]
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    cost: int = 1
    gradient_cost: int = 3
    gradient_chunk: int | None = None
    look_ahead: LookAhead = posterior_mean

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", schedules.check(self.times))
        object.__setattr__(self, "shape", tuple(self.shape))
        if not all(isinstance(size, int) and size >= 1 for size in self.shape):
            raise ValueError(f"every side of a sample must be at least 1; got shape {self.shape}")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64; got {self.dtype}")
        for name in ("cost", "gradient_cost", "gradient_chunk"):
            value = getattr(self, name)
            none = value is None and name == "gradient_chunk"
            if not none and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")

    def evaluations_ahead(self, t: float | None = None) -> int:
        """Transitions after time t (None: after the start) that end in an evaluation: all but the last, to t = 0."""
        start = self.times[0] if t is None else t
        return sum(0 < s < start for s in self.times)

    def evaluations_kept(self, t: float | None = None) -> int:
        """Evaluations of one chain at the states it keeps from time t on that its look-aheads do not include."""
        return 0 if self.look_ahead.evaluates else 1 + self.evaluations_ahead(t)


@dataclass(frozen=True)
class Particles:
    """K particles at one time t. Indexing with a tensor of rows, a mask or a slice moves every field together.

    Attributes:
        t: their time.
        x: state (K, *D).
        v: velocity there (K, *D); nan until evaluated, zero at t = 0.
        x0: estimate of the finished sample (K, *D): the posterior mean once evaluated, the look-ahead's once scored.
        reward: look-ahead reward r(x0) (K,); nan until scored.
        logw: log weight (K,), for methods that weigh.
        parent: the row (K,), int64, that each descends from, among the particles this step began with; among the first
            draws at the start.
        carry: a method's own tensors, each with leading dimension K; copied from parent to child.
    """

    t: float
    x: Tensor
    v: Tensor
    x0: Tensor
    reward: Tensor
    logw: Tensor
    parent: Tensor
    carry: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Particles:
        moved = {name: getattr(self, name)[rows] for name in PARTICLE_TENSORS}
        return Particles(t=self.t, carry={k: c[rows] for k, c in self.carry.items()}, **moved)

    def top(self, k: int) -> Particles:
        """The k rows of highest reward, best first."""
        return self[self.reward.topk(k).indices]

    def best(self) -> Particles:
        """The one row of highest reward, the first among equals."""
        return self[self.reward.argmax().view(1)]

    def put(self, rows: Tensor, new: Particles) -> Particles:
        """These particles with velocity, estimate and reward of `new` in the rows (K,), bool, one after the other."""
        known = {}
        for name in ("v", "x0", "reward"):
            known[name] = getattr(self, name).clone()
            known[name][rows] = getattr(new, name)
        return replace(self, **known)

    @staticmethod
    def cat(parts: Sequence[Particles]) -> Particles:
        """Particles of one common time in one batch; a ValueError if times differ."""
        if len({p.t for p in parts}) != 1:
            raise ValueError(f"only particles of one time can be joined; got times {[p.t for p in parts]}")
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in PARTICLE_TENSORS}
        carry = {k: torch.cat([p.carry[k] for p in parts]) for k in parts[0].carry}
        return Particles(t=parts[0].t, carry=carry, **joined)


PARTICLE_TENSORS = tuple(f.name for f in fields(Particles) if f.name not in ("t", "carry"))


class Step(NamedTuple):
    """What one step of a search did: numbers only, so that a trace's size does not depend on the budget.

    Attributes:
        t: time of the particles kept.
        nfe, reward_calls: spent so far, this step included.
        drawn: particles drawn in this step, at every time it visited.
        best, mean: of the rewards scored in this step; nan if none was.
        kept: number of particles kept.
        accepted, parent: reward of the best particle kept, nan if not scored, and its parent row.
    """

    t: float
    nfe: int
    reward_calls: int
    drawn: int
    best: float
    mean: float
    kept: int
    accepted: float
    parent: int


@dataclass(frozen=True)
class Result:
    """What a search found and spent; nfe + left == max_nfe.

    Attributes:
        best, reward: the finished sample (*D) of highest reward.
        seen, seen_reward, seen_time: the best estimate (*D) scored anywhere in the search, its reward (at least
            `reward`), and the time it was looked ahead from.
        nfe, left: NFE spent and not spent.
        reward_calls: in rows.
        gradients: of the reward through the velocity, in rows; paid for within nfe, each with a reward call.
        trace: one record a step, the start included.
        particles: the finished particles, `best` among them, with their rewards, weights and carry.
    """

    best: Tensor = field(repr=False)
    reward: float
    seen: Tensor = field(repr=False)
    seen_reward: float
    seen_time: float
    nfe: int
    reward_calls: int
    gradients: int
    left: int
    trace: tuple[Step, ...] = field(repr=False)
    particles: Particles = field(repr=False)
