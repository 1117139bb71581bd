"""The pictures of a trained model: its confusion matrix, its worst mistakes, and its first layer's weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .judged import Judged
from .plots import BLUE, GRAY, ORANGE, save

#: Classes whose counts, and whose names, still find room in the confusion matrix.
COUNTED, NAMED = 20, 60
#: Units of the first layer that are drawn.
UNITS = 64


def _figure(width: float, height: float) -> Any:
    # The object interface needs no global state and no window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def plot_confusion(judged: Judged, classes: Sequence[str], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw how many rows of each class the model takes for each class; colours are shares of the row's class.

    Raises:
        OSError: the file cannot be written.
    """
    counts = judged.confusion.double()
    n = len(counts)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = min(max(4.4, 0.46 * n + 2.2), 14)
    figure = _figure(size, size * 0.94)
    ax = figure.subplots()
    image = ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, shrink=0.75, label="share of the class")
    right = counts.diag().sum() / counts.sum().clamp(min=1)
    heading = f"{judged.split} data, accuracy {100 * right:.2f} %"
    ax.set_title(f"{title}\n{heading}" if title else heading, fontsize=10, loc="left")
    ax.set_xlabel("predicted class")
    ax.set_ylabel("class")
    if n <= NAMED:
        small = 8 if n <= COUNTED else 6
        long = max(map(len, classes), default=0) > 3
        ax.set_xticks(range(n), classes, rotation=90 if long else 0, fontsize=small)
        ax.set_yticks(range(n), classes, fontsize=small)
    if n <= COUNTED:
        for row in range(n):
            for column in range(n):
                if count := int(counts[row, column]):
                    color = "white" if shares[row, column] > 0.5 else "#333333"
                    ax.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    save(figure, path)


def plot_mistakes(
    judged: Judged, classes: Sequence[str], shape: Sequence[int], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw the images to whose own class the model gives least, the worst first.

    Args:
        shape: of an image: height, width and perhaps three colours.

    Raises:
        ValueError: there is no mistake.
        OSError: the file cannot be written.
    """
    count = len(judged.labels)
    if not count:
        raise ValueError("the model made no mistake")
    columns = min(6, count)
    rows = -(-count // columns)
    # One axes for all images, each 1 wide: an axes for each would take seconds.
    tall = shape[0] / shape[1]
    across, down = 1.12, tall + 0.36
    figure = _figure(1.3 * across * columns + 0.2, 1.3 * down * rows + 0.6)
    ax = figure.subplots()
    ax.axis("off")
    ax.set_title(f"{title}\nworst mistakes on the {judged.split} data" if title else "worst mistakes", fontsize=10)
    for number, image in enumerate(judged.inputs.reshape(count, *shape).numpy()):
        left, top = number % columns * across, number // columns * down
        ax.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(left, left + 1, top + tall, top), aspect="auto")
        own, taken = (classes[int(of[number])] for of in (judged.labels, judged.predicted))
        share = f"{100 * float(judged.probability[number]):.1f} %"
        ax.text(left + 0.5, top - 0.02, own, ha="center", va="bottom", fontsize=8, color=BLUE)
        text = f"taken for {taken}\n{share}" if len(taken) > 5 else f"taken for {taken}, {share}"
        ax.text(
            left + 0.5, top + tall + 0.02, text, ha="center", va="top", fontsize=6.5, color=ORANGE, linespacing=0.95
        )
    ax.set_xlim(-0.02, columns * across - across + 1.02)
    ax.set_ylim((rows - 1) * down + tall + 0.26, -0.16)
    ax.set_aspect("equal")
    save(figure, path)


def plot_weights(weight: Tensor, shape: Sequence[int], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the first layer's weights as images, one per unit, of the units with the largest weights.

    A gray image has blue for negative and red for positive weights. Weights of colours are drawn as colours, with gray
    for 0. Each unit has a scale of its own.

    Args:
        weight: [units, inputs].
        shape: of an image: height, width and perhaps three colours.

    Raises:
        OSError: the file cannot be written.
    """
    weight = weight.detach().cpu().double()
    units = len(weight)
    chosen = weight.norm(dim=1).sort(descending=True, stable=True).indices[:UNITS].sort().values
    tiles = weight[chosen]
    tiles = tiles / tiles.abs().amax(1, keepdim=True).clamp(min=1e-300)
    tiles = tiles.reshape(len(chosen), *shape)
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = -(-len(chosen) // columns)
    height, width, *colors = shape
    sheet = torch.full(
        (rows * (height + 1) + 1, columns * (width + 1) + 1, *colors), math.nan, dtype=torch.float64, device="cpu"
    )
    for number, tile in enumerate(tiles):
        top, left = 1 + number // columns * (height + 1), 1 + number % columns * (width + 1)
        sheet[top : top + height, left : left + width] = tile
    figure = _figure(7.2, min(7.2 * sheet.shape[0] / sheet.shape[1], 12) + 0.7)
    ax = figure.subplots()
    ax.axis("off")
    if colors:
        ax.imshow((sheet / 2 + 0.5).nan_to_num(1.0).numpy(), interpolation="nearest")
    else:
        image = ax.imshow(sheet.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        bar = figure.colorbar(image, ax=ax, orientation="horizontal", shrink=0.4, aspect=40, pad=0.01, ticks=(-1, 0, 1))
        bar.ax.tick_params(labelsize=7)
    which = "all" if units == len(chosen) else f"{len(chosen)} of"
    about = f"first layer, {which} {units} units, each by its largest weight"
    ax.set_title(f"{title}\n{about}" if title else about, fontsize=10, loc="left", color="black" if title else GRAY)
    save(figure, path)
