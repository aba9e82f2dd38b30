"""Tables of runs: means with intervals clustered by prompt, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .sweep import Row, key


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Any], *, seed: int = 0, resamples: int = 4000
) -> Interval:
    """Mean and 95 % percentile-bootstrap interval, drawing whole clusters: runs of one prompt are not independent.

    Truth values that all agree would leave the bootstrap nothing to vary, and claim certainty: for them the interval is
    Clopper and Pearson's, of as many trials as there are clusters.

    Raises:
        ValueError: lengths differ, or no values.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"as many clusters as values, at least one, are needed; got {len(clusters)} and {len(values)}")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if np.asarray(values).dtype == bool and len(np.unique(values)) == 1:
        edge = 1 - 0.025 ** (1 / (index.max() + 1))
        return Interval(1.0, 1 - edge, 1.0) if values[0] else Interval(0.0, 0.0, edge)
    total, number = np.bincount(index, np.asarray(values, dtype=float)), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(total), size=(resamples, len(total)))
    means = total[draws].sum(1) / number[draws].sum(1)
    return Interval(float(np.mean(values)), *map(float, np.quantile(means, [0.025, 0.975])))


def table(rows: Sequence[Row], by: Sequence[str], values: Sequence[str], *, clusters: str = "prompt") -> list[Row]:
    """One line for each combination of the fields `by`, in the order of its first row: the fields, the number of
    `runs`, and the mean of each of `values` with an interval clustered by the field `clusters`.

    Raises:
        ValueError: no rows, or a row lacks a field.
    """
    _has(rows, [*by, *values, clusters])
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row, by), []).append(row)
    return [
        {field: group[0][field] for field in by}
        | {"runs": len(group)}
        | {value: clustered_mean([r[value] for r in group], [r[clusters] for r in group]) for value in values}
        for group in groups.values()
    ]


def markdown(lines: Sequence[Row]) -> str:
    """A table as Markdown."""
    if not lines:
        return ""
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[*lines[0]], ["---"] * len(lines[0]), *cells])


def paired_difference(
    first: Sequence[Row],
    second: Sequence[Row],
    value: str,
    *,
    by: Sequence[str] = ("prompt", "seed"),
    clusters: str = "prompt",
) -> Interval:
    """Mean of `value` in `first` minus that of the run in `second` with the same fields `by`, clustered interval.

    Pairing takes out what a prompt and a seed do to both methods alike, so the interval is narrower than that of two
    means, and it is the one to look at when two methods are compared.

    Raises:
        ValueError: no rows, a row that lacks a field, two rows of one side that pair alike, or a row without partner.
    """
    sides = []
    for rows in (first, second):
        _has(rows, [*by, value, clusters])
        sides.append({key(row, by): row for row in rows})
        if len(sides[-1]) < len(rows):
            raise ValueError(f"two rows of one side agree in {list(by)}: name the fields that tell them apart")
    alone = sorted(sides[0].keys() ^ sides[1].keys())
    if alone:
        raise ValueError(f"{len(alone)} rows have no partner with the same {list(by)}, such as {alone[0]}")
    pairs = [(a, sides[1][name]) for name, a in sides[0].items()]
    return clustered_mean([float(a[value]) - float(b[value]) for a, b in pairs], [a[clusters] for a, _ in pairs])


def _has(rows: Sequence[Row], fields: Sequence[str]) -> None:
    if not rows:
        raise ValueError("there are no rows")
    lacking = next((field for row in rows for field in fields if field not in row), None)
    if lacking is not None:
        raise ValueError(f"a row has no field {lacking!r}; the first has {sorted(rows[0])}")
