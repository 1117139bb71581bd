"""The picture of a sweep: the scores against the learning rate, or a bar for each setting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..plots import BLUE, GRAY, GREEN, ORANGE, PURPLE, look, save
from .plan import SETTINGS
from .results import Standing, score_name

#: Settings that have a line or a bar of their own; the ones after are left out.
MOST_LINES, MOST_BARS = 8, 24
#: Learning rates that are all written below the axis.
MOST_TICKS = 8
_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00", "#000000", "#F0E442")


def varied(standings: Sequence[Standing]) -> list[str]:
    """The names of ``plan.SETTINGS`` that have several values."""
    return [name for name in SETTINGS if len({repr(standing.setting[name]) for standing in standings}) > 1]


def label(setting: dict[str, Any], names: Sequence[str]) -> str:
    """Some of the settings in words: ``784-16-10, relu, momentum 0.9``."""
    return ", ".join(
        shown(name, setting[name])
        if name in ("sizes", "activation")
        else f"{name.replace('_', ' ')} {shown(name, setting[name])}"
        for name in names
    )


def shown(name: str, value: Any) -> str:
    """The value of a setting as people write it."""
    if name == "sizes":
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def draw(standings: Sequence[Standing], path: str | os.PathLike[str], loss: str, caption: str = "") -> None:
    """Draw the ranking to a PNG file, which is replaced as a whole.

    Where there are several learning rates, the mean scores are drawn against them, with one line for each combination
    of the other settings. Otherwise each setting has a bar. Error bars are one standard deviation.

    Raises:
        ValueError: no setting has a score.
        OSError: the file cannot be written.
    """
    scored = [standing for standing in standings if standing.mean is not None]
    if not scored:
        raise ValueError("no setting has a score; there is nothing to draw")
    from matplotlib.figure import Figure

    percent = 100 if score_name(loss) == "validation_accuracy" else 1
    name = "validation accuracy (%)" if percent == 100 else f"validation loss ({loss})"
    names = varied(standings)
    lines = "lr" in names
    height = 4.2 if lines else 1.2 + 0.3 * min(len(scored), MOST_BARS)
    figure = Figure(figsize=(7.2, max(2.4, height)), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_one = _lines if lines else _bars
    draw_one(axes, scored, [n for n in names if n != "lr"], percent, name)
    if caption:
        figure.supxlabel(caption, fontsize=8, color=GRAY)
    look(axes)
    save(figure, path)


def _lines(axes: Any, scored: Sequence[Standing], names: Sequence[str], percent: float, name: str) -> None:
    of: dict[str, list[Standing]] = {}
    for standing in scored:
        of.setdefault(label(standing.setting, names), []).append(standing)
    for color, (text, found) in zip(_COLORS, of.items(), strict=False):
        found.sort(key=lambda standing: standing.setting["lr"])
        rates = [standing.setting["lr"] for standing in found]
        means = [percent * (standing.mean or 0.0) for standing in found]
        spreads = [percent * (standing.deviation or 0.0) for standing in found]
        axes.errorbar(
            rates, means, spreads, color=color, label=text, marker="o", markersize=4, linewidth=1.8, capsize=3
        )
    axes.set_xscale("log")
    rates = sorted({standing.setting["lr"] for standing in scored})
    if len(rates) <= MOST_TICKS:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(name)
    if names:
        axes.legend(frameon=False, fontsize=8)
    if len(of) > MOST_LINES:
        axes.set_title(f"the best {MOST_LINES} of {len(of)} combinations", loc="left", fontsize=9, color=GRAY)


def _bars(axes: Any, scored: Sequence[Standing], names: Sequence[str], percent: float, name: str) -> None:
    shown_ones = scored[:MOST_BARS]
    places = range(len(shown_ones))
    axes.barh(
        places,
        [percent * (standing.mean or 0.0) for standing in shown_ones],
        xerr=[percent * (standing.deviation or 0.0) for standing in shown_ones],
        color=BLUE,
        ecolor=GRAY,
        capsize=3,
    )
    axes.set_yticks(places, [label(standing.setting, names) or "all" for standing in shown_ones], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(name)
    if len(scored) > MOST_BARS:
        axes.set_title(f"the best {MOST_BARS} of {len(scored)} settings", loc="left", fontsize=9, color=GRAY)
