"""Rollover Budget Forcing (arXiv 2503.19385)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from ..search import Particles, Problem, Run
from ._common import best_of_each, require_budget, require_noise, require_positive
from .gradient import Guide, guide_price


@dataclass(frozen=True)
class RBF:
    """Splits the budget into equal quotas, a transition each; what a transition does not need rolls over to the next.

    At every transition candidates are drawn from the one accepted state, and judged by their look-ahead reward. The
    paper's rule, `RBF.published`, takes the first that beats the record, the best accepted so far, and if the quota is
    spent without one the best candidate of the transition. Where the reward is smooth almost any draw beats the record,
    and the first one is a poor choice. So the default takes the best of the quota, and what rolls over is whatever a
    transition has beyond `enough` candidates: the best of n grows but slowly with n, and the noise of the next
    transition covers most of what it gains. Nothing covers it after the last one, and little a few before. So of a
    quota, min(quota, max(enough, left / 4^(a - 1))) are drawn where a transitions are ahead, this one included.

    The step to t = 0 needs no velocity and is free, so a schedule of N intervals has N - 1 transitions to pay for; the
    quotas are the budget after the initial draws divided among those, remainder included.

    Attributes:
        init: initial noises of each chain, of which the best by look-ahead reward is kept.
        accept: "best" of the quota; "first" to beat the record; or "reserve", our own stopping rule: stop as soon as
            the best of this transition's n draws lies so far above their mean that one more promises less than one
            more later would (see `reached`). It may overdraw its quota by half of what later ones hold.
        batch: candidates drawn and evaluated at a time. The first in order that beats the record is taken, and every
            row evaluated is charged, so up to batch - 1 of them are speculation. 1 wastes none. Chains that compete are
            drawn all at once.
        enough: with accept="best", candidates of one state that do for a transition far from the end. 24 is a balance:
            closed-form flows do better with 16 (`tools.runs.toy_table`), pictures worse (`tools.runs.results`).
        quantile: with accept="first", the record is this quantile of the rewards seen at the last transition instead.
        rollover: False drops what a quota leaves (for comparison); with accept="best" every quota is then spent.
        chains: searches that share the budget equally; the best finished sample is returned.
        compete: False keeps the chains independent. True (with accept="best") draws alike from the states of all
            chains and keeps the best candidates whosever they are: a beam search, which forgives an early mistake.
        select_below: time from which candidates are selected; above it one a chain is drawn, none refused, and the
            record stays. Near t = 1 the look-ahead of a multi-step model says nothing, and to select wastes the budget.
        spend_all: at the last paid transition spend all that is left, and keep the best, even with accept="first":
            there is nothing later to save for. False reports it as left.
        guide: steers each accepted state, once for all its candidates, by the gradient of the look-ahead reward.

    Raises:
        ValueError: a field is out of range.
    """

    init: int = 4
    accept: Literal["best", "first", "reserve"] = "best"
    batch: int = 8
    enough: int = 24
    quantile: float | None = None
    rollover: bool = True
    chains: int = 1
    compete: bool = False
    select_below: float = 1.0
    spend_all: bool = True
    guide: Guide | None = None

    def __post_init__(self) -> None:
        require_positive(self, "init", "batch", "enough", "chains")
        if self.accept not in ("best", "first", "reserve"):
            raise ValueError(f'accept must be "best", "first" or "reserve"; got {self.accept!r}')
        if self.compete and (self.accept != "best" or not self.rollover):
            raise ValueError('chains compete only with accept="best", for all candidates at once, and with rollover')
        if self.accept == "reserve" and not self.rollover:
            raise ValueError('accept="reserve" saves for later transitions, so it needs rollover')
        if not 0 < self.select_below <= 1:
            raise ValueError(f"select_below must lie in (0, 1]; got {self.select_below}")
        if self.quantile is not None and (self.accept != "first" or not 0 <= self.quantile <= 1):
            raise ValueError(f'quantile must lie in [0, 1] and goes with accept="first"; got {self.quantile}')

    @classmethod
    def published(cls, init: int = 25, chains: int = 2, batch: int = 1) -> RBF:
        """The paper's rule and settings: the first improvement, one draw at a time, two chains of 25 first noises."""
        return cls(init=init, accept="first", chains=chains, batch=batch, spend_all=False)

    @classmethod
    def multi_step(cls, max_nfe: int, steps: int = 10, cost: int = 1) -> RBF:
        """Settings for a model that needs many steps, found on tiny-flux dev in 10 steps: chains that compete, one for
        about every 32 evaluations (3 a step where steps are more), and selection from t = 0.8 on; to be used with
        `schedules.logit_normal`, which has its steps there. `cost` is the problem's: NFE of one evaluation."""
        chains = max_nfe // cost // max(32, 3 * steps)
        return cls(init=1, chains=max(2, chains), compete=True, select_below=0.8)

    @classmethod
    def few_step(cls, max_nfe: int, cost: int = 1) -> RBF:
        """Settings for a few-step model, found on tiny-flux schnell: a quarter of the budget on first noises, whose
        look-ahead already tells much, then the first improvement; to be used with the paper's VP-SDE,
        `sde(vp_diffusion())` on `paper_vp(steps, finish=1)`. `cost` is the problem's: NFE of one evaluation."""
        return cls(init=max(1, max_nfe // cost // 4), accept="first")

    def check(self, problem: Problem, max_nfe: int) -> None:
        """Raises ValueError if a chain cannot pay for its draws and every transition, or if all candidates coincide."""
        rows = self.chains * (self.init + problem.evaluations_ahead() + guide_price(self.guide, problem))
        what = f"{self.chains} chain(s) of {self.init} initial draws and one candidate at each"
        require_budget(problem, max_nfe, rows, f"{what} of {problem.evaluations_ahead()} transitions")
        if problem.evaluations_ahead() and not self._selecting(problem):
            raise ValueError(
                f"no transition lands at select_below = {self.select_below} or below; times {problem.times}"
            )
        require_noise(problem)

    def start(self, run: Run) -> Particles:
        """The best of the initial draws of every chain; their rewards set the first record."""
        spare = run.evaluations_left - self.chains * guide_price(self.guide, run.problem)
        share = torch.tensor([(spare + i) // self.chains for i in range(self.chains)])  # sums to what is spare
        p = run.score(run.start(self.chains * self.init))
        rewards = p.reward.view(self.chains, self.init)
        rows = (share - self.init - run.evaluations_ahead() + self._selecting(run.problem)).to(p.x.device)
        return replace(
            best_of_each(p, self.chains), carry={"record": self._record(rewards), "rows": rows, "left": rows}
        )

    def advance(self, p: Particles, run: Run) -> Particles:
        """One accepted candidate for every chain."""
        p = self.guide(p, run) if self.guide else p
        if run.evaluations_ahead(p.t) == 0:
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

    def _record(self, rewards: Tensor) -> Tensor:
        """What the next transition has to beat: the best of these rewards (..., n), or their quantile."""
        return rewards.amax(-1) if self.quantile is None else rewards.quantile(self.quantile, -1)

    def _needed(self, quota: int, left: int, ahead: int) -> int:
        """How many of a quota are drawn from one state, with `left` for this transition and those `ahead` of it."""
        if self.accept != "best" or not self.rollover:
            return quota
        return min(quota, max(self.enough, left // 4 ** (ahead - 1)))

    def _accept(self, p: Particles, run: Run) -> Particles:
        record, rows, left = float(p.carry["record"]), int(p.carry["rows"]), int(p.carry["left"])
        ahead, total = run.evaluations_ahead(p.t), self._selecting(run.problem)
        kept_back = rows * (ahead - 1) // total  # for the transitions after this one
        quota = (left if self.rollover else rows * ahead // total) - kept_back
        most = self._needed(quota, left, ahead)
        if self.accept == "reserve" and ahead > 1:
            most = left - max(ahead - 1, kept_back // 2)
        exhaust = self.accept == "best" or (ahead == 1 and (self.spend_all or self.accept == "reserve"))
        drawn: list[Particles] = []
        used = 0
        while used < most:
            q = run.score(run.propose(p, min(self.batch, most - used)))
            drawn.append(q)
            used += len(q)
            if self.accept == "first" and not exhaust and (q.reward > record).any():
                break
            if self.accept == "reserve" and not exhaust and reached(torch.cat([d.reward for d in drawn]), left / ahead):
                break
        q = Particles.cat(drawn)
        better = (q.reward > record).nonzero()[:1, 0]
        best = q[better] if self.accept == "first" and not exhaust and len(better) else q.best()
        record_ = best.reward.clamp_min(record) if self.quantile is None else self._record(q.reward[None])
        return replace(best, carry={**p.carry, "record": record_, "left": p.carry["left"] - used})

    def _accept_together(self, p: Particles, run: Run) -> Particles:
        """The best candidates of all chains' quotas; what a quota cannot share out alike rolls over."""
        rows, left = int(p.carry["rows"].sum()), int(p.carry["left"].sum())
        ahead, total = run.evaluations_ahead(p.t), self._selecting(run.problem)
        quota = left - rows * (ahead - 1) // total
        copies = self._needed(quota // self.chains, left // self.chains, ahead)
        q = run.score(run.propose(p, copies))
        best = q[q.reward.topk(self.chains).indices]
        after = torch.tensor([(left - len(q) + i) // self.chains for i in range(self.chains)], device=p.x.device)
        return replace(best, carry={**p.carry, "record": best.reward, "left": after})


def reached(rewards: Tensor, quota: float) -> bool:
    """Whether the best of these draws (n,) reaches the reservation value of a transition with `quota` draws to spend.

    A draw costs the same now and later, so it should be made where it promises more. With normal rewards of mean m and
    standard deviation s, stopping at the first above m + z s takes 1/(1 - Phi(z)) draws on average; this equals the
    quota for z = Phi^{-1}(1 - 1/quota), and no rule with that mean number of draws gains more (Weitzman, Econometrica
    47, 1979). m and s are those of the draws so far, of which 4 at least are wanted.
    """
    if len(rewards) < 4:
        return False
    z = NormalDist().inv_cdf(1 - 1 / max(quota, 2))
    return bool(rewards.max() >= rewards.mean() + z * rewards.std())
