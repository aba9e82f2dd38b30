"""RBF's stopping rules: how many of a quota's candidates are drawn, and which is taken at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ._common import require_positive


class Rule(Protocol):
    """When a transition has drawn enough candidates."""

    def most(self, quota: int, left: int, ahead: int) -> int:
        """The most candidates to draw of the `quota`; `left` are for all `ahead` transitions left, with this one."""
        ...

    def take(self, rewards: Tensor, record: float) -> int | None:
        """Which of the newest candidates, with these look-ahead rewards (n,), is taken at once; None draws on."""
        ...


@dataclass(frozen=True)
class FirstImprovement:
    """The paper's rule: take the first candidate that beats the record, the best reward accepted so far."""

    def most(self, quota: int, left: int, ahead: int) -> int:
        return quota

    def take(self, rewards: Tensor, record: float) -> int | None:
        better = (rewards > record).nonzero()
        return int(better[0]) if len(better) else None


@dataclass(frozen=True)
class BestOfQuota:
    """Draw the whole quota and take its best: equal quotas, of which nothing rolls over."""

    def most(self, quota: int, left: int, ahead: int) -> int:
        return quota

    def take(self, rewards: Tensor, record: float) -> int | None:
        return None


@dataclass(frozen=True)
class BestOfEnough:
    """Draw `enough` candidates and take the best of them; the rest of the quota rolls over.

    The best of n grows slowly with n, and the noise of the next transition covers most of what a choice gains. The last
    choice is not covered by any noise. So late transitions get more: with a transitions left, this one included, at
    least left / 4^(a - 1) candidates are drawn, if the quota allows it. 24 are a balance: closed-form flows do better
    with 16 (`tools.runs.toy_table`); on pictures fewer are not shown to be better (`tools.runs.defaults`).
    """

    enough: int = 24

    def __post_init__(self) -> None:
        require_positive(self, "enough")

    def most(self, quota: int, left: int, ahead: int) -> int:
        return min(quota, max(self.enough, left // 4 ** (ahead - 1)))

    def take(self, rewards: Tensor, record: float) -> int | None:
        return None
