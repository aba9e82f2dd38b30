"""Rollover Budget Forcing (arXiv 2503.19385)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..search import Particles, Problem, Run


@dataclass(frozen=True)
class RBF:
    """Splits the budget into equal quotas, a transition each; what a transition does not need rolls over to the next.

    At every transition candidates are drawn from the one accepted state. The first whose look-ahead reward beats the
    record, the best accepted so far, is taken at once. If the quota is spent without one, the best candidate of the
    transition is taken. The step to t = 0 needs no velocity and is free, so a schedule of N intervals has N - 1
    transitions to pay for; the quotas are the budget after the initial draws divided among those, remainder included.

    Attributes:
        init: initial noises of each chain, of which the best by look-ahead reward is kept.
        accept: "first" is the paper's rule. "best" spends every quota and takes the best candidate: slower to
            commit, and stronger where the reward is so smooth that almost any draw improves on the record.
        batch: candidates drawn and evaluated at a time. The first in order that beats the record is taken, and every
            row evaluated is charged, so up to batch - 1 of them are speculation. 1 wastes none.
        rollover: False drops what a quota leaves (for comparison).
        chains: searches that share the budget equally; the best finished sample is returned.
        compete: False keeps the chains independent. True (with accept="best") draws alike from the states of all
            chains and keeps the best candidates whosever they are: a beam search, which forgives an early mistake.
        select_below: time from which candidates are selected; above it one a chain is drawn and none refused. The look-
            ahead of a multi-step model says nothing near t = 1, and selection there wastes the budget.
        spend_all: at the last paid transition spend all that is left, and keep the best, even with accept="first":
            there is nothing later to save for. False reports it as left.

    Raises:
        ValueError: a field is out of range.
    """

    init: int = 8
    accept: Literal["first", "best"] = "first"
    batch: int = 8
    rollover: bool = True
    chains: int = 1
    compete: bool = False
    select_below: float = 1.0
    spend_all: bool = True

    def __post_init__(self) -> None:
        for name in ("init", "batch", "chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.accept not in ("first", "best"):
            raise ValueError(f'accept must be "first" or "best"; got {self.accept!r}')
        if self.compete and (self.accept == "first" or not self.rollover):
            raise ValueError('chains compete only with accept="best", for all candidates at once, and with rollover')
        if not 0 < self.select_below <= 1:
            raise ValueError(f"select_below must lie in (0, 1]; got {self.select_below}")

    @classmethod
    def multi_step(cls, max_nfe: int) -> RBF:
        """Settings for a model that needs many steps, found on tiny-flux dev: chains that compete, one for about every
        32 NFE, and selection from t = 0.8 on; to be used with `schedules.logit_normal`, which has its steps there."""
        return cls(init=1, accept="best", chains=max(2, max_nfe // 32), compete=True, select_below=0.8)

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if a chain cannot pay for its draws and every transition, or if all candidates coincide."""
        least = problem.cost * self.chains * (self.init + problem.paid())
        if max_nfe < least:
            raise ValueError(
                f"{self.chains} chain(s) of {self.init} initial draws and one candidate at each of "
                f"{problem.paid()} transitions need max_nfe >= {least}; got {max_nfe}"
            )
        if problem.paid() and not self._selecting(problem):
            raise ValueError(
                f"no transition lands at select_below = {self.select_below} or below; times {problem.times}"
            )
        if not problem.kernel.stochastic:
            raise ValueError(
                f"under the deterministic kernel {problem.kernel.name!r} all candidates coincide; "
                "use a stochastic one, such as sde(...) or gaussian(1.0)"
            )

    def start(self, run: Run) -> Particles:
        """The best of the initial draws of every chain; its reward is the first record."""
        share = torch.tensor([(run.rows_left + i) // self.chains for i in range(self.chains)])  # sums to rows_left
        p = run.score(run.start(self.chains * self.init))
        best = p.reward.view(self.chains, self.init).argmax(1)
        p = p[best + self.init * torch.arange(self.chains, device=best.device)]
        rows = (share - self.init - run.paid() + self._selecting(run.problem)).to(p.x.device)
        return replace(p, carry={"record": p.reward, "rows": rows, "left": rows})

    def advance(self, p: Particles, run: Run) -> Particles:
        """One accepted candidate for every chain."""
        if run.paid(p.t) == 0:
            return run.propose(p)
        if run.next_time(p.t) > self.select_below:
            return run.score(run.propose(p))
        if self.compete:
            return self._accept_together(p, run)
        q = Particles.cat([self._accept(p[i : i + 1], run) for i in range(len(p))])
        return replace(q, parent=torch.arange(len(q), device=q.x.device))

    def _selecting(self, problem: Problem) -> int:
        """Paid transitions in which candidates are selected."""
        return sum(0 < s <= self.select_below for s in problem.times[1:])

    def _accept(self, p: Particles, run: Run) -> Particles:
        record, rows, left = float(p.carry["record"]), int(p.carry["rows"]), int(p.carry["left"])
        ahead, total = run.paid(p.t), self._selecting(run.problem)
        reserved = rows * (ahead - 1) // total  # for the transitions after this one
        quota = (left if self.rollover else rows * ahead // total) - reserved
        exhaust = self.accept == "best" or (self.spend_all and ahead == 1)
        best: Particles | None = None
        used = 0
        while used < quota:
            q = run.score(run.propose(p, min(self.batch, quota - used)))
            used += len(q)
            better = (q.reward > record).nonzero()[:1, 0]
            if len(better) and not exhaust:
                best = q[better]
                break
            if best is None or q.reward.max() > best.reward:
                best = q.best()
        assert best is not None
        return replace(best, carry={**p.carry, "record": best.reward.clamp_min(record), "left": p.carry["left"] - used})

    def _accept_together(self, p: Particles, run: Run) -> Particles:
        """The best candidates of all chains' quotas; what a quota cannot share out alike rolls over."""
        rows, left = int(p.carry["rows"].sum()), int(p.carry["left"].sum())
        ahead, total = run.paid(p.t), self._selecting(run.problem)
        copies = (left - rows * (ahead - 1) // total) // self.chains
        q = run.score(run.propose(p, copies))
        best = q[q.reward.topk(self.chains).indices]
        after = torch.tensor([(left - len(q) + i) // self.chains for i in range(self.chains)], device=p.x.device)
        return replace(best, carry={**p.carry, "record": best.reward, "left": after})
