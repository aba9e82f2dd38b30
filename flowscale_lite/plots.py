"""One style for all figures, and one way to show them: with a text that says the same."""

import base64
import html
import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
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
    "grid.alpha": 0.25,
    "font.size": 10,
    "image.cmap": "cividis",
    "legend.frameon": False,
}
plt.rcParams.update(STYLE)


class Picture:
    """A figure as notebooks keep it: an image with alternative text, the text alone where images are not shown."""

    def __init__(self, png: bytes, alt: str, width: int):
        self.png, self.alt, self.width = png, alt, width

    def _repr_html_(self) -> str:
        source = base64.b64encode(self.png).decode("ascii")
        alt = html.escape(self.alt)
        return f'<img src="data:image/png;base64,{source}" width="{self.width}" style="max-width: 100%" alt="{alt}">'

    def __repr__(self) -> str:
        return self.alt


def show(fig: Figure, *, alt: str) -> None:
    """Display a figure with `alt`, the text that stands for it, and close it.

    Say in `alt` what is drawn and what is to be seen in it.
    """
    from IPython.display import display

    if len(alt.strip()) < 20:
        raise ValueError(f"alt should say what the figure shows, in a sentence or two; got {alt!r}")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=1.5 * fig.dpi, facecolor="white", metadata={"Software": None})
    plt.close(fig)
    display(Picture(buffer.getvalue(), " ".join(alt.split()), round(fig.get_figwidth() * fig.dpi)))


def picture(ax: Axes, image: Tensor, title: str = "") -> None:
    """Draw a picture (3, H, W) in [0, 1], on any device, pixels unsmoothed, without axes."""
    pixels = image.detach().float().cpu().permute(1, 2, 0).clamp(0, 1)
    ax.imshow(pixels.numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color="0.8")


def reward_trace(ax: Axes, result: Result) -> None:
    """Look-ahead reward of what each step kept, and the mean of what it drew, against the NFE spent."""
    steps = [step for step in result.trace if step.reward_calls]
    spent = [step.nfe for step in steps]
    ax.plot(spent, [step.accepted for step in steps], marker="o", markersize=4, label="kept")
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
