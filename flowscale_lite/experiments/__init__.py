"""Sweeps that can be interrupted, and the statistics of what they found."""

from .stats import Interval, clustered_mean, paired_difference, table
from .sweep import Row, Task, read, serve, sweep
