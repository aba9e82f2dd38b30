"""One style for all figures, and the drawings that notebooks share. Importing this module sets the style."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from torch import Tensor

from .search import Result

# Told apart in black and white too: colours that differ in lightness (Okabe and Ito), each with its own line style.
_COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]
_LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
STYLE = {
    "figure.figsize": (6.0, 3.6),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=_COLORS, linestyle=_LINES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "image.cmap": "cividis",
    "legend.frameon": False,
}
plt.rcParams.update(STYLE)


def picture(ax: Axes, image: Tensor, title: str = "") -> None:
    """Draw a picture (3, H, W) in [0, 1], on any device, pixels unsmoothed, without axes."""
    pixels = image.detach().float().cpu().permute(1, 2, 0).clamp(0, 1)
    ax.imshow(pixels.numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color="0.8")


def strip(axes: Sequence[Axes], images: Tensor, titles: Iterable[str] = (), label: str = "") -> None:
    """Draw K pictures (K, 3, H, W) on the K axes of one row, under their titles if any; `label` stands left of the row.

    Raises ValueError: there are not as many axes, or titles, as pictures.
    """
    for ax, image, title in zip(axes, images, list(titles) or [""] * len(images), strict=True):
        picture(ax, image, title)
    axes[0].set_ylabel(label, fontsize=9)


def intervals(ax: Axes, x: Sequence[float], values: Iterable[Sequence[float]], **style: Any) -> None:
    """Draw means with error bars: for each of K places x a triple (mean, low, high), as `experiments` gives them."""
    mean, low, high = np.array([tuple(value) for value in values], dtype=float).T
    ax.errorbar(x, mean, yerr=(mean - low, high - mean), **({"capsize": 2, "markersize": 4} | style))


def contours(ax: Axes, log_density: Callable[[Tensor], Tensor], limit: float = 3.0, filled: bool = True) -> None:
    """Draw a density of the plane, filled grey or as lines, at 1, 5, 20 and 50 % of its highest value.

    `log_density` maps points (K, 2), in double precision, to (K,). Both axes run from -limit to limit.
    """
    side = torch.linspace(-limit, limit, 161, dtype=torch.float64)
    density = log_density(torch.cartesian_prod(side, side)).exp().view(161, 161).T  # a row for each value of y
    levels = float(density.max()) * np.array([0.01, 0.05, 0.2, 0.5, 1.01])
    if filled:
        ax.contourf(side, side, density, levels=levels, cmap="Greys", alpha=0.6)
    else:
        ax.contour(side, side, density, levels=levels, colors="black", linewidths=0.7)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.grid(False)


def ticks(axis: Axis, values: Sequence[float]) -> None:
    """Mark these values, and no others, on an axis (`ax.xaxis`), a logarithmic one above all."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def reward_trace(ax: Axes, result: Result) -> None:
    """Look-ahead reward of what each step kept, and the mean of what it drew, against the NFE spent.

    Steps that keep what they have not judged, as those of a method that starts anew every round, show the best so far.
    """
    steps = [step for step in result.trace if step.reward_calls]
    spent = [step.nfe for step in steps]
    kept, label = np.array([step.accepted for step in steps]), "kept"
    if np.isnan(kept[:-1]).any():
        kept, label = np.fmax.accumulate(np.array([step.best for step in steps])), "best so far"
    ax.plot(spent, kept, marker="o", markersize=4, label=label)
    ax.plot(spent, [step.mean for step in steps], marker="s", markersize=3, label="mean drawn")
    ax.set(xlabel="NFE spent", ylabel="look-ahead reward")
    ax.legend(fontsize=8)


def before_after(before: Tensor, after: Tensor, result: Result, title: str = "") -> Figure:
    """The plain picture, the one a search found, and the search's reward trace, side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), width_ratios=(1, 1, 1.3))
    picture(axes[0], before, "plain sample")
    picture(axes[1], after, f"after {result.nfe} NFE")
    reward_trace(axes[2], result)
    figure.suptitle(title, fontsize=11)
    return figure
