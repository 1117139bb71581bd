"""Plots of the runs, each from the JSON alone: speed against batch, width and depth, error, roofline, accuracy.

A plot is a list of drawings, one per panel. The plot of many networks has several panels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure.results import Document
from bench.presets import REFERENCE
from fastmlp.activations import ACTIVATIONS
from fastmlp.train.plots import GRAY, look, save

from .members import curves, member_seconds
from .tables import LEAST_SPREAD, median, timed

__all__ = ["PLOTS", "caption", "draw"]

#: Draws a run into the axes of a panel; False where the run has no data for it.
Drawing = Callable[[Any, Document], bool]

#: Contender -> colour and marker, the same in every plot. The colours are Okabe and Ito's, which stay apart for
#: colour-blind readers and in gray, and five of Tol's.
STYLES = {
    "fastmlp": ("#0072B2", "o"),
    "eager": ("#D55E00", "s"),
    "eager_fused": ("#E69F00", "^"),
    "cuda_graph": ("#009E73", "P"),
    "compile_default": ("#CC79A7", "D"),
    "jax": ("#56B4E9", "<"),
    "inplace": ("#000000", "v"),
    "whole_default": ("#882255", "X"),
    "quickstart": ("#999933", "*"),
    "fastmlp_loop": ("#332288", "h"),
    "vmap": ("#44AA99", ">"),
    "vmap_compiled": ("#AA4499", "d"),
}
#: A learner of the time to accuracy -> the contender that trains in its way.
_LEARNERS = {"resident": "eager", "compile": "compile_default", "fastmlp_own_recipe": "fastmlp"}
_OTHER = (GRAY, ".")
#: Inches of a line of the caption.
_LINE_IN = 0.13

#: File stem -> what the plot shows.
PLOTS = {
    "batch": "Training speed against batch size, 784-512-512-10",
    "batch-bfloat16": "Training speed against batch size, 784-512-512-10, bfloat16 products",
    "width": "Training speed against the width of two hidden layers, batch 64",
    "depth": "Training speed against the number of hidden layers of 512, batch 64",
    "members": "Time per network of a training step of many networks",
    "error": "Error of the weights' updates after three steps against float64",
    "roofline": "Operations and training steps beside the machine's measured peaks",
    "accuracy": "Test accuracy against seconds of training",
}


def caption(document: Document) -> str:
    """Device, versions, commit and command of a run."""
    about = document["machine"]
    names = ("torch", "triton", "jax") if about["is_gpu"] else ("torch", "jax")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in names if about["versions"].get(name))
    threads = "" if about["is_gpu"] else f", {about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    changed = " with changes" if about["changed_files"] else ""
    return (
        f"{about['name']}{threads}; {versions}; commit {about['commit']}{changed}, {document['started'][:10]}; "
        f"command: {document['command']}"
    )


def draw(document: Document, folder: Path, *, roofline: bool) -> list[Path]:
    """Draw all plots that a run has data for into ``folder``, the roofline on request; returns the PNG files."""
    drawings: dict[str, Sequence[Drawing]] = {
        "batch": [partial(_curve, axis="batch", dtype="float32", label="batch size")],
        "batch-bfloat16": [partial(_curve, axis="batch", dtype="bfloat16", label="batch size")],
        "width": [partial(_curve, axis="width", dtype="float32", label="width of the hidden layers")],
        "depth": [partial(_curve, axis="depth", dtype="float32", label="hidden layers")],
        "members": [partial(_members, title=title) for title in curves(document)],
        "error": [_errors],
        "roofline": [_roofline],
        "accuracy": [_accuracy],
    }
    paths = []
    for stem, panels in drawings.items():
        if stem == "roofline" and not roofline:
            continue
        path = folder / f"{stem}.png"
        if _save(path, PLOTS[stem], document, panels):
            paths.append(path)
    return paths


def _save(path: Path, title: str, document: Document, panels: Sequence[Drawing]) -> bool:
    """A figure of one panel, or of several, two in a row, with one legend for all."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    height = max(5.2, 3.6 * rows)
    figure = Figure(figsize=(8.4, height), dpi=130, layout="constrained")
    drawn = []
    for number, drawing in enumerate(panels, 1):
        drawn.append(figure.add_subplot(rows, min(len(panels), 2), number))
        if not drawing(drawn[-1], document):
            return False
    if not drawn:
        return False
    figure.suptitle(title, fontsize=12, fontweight="bold")
    text = caption(document)
    text = text if len(text) < 120 else text.replace("; command", "\ncommand")
    if len(drawn) > 1:
        # The layout would draw a legend outside of the panels over the caption, so empty lines make room for it.
        above = _LINE_IN * (1 + text.count("\n")) / height
        handles = drawn[0].get_legend_handles_labels()
        figure.legend(*handles, frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, above), ncols=3)
        text = "\n" * 3 + text
    figure.supxlabel(text, fontsize=7, color=GRAY)
    for axes in drawn:
        look(axes)
        axes.grid(which="minor", color="#eeeeee", linewidth=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
    return True


def _style(rival: str) -> dict[str, Any]:
    colour, marker = STYLES.get(rival, _OTHER)
    ours = rival == "fastmlp"
    return {
        "color": colour,
        "marker": marker,
        "markersize": 4.5,
        "linewidth": 2.4 if ours else 1.3,
        "zorder": 3 if ours else 2,
    }


def _legend_below(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _number_the_places(axes: Any, places: list[int], label: str) -> None:
    """A logarithmic axis with a tick at each place."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_yscale("log")


def _band(axes: Any, places: list[Any], values: list[tuple[float, float, float]], **style: Any) -> None:
    """A line of medians, with a band between the lowest and the highest values: (lowest, median, highest)."""
    low, middle, high = zip(*values, strict=True)
    axes.plot(places, middle, **style)
    axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _series(
    document: Document, axis: str, dtype: str, value: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> dict[tuple[str, str], list[tuple[int, Any]]]:
    """(rival, label) -> [(place on the axis, value of a result that was timed)]."""
    series: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for case in document.get("cases", []):
        if case["axis"] == axis and case["problem"]["dtype"] == dtype:
            for entry in timed(case):
                series.setdefault((entry["rival"], entry["label"]), []).append((case["value"], value(case, entry)))
    return {key: sorted(points) for key, points in series.items()}


def _curve(axes: Any, document: Document, axis: str, dtype: str, label: str) -> bool:
    """Rows per second, with a band from the slowest round to the fastest."""

    def speed(case: dict[str, Any], entry: dict[str, Any]) -> tuple[float, float, float]:
        seconds, rows = entry["seconds"], case["rows"]
        return rows / max(seconds), rows / median(entry), rows / min(seconds)

    series = _series(document, axis, dtype, speed)
    if not series:
        return False
    for (rival, name), points in series.items():
        _band(axes, [place for place, _ in points], [value for _, value in points], label=name, **_style(rival))
    _number_the_places(axes, sorted({place for points in series.values() for place, _ in points}), label)
    axes.set_ylabel("samples per second\n(median; band: slowest to fastest round)")
    _legend_below(axes)
    return True


def _members(axes: Any, document: Document, title: str) -> bool:
    """Time of a member and step of one network against the number of members."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    cases = curves(document)[title]
    series: dict[tuple[str, str], list[tuple[int, tuple[float, float, float]]]] = {}
    for case in cases:
        for entry in timed(case):
            series.setdefault((entry["rival"], entry["label"]), []).append((case["value"], member_seconds(case, entry)))
    if not series:
        return False
    for (rival, name), points in series.items():
        low, middle, high = zip(*((1e6 * a, 1e6 * b, 1e6 * c) for _, (a, b, c) in points), strict=True)
        values = list(zip(low, middle, high, strict=True))
        _band(axes, [place for place, _ in points], values, label=name, **_style(rival))
    _number_the_places(axes, sorted({case["value"] for case in cases}), "members")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=9)
    axes.set_ylabel("µs per member and step")
    return True


def _errors(axes: Any, document: Document) -> bool:
    found = False
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        series = _series(document, "batch", dtype, lambda case, entry: max(entry["overall"], 1e-16))
        above = _hidden({rival: points for (rival, _), points in series.items()})
        names = dict(list(series))
        for (rival, name), points in series.items():
            found = True
            under = f" (hidden by {names[above[rival]]})" if rival in above else ""
            places, errors = zip(*points, strict=True)
            axes.plot(places, errors, label=f"{name}, {dtype}{under}", linestyle=line, **_style(rival))
    if not found:
        return False
    _number_the_places(axes, sorted({c["value"] for c in document["cases"] if c["axis"] == "batch"}), "batch size")
    axes.set_ylabel("relative error of the update\n(norm over all parameters)")
    _legend_below(axes)
    return True


def _hidden(series: Mapping[str, list[tuple[int, float]]]) -> dict[str, str]:
    """The series that cannot be seen -> the series drawn over it: within 5 % of it at every place."""
    drawn = sorted(series, key=lambda rival: rival == "fastmlp")  # fastmlp is drawn last, the others in their order

    def same(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> bool:
        known = dict(b)
        return all(place in known and abs(math.log(v / known[place])) < LEAST_SPREAD for place, v in a)

    found = {}
    for number, rival in enumerate(drawn):
        over = [other for other in drawn[number + 1 :] if same(series[rival], series[other])]
        if over:
            found[rival] = over[-1]
    return found


#: Words of a problem's name that most points have, or that change nothing about a point's place.
_UNSAID = {"-".join(map(str, REFERENCE)), "float32", "sgd", *ACTIVATIONS}


def _roofline(axes: Any, document: Document) -> bool:
    peaks = document.get("peaks") or {}
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    names: dict[tuple[float, str], None] = {}
    for case in document.get("cases", []):
        for entry in timed(case) if case["flops"] else ():
            if entry["rival"] in ("fastmlp", "eager"):
                intensity, problem = case["flops"] / case["bytes"], case["problem"]
                key = entry["rival"], problem["dtype"]
                points.setdefault(key, []).append((intensity, case["flops"] / median(entry)))
                words = (word for word in problem["name"].split() if word not in _UNSAID)
                names[intensity, " ".join((problem["kind"], *words))] = None
    if not points or "bytes" not in peaks:
        return False
    every = [point for values in points.values() for point in values]
    low, high = min(x for x, _ in every) / 2, max(x for x, _ in every) * 2
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    dtypes = {dtype for _, dtype in points}
    for dtype, colour in (("float32", "#000000"), ("bfloat16", GRAY), ("float16", GRAY)):
        if dtype in dtypes and f"flops {dtype}" in peaks:
            peak = peaks[f"flops {dtype}"]
            label = f"measured peak, {dtype}: {peak / 1e9:,.0f} GFLOP/s"
            roof = [min(peak, x * peaks["bytes"]) for x in grid]
            axes.plot(grid, roof, color=colour, linewidth=1.2, label=label)
    for (rival, dtype), values in sorted(points.items()):
        style = _style(rival) | {"linewidth": 0, "label": f"{'fastmlp' if rival == 'fastmlp' else 'PyTorch'}, {dtype}"}
        axes.plot(*zip(*values, strict=True), markerfacecolor=None if dtype == "float32" else "none", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(y for _, y in every) / 6, max(*peaks.values(), *(y for _, y in every)) * 2)
    _name_the_points(axes, sorted(names), every, math.log(high / low) / 60)
    axes.set_xlabel("FLOP per byte of the least traffic (above the slope: operands that stay in the caches)")
    axes.set_ylabel("FLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return True


def _name_the_points(axes: Any, names: list[tuple[float, str]], points: list[tuple[float, float]], gap: float) -> None:
    """Each name, upright, below the points of its place, ``gap`` or more from the next in the logarithm of the place.

    The names of a crowd spread to both sides: halfway between where they are when pushed left and when pushed right.
    """
    places = [math.log(x) for x, _ in names]
    right, left = places.copy(), places.copy()
    for i in range(1, len(places)):
        right[i] = max(right[i], right[i - 1] + gap)
        left[-i - 1] = min(left[-i - 1], left[-i] - gap)
    for (x, name), at in zip(names, map(statistics.mean, zip(right, left, strict=True)), strict=True):
        own = min(y for other, y in points if other == x)
        lowest = min([own, *(y for other, y in points if abs(math.log(other) - at) < gap)])
        axes.annotate(
            name,
            (x, own),
            (math.exp(at), lowest / 1.25),
            rotation=90,
            ha="center",
            va="top",
            fontsize=6.5,
            color=GRAY,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkB": 3},
        )


def _accuracy(axes: Any, document: Document) -> bool:
    """Median over the seeds after each part of an epoch, with a band from the worst seed to the best."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    contenders = [c for c in document.get("contenders", []) if c["status"] == "ok"]
    if not contenders:
        return False
    for contender in contenders:
        # A run ends at the highest target: the line ends with the shortest run.
        looks = list(zip(*(run["curve"] for run in contender["runs"]), strict=False))
        seconds = [statistics.median(point["seconds"] for point in look) for look in looks]
        accuracies = [sorted(100 * point["accuracy"] for point in look) for look in looks]
        style = _style(_LEARNERS.get(contender["name"], contender["name"])) | {"marker": ""}
        style["linestyle"] = "--" if contender["name"] == "fastmlp_own_recipe" else "-"
        values = [(a[0], statistics.median(a), a[-1]) for a in accuracies]
        _band(axes, seconds, values, label=contender["label"], **style)
    for target in document["targets"]:
        axes.axhline(100 * target, color=GRAY, linewidth=0.7, linestyle=":")
        axes.annotate(
            f"{100 * target:g} %", (1, 100 * target), (3, 0), axes.get_yaxis_transform(), "offset points",
            va="center", fontsize=7, color=GRAY,
        )  # fmt: skip
    best = max(p["accuracy"] for c in contenders for run in c["runs"] for p in run["curve"])
    axes.set_ylim(100 * min(document["targets"]) - 8, math.ceil(100 * best) + 0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds of training, without compilation, warm-up and evaluation")
    axes.set_ylabel("test accuracy (%)\n(median of the seeds; band: worst to best)")
    _legend_below(axes)
    return True
