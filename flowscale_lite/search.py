"""One loop for every method.

A `Problem` says what is sampled and what is wanted. A `Method` says how many candidates to draw and which to keep. The
`Run` between them owns the budget, the clock and the randomness. A method never holds the velocity itself, so it can
neither forget to pay nor overspend. The budget is in NFE: velocity evaluations, one a row of a batch, times their cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Generator, Tensor

from .kernels import Kernel
from .look_ahead import LookAhead
from .problem import Particles, Problem, Result, Step


class Method(Protocol):
    """Hyperparameters of a search, as a frozen dataclass with three functions."""

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError, before anything is evaluated, if this problem cannot be finished within max_nfe."""

    def start(self, run: Run) -> Particles:
        """The first particles, at the schedule's first time."""
        raise NotImplementedError

    def advance(self, p: Particles, run: Run) -> Particles:
        """The next particles; the search ends when their time is 0."""
        raise NotImplementedError


class BudgetExceeded(RuntimeError):
    """A method asked for more evaluations than are left, which its `check` should have ruled out."""


class Run:
    """What one search has spent and seen, and its only source of noise. A method draws and looks ahead through it."""

    def __init__(self, problem: Problem, *, max_nfe: int, generator: Generator):
        self.problem, self.max_nfe, self.generator = problem, max_nfe, generator
        self.nfe = self.reward_calls = self.gradients = 0
        self.seen: tuple[Tensor, float, float] | None = None  # best estimate scored: x0 (*D), its reward, its time
        self._drawn = 0
        self._scored: list[Tensor] = []

    @property
    def left(self) -> int:
        """NFE left."""
        return self.max_nfe - self.nfe

    @property
    def evaluations_left(self) -> int:
        """Evaluations that the NFE left pay for."""
        return self.left // self.problem.cost

    def next_time(self, t: float) -> float:
        """The first time of the schedule below t; a ValueError at t = 0, where the sample is finished."""
        if t <= 0:
            raise ValueError("there is no time below 0, where the sample is finished")
        return next(s for s in self.problem.times if s < t)

    def noise(self, k: int) -> Tensor:
        """k draws (k, *D) of noise sigma_t z at the schedule's first time, where the trace of the data is neglected."""
        return self.problem.path.at(self.problem.times[0])[1] * self._normal((k, *self.problem.shape))

    def start(self, k: int, x: Tensor | None = None) -> Particles:
        """k particles at the schedule's first time, of fresh noise or at the states x (k, *D); not yet evaluated."""
        x = self.noise(k) if x is None else x
        if x.shape != (k, *self.problem.shape):
            raise ValueError(f"x must have shape {(k, *self.problem.shape)}; got {tuple(x.shape)}")
        return self._at(self.problem.times[0], x, torch.arange(k, device=x.device), x.new_zeros(k), {})

    def transition(self, p: Particles, *, s: float | None = None, kernel: Kernel | None = None) -> tuple[Tensor, float]:
        """(mean (K, *D), std) of the law that `propose` draws from, for particles that are evaluated; free."""
        s = self.next_time(p.t) if s is None else s
        return (kernel or self.problem.kernel)(self.problem.path, p.x, p.v, p.t, s)

    def propose(
        self, p: Particles, copies: int = 1, *, s: float | None = None, kernel: Kernel | None = None
    ) -> Particles:
        """`copies` children of every particle, those of one parent side by side; parents are evaluated, children not.

        They are at time s, the schedule's next by default, by the kernel given or the problem's.
        """
        s = self.next_time(p.t) if s is None else s
        p = self.evaluate(p)
        mean, std = self.transition(p, s=s, kernel=kernel)
        rows = torch.arange(len(p), device=p.x.device).repeat_interleave(copies)
        x = mean[rows]
        x = x + std * self._normal(x.shape) if std > 0 else x
        return self._at(s, x, p.parent[rows], p.logw[rows], {name: c[rows] for name, c in p.carry.items()})

    def place(self, p: Particles, x: Tensor, s: float) -> Particles:
        """Descendants of the particles p at the states x (K, *D) and time s, not yet evaluated; free."""
        return self._at(s, x, p.parent, p.logw, p.carry)

    def evaluate(self, p: Particles) -> Particles:
        """The particles with their velocity and posterior mean: one evaluation for each row that lacks them."""
        new = p.v.reshape(len(p), -1)[:, 0].isnan()
        missing = int(new.sum())
        if missing == 0:
            return p
        if missing < len(p):
            return p.put(new, self.evaluate(p[new]))
        self._charge(len(p))
        v, x0 = self._velocity(p.x, p.t)
        return replace(p, v=v, x0=x0)

    def score(self, p: Particles, look_ahead: LookAhead | None = None) -> Particles:
        """The particles with their look-ahead rewards r(x0); those that have theirs are not judged again.

        The look-ahead is the problem's unless another is given. Each row costs its price, less the evaluation if it is
        evaluated already. Finished samples are judged as they are.
        Raises ValueError: the reward's answer is not a finite tensor of shape (K,).
        """
        new = p.reward.isnan()
        missing = int(new.sum())
        if missing == 0:
            return p
        if missing < len(p):
            return p.put(new, self.score(p[new], look_ahead))
        ahead = look_ahead or self.problem.look_ahead
        if p.t > 0 and ahead.evaluates:
            p = self.evaluate(p)
        if p.t > 0 and ahead.estimate is not None:
            self._charge(len(p) * (ahead.price - ahead.evaluates))
            p = replace(p, x0=ahead.estimate(self.problem.velocity, p.x, p.v, p.t))
        return replace(p, reward=self._judge(p.x0, p.t))

    def gradient(self, p: Particles) -> Tensor:
        """Gradient in x (K, *D) of the look-ahead reward r(x0(x)), through the models, at the particles' states.

        Each row costs `Problem.gradient_cost` times the look-ahead's price, and a reward call: what the particles hold
        was computed without a graph, so it is computed again.
        Raises ValueError: p is finished; a model or the reward is not differentiable, or the gradient not finite.
        """
        if p.t == 0:
            raise ValueError("a finished sample has no velocity to differentiate")
        self._charge(len(p) * self.problem.gradient_cost * self.problem.look_ahead.price)
        self.gradients += len(p)
        return torch.cat([self._uphill(x, p.t) for x in p.x.split(self.problem.gradient_chunk or len(p))])

    def _uphill(self, x: Tensor, t: float) -> Tensor:
        ahead = self.problem.look_ahead
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = x0 = torch.full_like(x, math.nan)
            if ahead.evaluates:
                v, x0 = self._velocity(x, t)
            if ahead.estimate is not None:
                x0 = ahead.estimate(self.problem.velocity, x, v, t)
            try:
                r = self._judge(x0, t)
            except RuntimeError as error:
                if "grad" not in str(error):
                    raise
                raise ValueError(f"the reward is not differentiable: {error}") from error  # numpy refuses such tensors
            # The posterior mean depends on x by itself as well, so it is the velocity that is asked.
            for name, value in (("velocity", v if ahead.evaluates else x0), ("reward", r)):
                if not value.requires_grad:
                    raise ValueError(f"the {name} is not differentiable: no_grad or detach cuts its answer off")
            (grad,) = torch.autograd.grad(r.sum(), x)
        if not grad.isfinite().all():
            raise ValueError(f"the gradient of the look-ahead reward is not finite at t = {t:g}")
        return grad

    def _judge(self, x0: Tensor, t: float) -> Tensor:
        """Rewards (K,) of estimates, counted and noted: the one place that calls the reward."""
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

    def _velocity(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity and posterior mean, each (K, *D)."""
        times = x.new_full((len(x),), t)
        v = self.problem.velocity(x, times)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"velocity must return a tensor of its input's shape {tuple(x.shape)}; got {got}")
        v = v.to(x.dtype)
        if not v.isfinite().all():
            raise ValueError(f"velocity must be finite; at t = {t:g} it is not in every row")
        return v, self.problem.path.endpoints(x, v, times)[0]

    def _charge(self, evaluations: int) -> None:
        price = evaluations * self.problem.cost
        if price > self.left:
            raise BudgetExceeded(f"{evaluations} evaluations cost {price} NFE; {self.left} of {self.max_nfe} are left")
        self.nfe += price

    def _normal(self, shape: Sequence[int]) -> Tensor:
        z = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=self.problem.dtype)
        return z.to(self.problem.device)

    def _at(self, t: float, x: Tensor, parent: Tensor, logw: Tensor, carry: dict[str, Tensor]) -> Particles:
        """Particles at new states."""
        self._drawn += len(x)
        unknown = torch.full_like(x, math.nan)
        v, x0 = (unknown, unknown) if t > 0 else (torch.zeros_like(x), x)
        return Particles(t, x, v, x0, x.new_full((len(x),), math.nan), logw, parent, carry)

    def record(self, p: Particles) -> Step:
        """What the step that ends with the particles p did; the next step's record begins here."""
        scored = torch.cat(self._scored) if self._scored else p.reward.new_full((1,), math.nan)
        top, spent = p.best(), (self.nfe, self.reward_calls, self._drawn)
        self._drawn, self._scored = 0, []
        return Step(p.t, *spent, float(scored.max()), float(scored.mean()), len(p), float(top.reward), int(top.parent))


class Search(Iterator[Step]):
    """A search in progress: every `next` is one step of the method, and returns its record.

    `particles` are those kept by the last step, None before the first. Whoever steps the search may look at them, and
    may put a choice of them in their place. `run` knows what has been spent and seen, `trace` holds the records.
    """

    def __init__(self, problem: Problem, method: Method, *, max_nfe: int, generator: Generator):
        if isinstance(max_nfe, bool) or not isinstance(max_nfe, int) or max_nfe < 1:
            raise ValueError(f"max_nfe must be an integer of at least 1; got {max_nfe!r}")
        if not isinstance(generator, Generator):
            raise ValueError(f"generator must be a seeded torch.Generator; got {type(generator).__name__}")
        method.check(problem, max_nfe)
        self.run, self.method = Run(problem, max_nfe=max_nfe, generator=generator), method
        self.particles: Particles | None = None
        self.trace: list[Step] = []

    @torch.no_grad()
    def __next__(self) -> Step:
        p = self.particles
        if p is None:
            p = self.method.start(self.run)
        elif p.t == 0:
            raise StopIteration
        else:
            p = self.method.advance(replace(p, parent=torch.arange(len(p), device=p.x.device)), self.run)
        self.particles = self.run.score(p) if p.t == 0 else p
        self.trace.append(self.run.record(self.particles))
        return self.trace[-1]

    def result(self) -> Result:
        """The best finished sample, with the account of what was spent; a ValueError if the search has steps left."""
        p, run = self.particles, self.run
        if p is None or p.t > 0 or run.seen is None:
            raise ValueError("the search is not finished: step it until its particles are at t = 0")
        top = p.best()
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
            trace=tuple(self.trace),
            particles=p,
        )


def steps(problem: Problem, method: Method, *, max_nfe: int, generator: Generator) -> Search:
    """The search as an iterator of its steps: for progress bars, films, a person who chooses, and pauses.

    The budget `max_nfe` is never exceeded. `generator` is the only source of randomness: the same seed gives the same
    result, however the velocity splits its batches.

    Raises ValueError: before any evaluation if max_nfe is no positive integer or too small for the method; during the
    search if the velocity or the reward breaks its contract.
    """
    return Search(problem, method, max_nfe=max_nfe, generator=generator)


def search(problem: Problem, method: Method, *, max_nfe: int, generator: Generator) -> Result:
    """Runs a method on a problem to the end; arguments and errors are those of `steps`."""
    found = steps(problem, method, max_nfe=max_nfe, generator=generator)
    for _ in found:
        pass
    return found.result()
