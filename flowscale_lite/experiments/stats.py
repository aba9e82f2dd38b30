"""Tables of runs: means with intervals clustered by prompt, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

from .sweep import Row

Rows: TypeAlias = "Sequence[Row] | pd.DataFrame"


@dataclass(frozen=True, order=True)
class Interval:
    """A mean with its 95 % interval. It unpacks as mean, low, high, and a table shows it as "0.43 [0.33, 0.54]"."""

    # Not a tuple: pandas shows the items of a tuple in a cell, and does not ask for its __str__.
    mean: float
    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.low, self.high))

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Any], *, seed: int = 0, resamples: int = 4000
) -> Interval:
    """Mean and 95 % percentile-bootstrap interval; whole clusters are drawn, for runs of one prompt are alike.

    Where truth values all agree, the bootstrap would find no variation and claim certainty. For them the interval is
    the exact binomial one (Clopper and Pearson's) of as many trials as there are clusters.

    Raises ValueError: lengths differ, or no values.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"as many clusters as values, at least one, are needed; got {len(clusters)} and {len(values)}")
    array = np.asarray(values)
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    mean, number = float(array.mean()), len(names)
    if array.dtype == bool and mean in (0, 1):
        found = stats.binomtest(int(mean) * number, number).proportion_ci(0.95, "exact")
        return Interval(mean, float(found.low), float(found.high))
    if number == 1:
        return Interval(mean, mean, mean)
    sums, sizes = np.bincount(index, array.astype(float)), np.bincount(index)
    found = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, *map(float, found.confidence_interval))


def table(rows: Rows, by: Sequence[str], values: Sequence[str], *, clusters: str = "prompt") -> pd.DataFrame:
    """One line for each combination of the fields `by`, which are its index, in the order of their first rows.

    Columns are the number of `runs`, and each of `values` as an `Interval`, clustered by the field `clusters`.

    Raises ValueError: no rows, or a row lacks a field.
    """
    groups = _frame(rows, [*by, *values, clusters]).groupby(list(by), sort=False)
    lines = groups.size().to_frame("runs")
    for value in values:
        lines[value] = [clustered_mean(group[value], group[clusters]) for _, group in groups]
    return lines


def paired_difference(
    first: Rows, second: Rows, value: str, *, by: Sequence[str] = ("prompt", "seed"), clusters: str = "prompt"
) -> Interval:
    """Mean of `value` in `first` minus that of the run in `second` with the same fields `by`, clustered interval.

    Pairing takes out what a prompt and a seed do to both methods alike, so the interval is narrower than that of two
    means, and it is the one to look at when two methods are compared.

    Raises ValueError: no rows, a row that lacks a field or a partner, or two rows of one side that pair alike.
    """
    ours, theirs = (_frame(rows, [*by, value, clusters]).set_index(list(by), drop=False) for rows in (first, second))
    if ours.index.has_duplicates or theirs.index.has_duplicates:
        raise ValueError(f"two rows of one side agree in {list(by)}: name the fields that tell them apart")
    alone = ours.index.symmetric_difference(theirs.index)
    if len(alone):
        raise ValueError(f"{len(alone)} rows have no partner with the same {list(by)}, such as {alone[0]}")
    gains = ours[value].astype(float) - theirs[value].astype(float).loc[ours.index]
    return clustered_mean(gains, ours[clusters])


def _frame(rows: Rows, fields: Sequence[str]) -> pd.DataFrame:
    """The rows as a table in which these fields are complete."""
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError("there are no rows")
    for field in fields:
        if field not in frame or frame[field].isna().any():
            raise ValueError(f"a row has no field {field!r}; together the rows have {sorted(frame)}")
    return frame
