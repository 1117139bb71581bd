"""The picture of a training run: loss and test accuracy over the epochs."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

from ..base.atomic import atomic_write

if TYPE_CHECKING:
    from .loop import History

# Okabe and Ito's colours, which stay apart for colour-blind readers and in gray.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"


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
    """Draw the curves of a run to a PNG file: the loss, and beside it the test accuracy in percent if there is any.

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

    epochs = [result.epoch for result in history.epochs]
    test_losses = [result.test_loss for result in history.epochs if result.test_loss is not None]
    accuracies = [100 * result.test_accuracy for result in history.epochs if result.test_accuracy is not None]
    figure = Figure(figsize=(9.6 if accuracies else 5.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if accuracies else 1, squeeze=False)[0]
    if title or subtitle:
        figure.suptitle(title, fontsize=13, fontweight="bold")
        axes[0].set_title(subtitle, loc="left", fontsize=9, color=GRAY, pad=8)
    if caption:
        figure.supxlabel(caption, fontsize=8, color=GRAY)

    style = {"marker": "o", "markersize": 4, "linewidth": 1.8}
    axes[0].plot(epochs, [r.train_loss for r in history.epochs], color=BLUE, label="training (mean of epoch)", **style)
    if test_losses:
        axes[0].plot(epochs, test_losses, color=ORANGE, label="test (after epoch)", **style)
    axes[0].set_ylabel("cross-entropy loss")
    axes[0].legend(frameon=False)
    if accuracies:
        axes[1].plot(epochs, accuracies, color=GREEN, **style)
        axes[1].set_ylabel("test accuracy (%)")
        axes[1].yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        # The lower right corner, which a rising curve does not reach.
        axes[1].annotate(
            f"{accuracies[-1]:.2f} % after epoch {epochs[-1]}", (1, 0), (-8, 8), "axes fraction", "offset points",
            ha="right", va="bottom", color=GREEN, fontweight="bold",
        )  # fmt: skip
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        look(ax)
    save(figure, path)
