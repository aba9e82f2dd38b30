"""One loop for every method.

A `Problem` says what is sampled and what is wanted. A `Method` says how many candidates to draw and which to keep. The
`Run` between them owns the budget, the clock and the randomness: a method never holds the velocity itself, so it can
neither forget to pay nor overspend.

The budget is counted in NFE, velocity evaluations times their cost, one a row of a batch. A candidate is judged before
it is finished by its look-ahead reward r(x0|t), the reward of its posterior mean (arXiv 2503.19385).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from . import schedules
from .interpolants import Interpolant, Velocity
from .kernels import Kernel
from .rewards import Reward


@dataclass(frozen=True)
class Problem:
    """What is sampled, and what is wanted.

    Attributes:
        velocity: x (K, *D), t (K,) -> (K, *D), the model; it may split the rows into chunks as it likes.
        reward: x (K, *D) -> (K,), finite.
        path: the interpolant the velocity belongs to.
        kernel: the transition between neighbouring times.
        times: the schedule, strictly decreasing to exactly 0.
        shape: D, the shape of one sample.
        device, dtype: of states; time reaches the velocity in the same dtype, so half precision is refused.
        cost: NFE of one row's velocity; 2 for guidance that runs the model twice.
        gradient_cost: evaluations that one row's gradient is charged as: 1 forward, and backward twice its work.
        gradient_chunk: rows differentiated at a time, which is what bounds the memory; None for all at once.
        name: for tables and plots.

    Raises:
        ValueError: a field is out of range.
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
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", schedules.check(self.times))
        object.__setattr__(self, "shape", tuple(self.shape))
        if any(size < 1 for size in self.shape):
            raise ValueError(f"every side of a sample must be at least 1; got shape {self.shape}")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype must be float32 or float64, half precision merges neighbouring times; got {self.dtype}"
            )
        for name in ("cost", "gradient_cost", "gradient_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")

    def evaluations_ahead(self, t: float | None = None) -> int:
        """Transitions ahead of time t (None: of the start) that end in an evaluation.

        The last one, to t = 0, is free. A whole sample takes one evaluation more, at its noise.
        """
        start = self.times[0] if t is None else t
        return sum(0 < s < start for s in self.times)


@dataclass(frozen=True)
class Particles:
    """K particles at one time t. Indexing with a tensor of rows or a slice moves every field together.

    Attributes:
        t: their time.
        x: state (K, *D).
        v: velocity there (K, *D), paid for; zero at t = 0, where none is needed.
        x0: posterior mean of the data (K, *D); x itself at t = 0.
        reward: look-ahead reward r(x0) (K,); nan until scored.
        logw: log weight (K,), for methods that weigh.
        parent: row, among the particles this step began with, that each descends from (K,), int64, through however
            many proposals and choices; among the initial draws at the start.
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
        moved = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("t", "carry")}
        return Particles(t=self.t, carry={k: c[rows] for k, c in self.carry.items()}, **moved)

    def best(self) -> Particles:
        """The one row of highest reward, the first among equals."""
        return self[self.reward.argmax().view(1)]

    @staticmethod
    def cat(parts: Sequence[Particles]) -> Particles:
        """Particles of one common time in one batch.

        Raises:
            ValueError: no parts, or times differ.
        """
        if len({p.t for p in parts}) != 1:
            raise ValueError(f"only particles of one time can be joined; got times {[p.t for p in parts]}")
        joined = {
            f.name: torch.cat([getattr(p, f.name) for p in parts])
            for f in fields(Particles)
            if f.name not in ("t", "carry")
        }
        carry = {k: torch.cat([p.carry[k] for p in parts]) for k in parts[0].carry}
        return Particles(t=parts[0].t, carry=carry, **joined)


class Step(NamedTuple):
    """What one step did; light, so that a trace's size does not depend on the budget.

    Attributes:
        t: time of the particles kept.
        nfe, reward_calls: spent so far, this step included.
        drawn: particles drawn in this step, at every time it visited.
        best, mean: of the rewards scored in this step; nan if none was.
        kept: number of particles kept.
        accepted: reward of the best particle kept; nan if not scored.
        parent: that particle's parent row.
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
        best: the finished sample (*D), at t = 0, of highest reward.
        reward: its own reward.
        seen: the best posterior mean scored anywhere in the search (*D); kept for every method alike.
        seen_reward, seen_time: its reward (at least `reward`) and the time it was looked ahead from.
        nfe, reward_calls: spent; reward calls in rows.
        gradients: of the reward through the velocity, in rows; paid for within nfe, each with a reward call.
        left: NFE not spent.
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


class Method(Protocol):
    """Hyperparameters of a search, as a frozen dataclass with three functions."""

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError, before anything is evaluated, if this problem cannot be finished within max_nfe."""

    def start(self, run: Run) -> Particles:
        """The first particles, at the schedule's first time."""
        ...

    def advance(self, p: Particles, run: Run) -> Particles:
        """The next particles; the search ends when their time is 0."""
        ...


class BudgetExceeded(RuntimeError):
    """A method asked for more evaluations than are left, which its `check` should have ruled out."""


class Run:
    """The state of one search: what was spent, what was seen, and the only source of noise."""

    def __init__(self, problem: Problem, *, max_nfe: int, generator: Generator):
        self.problem, self.max_nfe, self.generator = problem, max_nfe, generator
        self.nfe = 0
        self.reward_calls = 0
        self.gradients = 0
        self.trace: list[Step] = []
        self.seen: tuple[Tensor, float, float] | None = None
        """Best posterior mean scored so far: x0 (*D), its reward, its time."""
        self._drawn = 0
        self._scored: list[Tensor] = []
        self._watched = False

    @property
    def left(self) -> int:
        """NFE left."""
        return self.max_nfe - self.nfe

    @property
    def evaluations_left(self) -> int:
        """Evaluations that the NFE left will pay for."""
        return self.left // self.problem.cost

    @property
    def transitions(self) -> int:
        """Intervals of the schedule."""
        return len(self.problem.times) - 1

    def evaluations_ahead(self, t: float | None = None) -> int:
        """`Problem.evaluations_ahead`."""
        return self.problem.evaluations_ahead(t)

    def next_time(self, t: float) -> float:
        """The first time of the schedule below t.

        Raises:
            ValueError: t is 0, where the sample is finished.
        """
        if t <= 0:
            raise ValueError("there is no time below 0, where the sample is finished")
        return next(s for s in self.problem.times if s < t)

    def noise(self, k: int) -> Tensor:
        """k draws (k, *D) of noise sigma_t z at the schedule's first time; free.

        Where the path still holds a trace of the data at that time (sigma/alpha large but finite) it is neglected.
        """
        self._refuse_if_watched()
        return self.problem.path.at(self.problem.times[0])[1] * self._noise((k, *self.problem.shape))

    def start(self, k: int, x: Tensor | None = None) -> Particles:
        """k particles at the schedule's first time, of fresh noise or at the states x (k, *D) given; k evaluations.

        Raises:
            ValueError: x is not of shape (k, *D).
        """
        self._refuse_if_watched()
        x = self.noise(k) if x is None else x
        if x.shape != (k, *self.problem.shape):
            raise ValueError(f"x must have shape {(k, *self.problem.shape)}; got {tuple(x.shape)}")
        return self._at(self.problem.times[0], x, torch.arange(k, device=x.device), x.new_zeros(k), {})

    def transition(self, p: Particles, *, s: float | None = None, kernel: Kernel | None = None) -> tuple[Tensor, float]:
        """(mean (K, *D), std) of the law that `propose` draws from; free."""
        s = self.next_time(p.t) if s is None else s
        return (kernel or self.problem.kernel)(self.problem.path, p.x, p.v, p.t, s)

    def propose(
        self, p: Particles, copies: int = 1, *, s: float | None = None, kernel: Kernel | None = None
    ) -> Particles:
        """`copies` children of every particle, those of one parent side by side; an evaluation each, none at s = 0.

        Args:
            s: the time to go to; the schedule's next by default.
            kernel: how; the problem's by default.
        """
        self._refuse_if_watched()
        s = self.next_time(p.t) if s is None else s
        mean, std = self.transition(p, s=s, kernel=kernel)
        rows = torch.arange(len(p), device=p.x.device).repeat_interleave(copies)
        x = mean[rows]
        x = x + std * self._noise(x.shape) if std > 0 else x
        return self._at(s, x, p.parent[rows], p.logw[rows], {name: c[rows] for name, c in p.carry.items()})

    def score(self, p: Particles) -> Particles:
        """The particles with their look-ahead rewards r(x0); those that have theirs are not judged again.

        Raises:
            ValueError: the reward's answer is not a finite tensor of shape (K,).
        """
        new = p.reward.isnan()
        if not new.any():
            return p
        self._refuse_if_watched()
        if new.all():
            return replace(p, reward=self._judge(p.x0, p.t))
        return replace(p, reward=p.reward.masked_scatter(new, self._judge(p.x0[new], p.t)))

    def gradient(self, p: Particles) -> Tensor:
        """Gradient in x (K, *D) of the look-ahead reward r(x0(x)), through the velocity, at the particles' states.

        Each row costs `Problem.gradient_cost` evaluations and a reward call: the velocity that the particles already
        hold was computed without a graph, so it is computed again.

        Raises:
            ValueError: p is finished; the velocity or the reward is not differentiable, or the gradient not finite.
        """
        self._refuse_if_watched()
        if p.t == 0:
            raise ValueError("a finished sample has no velocity to differentiate")
        self._charge(len(p) * self.problem.gradient_cost)
        self.gradients += len(p)
        return torch.cat([self._uphill(x, p.t) for x in p.x.split(self.problem.gradient_chunk or len(p))])

    def _uphill(self, x: Tensor, t: float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v, x0 = self._look_ahead(x, t)
            try:
                r = self._judge(x0, t)
            except RuntimeError as error:
                if "grad" not in str(error):
                    raise
                raise ValueError(f"the reward is not differentiable: {error}") from error  # numpy refuses such tensors
            for name, value in (("velocity", v), ("reward", r)):
                if not value.requires_grad:
                    raise ValueError(f"the {name} is not differentiable: no_grad or detach cuts its answer off")
            (grad,) = torch.autograd.grad(r.sum(), x)
        if not grad.isfinite().all():
            raise ValueError(f"the gradient of the look-ahead reward is not finite at t = {t:g}")
        return grad

    def _judge(self, x0: Tensor, t: float) -> Tensor:
        """Rewards (K,) of posterior means, counted and noted: the one place that calls the reward."""
        r = self.problem.reward(x0)
        if not isinstance(r, Tensor) or r.shape != (len(x0),):
            got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
            raise ValueError(f"reward must return a tensor of shape ({len(x0)},), one number a row; got {got}")
        r = r.to(x0)
        if not r.isfinite().all():
            raise ValueError(f"reward must be finite; row {int((~r.isfinite()).nonzero()[0])} at t = {t:g} is not")
        self.reward_calls += len(x0)
        known = r.detach()
        self._scored.append(known)
        i = int(known.argmax())
        if self.seen is None or float(known[i]) > self.seen[1]:
            self.seen = x0[i].detach().clone(), float(known[i]), t  # cloned, so as not to hold the whole batch
        return r

    def _look_ahead(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity and posterior mean, each (K, *D): the one place that evaluates the model."""
        tt = x.new_full((len(x),), t)
        v = self.problem.velocity(x, tt)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"velocity must return a tensor of its input's shape {tuple(x.shape)}; got {got}")
        v = v.to(x.dtype)
        if not v.isfinite().all():
            raise ValueError(f"velocity must be finite; at t = {float(tt[0]):g} it is not in every row")
        return v, self.problem.path.endpoints(x, v, tt)[0]

    def _charge(self, evaluations: int) -> None:
        price = evaluations * self.problem.cost
        if price > self.left:
            raise BudgetExceeded(f"{evaluations} evaluations cost {price} NFE; {self.left} of {self.max_nfe} are left")
        self.nfe += price

    def _noise(self, shape: Sequence[int]) -> Tensor:
        z = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=self.problem.dtype)
        return z.to(self.problem.device)

    def _at(self, t: float, x: Tensor, parent: Tensor, logw: Tensor, carry: dict[str, Tensor]) -> Particles:
        """Particles at a new state, their velocity paid for."""
        self._drawn += len(x)
        unscored = x.new_full((len(x),), math.nan)
        if t == 0:
            return Particles(t, x, torch.zeros_like(x), x, unscored, logw, parent, carry)
        self._charge(len(x))
        return Particles(t, x, *self._look_ahead(x, t), unscored, logw, parent, carry)

    def _record(self, p: Particles) -> None:
        scored = torch.cat(self._scored) if self._scored else p.reward.new_full((1,), math.nan)
        top = p.best()
        self.trace.append(
            Step(
                t=p.t,
                nfe=self.nfe,
                reward_calls=self.reward_calls,
                drawn=self._drawn,
                best=float(scored.max()),
                mean=float(scored.mean()),
                kept=len(p),
                accepted=float(top.reward),
                parent=int(top.parent),
            )
        )
        self._drawn, self._scored = 0, []

    def _show(self, p: Particles, on_step: OnStep) -> None:
        """Calls the watcher with copies and leaves the noise where it was, so that it cannot change the result."""
        noise = self.generator.get_state()
        self._watched = True
        try:
            on_step(p[torch.arange(len(p), device=p.x.device)], self)
        finally:
            self._watched = False
            self.generator.set_state(noise)

    def _refuse_if_watched(self) -> None:
        if self._watched:
            raise RuntimeError("on_step may look at the run but not draw, evaluate or score with it")


OnStep = Callable[[Particles, Run], None]


@torch.no_grad()
def search(
    problem: Problem,
    method: Method,
    *,
    max_nfe: int,
    generator: Generator,
    on_step: OnStep | None = None,
) -> Result:
    """Runs a method on a problem and returns the best finished sample with an account of what was spent.

    Args:
        max_nfe: the budget; never exceeded.
        generator: the only source of randomness, on any device. Same seed, same result, however the velocity splits
            its batches.
        on_step: called with the particles kept and the run after the start and after every step, read-only: for
            progress bars, plots and logs.

    Raises:
        ValueError: before any evaluation if max_nfe is no positive integer or too small for the method; during the
            search if the velocity or the reward breaks its contract.
    """
    if isinstance(max_nfe, bool) or not isinstance(max_nfe, int) or max_nfe < 1:
        raise ValueError(f"max_nfe must be an integer of at least 1; got {max_nfe!r}")
    if not isinstance(generator, Generator):
        raise ValueError(f"generator must be a torch.Generator, seeded by the caller; got {type(generator).__name__}")
    method.check(problem, max_nfe)
    run = Run(problem, max_nfe=max_nfe, generator=generator)
    p = method.start(run)
    while True:
        p = run.score(p) if p.t == 0 else p
        run._record(p)
        if on_step is not None:
            run._show(p, on_step)
        if p.t == 0:
            break
        p = method.advance(replace(p, parent=torch.arange(len(p), device=p.x.device)), run)
    top = p.best()
    assert run.seen is not None
    return Result(
        best=top.x[0],
        reward=float(top.reward),
        seen=run.seen[0],
        seen_reward=run.seen[1],
        seen_time=run.seen[2],
        nfe=run.nfe,
        reward_calls=run.reward_calls,
        gradients=run.gradients,
        left=run.left,
        trace=tuple(run.trace),
        particles=p,
    )
