"""The picture of a training run: loss, and accuracy or R2, over the epochs."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from ..base.atomic import atomic_write
from .scores import metric_of

if TYPE_CHECKING:
    from .loop import History

# Okabe and Ito's colours, which stay apart for colour-blind readers and in gray.
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
#: By the rows: the colour and the name of their loss, and the colour of their accuracy.
STYLES = {
    "train": (BLUE, "training (mean of epoch)", BLUE),
    "validation": (PURPLE, "validation (after epoch)", PURPLE),
    "test": (ORANGE, "test (after epoch)", GREEN),
}


def look(axes: Any) -> None:
    """The grid and the spines of every plot of the project."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def plot_history(
    history: History, path: str | os.PathLike[str], title: str = "", subtitle: str = "", caption: str = ""
) -> None:
    """Draw the curves of a run to a PNG file: the loss, and beside it the accuracy in percent, or R2, if there is any.

    Args:
        history: at least one epoch.
        path: the PNG; replaced whole.
        title: the first line above the curves, such as the network.
        subtitle: the second, smaller line, such as the settings.
        caption: the line below the curves, such as data, device and versions.

    Raises:
        ValueError: an empty history.
        OSError: the file cannot be written.
    """
    if not history.epochs:
        raise ValueError("the history has no epoch; there is nothing to draw")
    # The object interface needs no global state and no window system.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    metric = metric_of(history.loss)
    percent = 100 if metric == "accuracy" else 1
    losses = {split: _curve(history, f"{split}_loss") for split in STYLES}
    metrics = {split: _curve(history, f"{split}_{metric}", percent) for split in STYLES}
    drawn = [split for split in STYLES if metrics[split][0]]
    figure = Figure(figsize=(9.6 if drawn else 5.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if drawn else 1, squeeze=False)[0]
    if title or subtitle:
        figure.suptitle(title, fontsize=13, fontweight="bold")
        axes[0].set_title(subtitle, loc="left", fontsize=9, color=GRAY, pad=8)
    if caption:
        figure.supxlabel(caption, fontsize=8, color=GRAY)

    style = {"marker": "o", "markersize": 4, "linewidth": 1.8}
    for split, (color, label, _) in STYLES.items():
        if epochs := losses[split][0]:
            if split == "test" and len(epochs) == 1 < len(history.epochs):
                label = "test (once, of the best epoch)"
            axes[0].plot(*losses[split], color=color, label=label, **style)
    axes[0].set_ylabel("cross-entropy loss" if history.loss == "cross_entropy" else f"{history.loss} loss")
    axes[0].legend(frameon=False)
    if drawn:
        title, unit = ("accuracy", " %") if metric == "accuracy" else ("R2", "")
        for split in drawn:
            axes[1].plot(*metrics[split], color=STYLES[split][2], label=split, **style)
        axes[1].set_ylabel(f"{drawn[0] + ' ' if len(drawn) == 1 else ''}{title}{' (%)' if unit else ''}")
        axes[1].yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        if len(drawn) > 1:
            axes[1].legend(frameon=False)
        # The lower right corner, which a rising curve does not reach.
        epochs, values = metrics[drawn[-1]]
        number = f"{values[-1]:.2f} %" if unit else f"{values[-1]:.4f}"
        axes[1].annotate(
            f"{number} after epoch {epochs[-1]}", (1, 0), (-8, 8), "axes fraction", "offset points",
            ha="right", va="bottom", color=STYLES[drawn[-1]][2], fontweight="bold",
        )  # fmt: skip
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        look(ax)
    save(figure, path)


def _curve(history: History, name: str, factor: float = 1) -> tuple[list[int], list[float]]:
    """(epochs, values) of a field of the results, where it has a number."""
    found = [(result.epoch, getattr(result, name, None)) for result in history.epochs]
    return [epoch for epoch, value in found if value is not None], [factor * v for _, v in found if v is not None]
