"""Plots of the runs, each from the JSON alone: speed against batch, width and depth, error, roofline, accuracy."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure.results import Document
from fastmlp.base.atomic import atomic_write

from .tables import median, timed

__all__ = ["PLOTS", "caption", "draw"]

# Okabe and Ito's colours, which stay apart for colour-blind readers and in gray, and a wine red of Tol's. fastmlp has
# the first in every plot.
COLOURS = {
    "fastmlp": "#0072B2",
    "eager": "#D55E00",
    "eager_fused": "#E69F00",
    "cuda_graph": "#009E73",
    "compile_default": "#CC79A7",
    "jax": "#56B4E9",
    "inplace": "#000000",
    "whole_default": "#882255",
}
GRAY = "#666666"
MARKERS = "os^Dv<>Pp*"

#: File stem -> what the plot shows.
PLOTS = {
    "batch": "Training speed against batch size, 784-512-512-10",
    "batch-bfloat16": "Training speed against batch size, 784-512-512-10, bfloat16 products",
    "width": "Training speed against the width of two hidden layers, batch 64",
    "depth": "Training speed against the number of hidden layers of 512, batch 64",
    "error": "Error of the weights' updates after three steps against float64",
    "roofline": "Arithmetic and memory: every operation and step beside what the machine can do",
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
    """Draw what a run has data for into ``folder``, its roofline on request; returns the paths of the PNG files."""
    drawings: dict[str, Callable[[Any, Document], bool]] = {
        "batch": lambda axes, d: _curve(axes, d, "batch", "float32", "batch size"),
        "batch-bfloat16": lambda axes, d: _curve(axes, d, "batch", "bfloat16", "batch size"),
        "width": lambda axes, d: _curve(axes, d, "width", "float32", "width of the hidden layers"),
        "depth": lambda axes, d: _curve(axes, d, "depth", "float32", "hidden layers"),
        "error": _errors,
        "roofline": _roofline,
        "accuracy": _accuracy,
    }
    paths = []
    for stem, drawing in drawings.items():
        if stem == "roofline" and not roofline:
            continue
        path = folder / f"{stem}.png"
        if _save(path, PLOTS[stem], document, drawing):
            paths.append(path)
    return paths


def _save(path: Path, title: str, document: Document, drawing: Callable[[Any, Document], bool]) -> bool:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if not drawing(axes, document):
        return False
    figure.suptitle(title, fontsize=12, fontweight="bold")
    text = caption(document)
    figure.supxlabel(text if len(text) < 120 else text.replace("; command", "\ncommand"), fontsize=7, color=GRAY)
    axes.grid(color="#dddddd", linewidth=0.6, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if axes.get_legend() is None:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
    return True


def _style(rival: str, index: int) -> dict[str, Any]:
    colour = COLOURS.get(rival, GRAY)
    return {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 2.4 if rival == "fastmlp" else 1.3,
        "zorder": 3 if rival == "fastmlp" else 2,
    }


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
    """Rows a second, with a band from the slowest round to the fastest."""

    def speed(case: dict[str, Any], entry: dict[str, Any]) -> tuple[float, float, float]:
        seconds, rows = entry["seconds"], case["rows"]
        return rows / max(seconds), rows / median(entry), rows / min(seconds)

    series = _series(document, axis, dtype, speed)
    if not series:
        return False
    for index, ((rival, name), points) in enumerate(series.items()):
        style = _style(rival, index)
        places = [place for place, _ in points]
        axes.plot(places, [v[1] for _, v in points], label=name, **style)
        axes.fill_between(
            places, [v[0] for _, v in points], [v[2] for _, v in points], color=style["color"], alpha=0.15, linewidth=0
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({place for points in series.values() for place, _ in points})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xlabel(label)
    axes.set_ylabel("samples a second (median, and from slowest to fastest round)")
    return True


def _errors(axes: Any, document: Document) -> bool:
    found = False
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        series = _series(document, "batch", dtype, lambda case, entry: entry["overall"])
        for index, ((rival, name), points) in enumerate(series.items()):
            found = True
            places, errors = [place for place, _ in points], [max(v, 1e-16) for _, v in points]
            axes.plot(places, errors, label=f"{name}, {dtype}", linestyle=line, **_style(rival, index))
    if not found:
        return False
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = sorted({case["value"] for case in document["cases"] if case["axis"] == "batch"})
    axes.set_xticks(every, [f"{place:,}" for place in every])
    axes.set_xlabel("batch size")
    axes.set_ylabel("|update - float64's| / |float64's|, over all parameters")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _roofline(axes: Any, document: Document) -> bool:
    peaks = document.get("peaks") or {}
    points: dict[str, list[tuple[float, float]]] = {}
    for case in document.get("cases", []):
        if not case["flops"]:
            continue
        for entry in timed(case):
            if entry["rival"] in ("fastmlp", "eager"):
                key = f"{entry['label'].split()[0]}, {case['problem']['dtype']}"
                points.setdefault(key, []).append((case["flops"] / case["bytes"], case["flops"] / median(entry)))
    if not points or "bytes" not in peaks:
        return False
    intensities = [x for values in points.values() for x, _ in values]
    low, high = min(intensities) / 2, max(intensities) * 2
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    dtypes = {key.rpartition(", ")[2] for key in points}
    for dtype, colour in (("float32", "#000000"), ("bfloat16", GRAY), ("float16", GRAY)):
        if dtype in dtypes and f"flops {dtype}" in peaks:
            peak = peaks[f"flops {dtype}"]
            roof = [min(peak, x * peaks["bytes"]) for x in grid]
            axes.plot(
                grid, roof, color=colour, linewidth=1.2, label=f"measured peak, {dtype}: {peak / 1e9:,.0f} GFLOP/s"
            )
    for index, (key, values) in enumerate(sorted(points.items())):
        rival = "fastmlp" if key.startswith("fastmlp") else "eager"
        filled = key.endswith("float32")
        axes.plot(
            [x for x, _ in values],
            [y for _, y in values],
            linestyle="none",
            marker=MARKERS[index],
            markersize=5,
            color=COLOURS[rival],
            markerfacecolor=COLOURS[rival] if filled else "none",
            label=key,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP / byte of the least traffic (above the slope: operands that stay in the caches)")
    axes.set_ylabel("FLOP/s")
    return True


def _accuracy(axes: Any, document: Document) -> bool:
    contenders = [c for c in document.get("contenders", []) if c["status"] == "ok"]
    if not contenders:
        return False
    palette = list(COLOURS.values())
    for index, contender in enumerate(contenders):
        colour = palette[index % len(palette)]
        for number, run in enumerate(contender["runs"]):
            seconds = [point["seconds"] for point in run["curve"]]
            accuracy = [100 * point["accuracy"] for point in run["curve"]]
            label = contender["label"] if number == 0 else None
            axes.plot(seconds, accuracy, color=colour, linewidth=1.1, alpha=0.8, label=label)
    for target in document["targets"]:
        axes.axhline(100 * target, color=GRAY, linewidth=0.7, linestyle=":")
    best = max(p["accuracy"] for c in contenders for run in c["runs"] for p in run["curve"])
    axes.set_ylim(100 * min(document["targets"]) - 8, math.ceil(100 * best) + 0.5)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training, without compilation, warm-up and evaluation")
    axes.set_ylabel("test accuracy (%)")
    return True
