"""Sweeps that can be interrupted, and the statistics of what they found."""

from .stats import Interval, clustered_mean, markdown, paired_difference, table
from .sweep import Row, Served, SweepFailed, Task, key, read, serve, sweep

__all__ = [
    "Interval",
    "Row",
    "Served",
    "SweepFailed",
    "Task",
    "clustered_mean",
    "key",
    "markdown",
    "paired_difference",
    "read",
    "serve",
    "sweep",
    "table",
]
