"""What the figures' helpers draw, read back from the axes."""

import matplotlib.pyplot as plt
import pytest
import torch

from flowscale_lite import plots
from flowscale_lite.experiments import Interval


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("filled", [True, False])
def test_contours_stand_around_the_peak(ax, filled):
    peak = torch.tensor([1.5, -0.5], dtype=torch.float64)
    plots.contours(ax, lambda x: -8 * (x - peak).square().sum(1), filled=filled)
    paths = ax.collections[0].get_paths()
    assert paths[0].contains_point((1.9, -0.5)) and not paths[0].contains_point((-0.5, 1.5)), "x runs to the right"
    half = paths[3].vertices
    assert abs(half - [1.5, -0.5]).max() == pytest.approx(0.294, abs=0.02), "half of the highest: 8 r^2 = log 2"


def test_intervals_reach_from_low_to_high(ax):
    plots.intervals(ax, [1, 2], [Interval(0.5, 0.2, 0.6), (0.1, 0.0, 0.7)], marker="s")
    (container,) = ax.containers
    line, _, (bars,) = container
    assert line.get_ydata().tolist() == [0.5, 0.1] and line.get_marker() == "s"
    assert [[y for _, y in bar] for bar in bars.get_segments()] == [[0.2, 0.6], [0.0, 0.7]]


def test_a_strip_has_its_titles_and_label():
    figure, axes = plt.subplots(1, 3)
    plots.strip(axes, torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)), "abc", "row")
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    assert [ax.get_ylabel() for ax in axes] == ["row", "", ""]
    with pytest.raises(ValueError, match="zip"):
        plots.strip(axes, torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    plt.close(figure)


def test_ticks_are_the_values_named(ax):
    ax.loglog([1, 1000], [1, 1000])
    plots.ticks(ax.xaxis, [5, 50, 500])
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5", "50", "500"]
    assert list(ax.xaxis.get_minorticklocs()) == []
