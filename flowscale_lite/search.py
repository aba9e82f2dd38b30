"""One loop for every method.

A `Problem` says what is sampled and what is wanted. A `Method` says how many candidates to draw and which to keep. The
`Run` between them owns the budget, the clock and the randomness. A method never holds the velocity itself, so it can
neither forget to pay nor overspend. The budget is in NFE: velocity evaluations, one a row of a batch, times their cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from .kernels import Kernel
from .look_ahead import LookAhead
from .problem import PARTICLE_TENSORS, Particles, Problem, Result, Step


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
        self._scored: list[Tensor] = []  # rewards of this step

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
        return (kernel or self.problem.kernel)(self.problem.path, p.x.clone(), p.v.clone(), p.t, s)

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
        v, x0 = self._evaluated(p.x, p.t)
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
            x0 = ahead.estimate(self._velocity, p.x.clone(), p.v.clone(), p.t)
            p = replace(p, x0=_own("look-ahead", x0, p.x, p.t))
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
                v, x0 = self._evaluated(x, t)
            if ahead.estimate is not None:
                x0 = _own("look-ahead", ahead.estimate(self._velocity, x.clone(), v.clone(), t), x, t)
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
        r = self.problem.reward(x0.clone())
        if not isinstance(r, Tensor) or r.shape != (len(x0),):
            got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
            raise ValueError(f"reward must return a tensor of shape ({len(x0)},), one number a row; got {got}")
        r = r.to(x0, copy=True)
        if not r.isfinite().all():
            raise ValueError(f"reward must be finite; row {int((~r.isfinite()).nonzero()[0])} at t = {t:g} is not")
        self.reward_calls += len(x0)
        known = r.detach()
        self._scored.append(known)
        i = int(known.argmax())
        if self.seen is None or float(known[i]) > self.seen[1]:
            self.seen = x0[i].detach().clone(), float(known[i]), t  # cloned, so as not to hold the whole batch
        return r

    def _evaluated(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity and posterior mean, each (K, *D)."""
        times = x.new_full((len(x),), t)
        v = self._velocity(x, times)
        return v, self.problem.path.endpoints(x, v, times)[0]

    def _velocity(self, x: Tensor, times: Tensor) -> Tensor:
        """The model's velocity (K, *D), checked."""
        return _own("velocity", self.problem.velocity(x.clone(), times.clone()), x, float(times[0]))

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


def _own(name: str, answer: Any, x: Tensor, t: float) -> Tensor:
    """A copy of what a model answered for the states x (K, *D) at time t.

    Whoever is asked is given copies, and what it answers is copied: it may edit its input and use its output again.
    Raises ValueError: the answer has another shape, or is not finite.
    """
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"{name} must return a tensor of its input's shape {tuple(x.shape)}; got {got}")
    answer = answer.to(x.dtype, copy=True)
    if not answer.isfinite().all():
        raise ValueError(f"{name} must be finite; at t = {t:g} it is not in every row")
    return answer


class Search(Iterator[Step]):
    """A search in progress: every `next` is one step of the method, and returns its record.

    `particles` are those kept by the last step, None before the first. Whoever steps the search may look at them, and
    may put a choice of them in their place. `run` knows what has been spent and seen, `trace` holds the records.

    A step that fails or is interrupted raises. `so_far` then has the best so far, and the next `next` takes the step
    again as if it had not been tried: what the failed try spent is counted until then.
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
        self._open: dict[str, Tensor] | None = None  # the state before a step that has not ended

    @torch.no_grad()
    def __next__(self) -> Step:
        if self._open is not None:
            self.restore(self._open)
        p = self.particles
        if p is not None and p.t == 0:
            raise StopIteration
        self._open = self.state()
        if p is None:
            p = self.method.start(self.run)
        else:
            p = self.method.advance(replace(p, parent=torch.arange(len(p), device=p.x.device)), self.run)
        self.particles = self.run.score(p) if p.t == 0 else p
        self.trace.append(self.run.record(self.particles))
        self._open = None
        return self.trace[-1]

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs to go on after the last step that ended, as tensors, the generator's included."""
        if self._open is not None:
            return self._open
        p, run, double = self.particles, self.run, torch.float64
        state = {"generator": run.generator.get_state(), "trace": torch.tensor(self.trace, dtype=double)}
        state["spent"] = torch.tensor([run.nfe, run.reward_calls, run.gradients])
        if run.seen is not None:
            state |= {"seen": run.seen[0], "seen.numbers": torch.tensor(run.seen[1:], dtype=double)}
        if p is not None:
            state |= {"t": torch.tensor(p.t, dtype=double)} | {name: getattr(p, name) for name in PARTICLE_TENSORS}
            state |= {f"carry.{name}": value for name, value in p.carry.items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of a search of the same problem, method and budget, to the same result."""
        run, device = self.run, self.run.problem.device
        run.generator.set_state(state["generator"].cpu())
        run.nfe, run.reward_calls, run.gradients = state["spent"].tolist()
        run.seen, run._drawn, run._scored = None, 0, []
        self.particles = self._open = None
        self.trace = []
        for t, nfe, calls, drawn, best, mean, kept, accepted, parent in state["trace"].tolist():
            counts = int(nfe), int(calls), int(drawn)
            self.trace.append(Step(t, *counts, best, mean, int(kept), accepted, int(parent)))
        if "seen" in state:
            reward, t = state["seen.numbers"].tolist()
            run.seen = state["seen"].to(device), reward, t
        if "x" in state:
            tensors = {name: state[name].to(device) for name in PARTICLE_TENSORS}
            carry = {name[6:]: value.to(device) for name, value in state.items() if name.startswith("carry.")}
            self.particles = Particles(float(state["t"]), carry=carry, **tensors)

    def so_far(self) -> Result:
        """`result`; before the end, of the best estimate judged so far, taken as the sample, and what was spent so far.

        Raises ValueError: nothing has been judged yet.
        """
        run, p = self.run, self.particles
        if run.seen is None:
            raise ValueError("nothing has been judged yet")
        if p is None or p.t > 0:
            x, zero = run.seen[0][None], run.seen[0].new_zeros(1)
            p = Particles(0.0, x, torch.zeros_like(x), x, zero + run.seen[1], zero, zero.long())
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

    def result(self) -> Result:
        """The best finished sample, with the account of what was spent; a ValueError if the search has steps left."""
        if self.particles is None or self.particles.t > 0:
            raise ValueError("the search is not finished: step it until its particles are at t = 0")
        return self.so_far()


def steps(problem: Problem, method: Method, *, max_nfe: int, generator: Generator) -> Search:
    """The search as an iterator of its steps: for progress bars, films, a person who chooses, and pauses.

    The budget `max_nfe` is never exceeded. `generator` is the only source of randomness: the same seed gives the same
    result, however the velocity splits its batches.

    Raises ValueError: before any evaluation if max_nfe is no positive integer or too small for the method; during the
    search if the velocity or the reward breaks its contract.
    """
    return Search(problem, method, max_nfe=max_nfe, generator=generator)


def search(problem: Problem, method: Method, *, max_nfe: int, generator: Generator) -> Result:
    """Runs a method on a problem to the end; arguments and errors are those of `steps`.

    If it may fail or be interrupted, loop over `steps` instead: what was found until then is in its `so_far()`.
    """
    found = steps(problem, method, max_nfe=max_nfe, generator=generator)
    for _ in found:
        pass
    return found.result()
