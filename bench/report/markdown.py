"""bench/RESULTS.md and its plots, from the committed JSON alone: ``python -m bench report``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure.machine import ROOT
from bench.measure.results import FOLDER, Document, load_all
from fastmlp.base.atomic import atomic_write

from .figures import PLOTS, caption, draw
from .members import members_section
from .tables import by_rival, duration, epoch_seconds, median, ratio_with_range, reached, spread, timed, timing_words

__all__ = ["NOT_MEASURED", "render", "write_report"]

NOT_MEASURED = "not measured yet: run `fastmlp bench full` on a GPU"

_SECTIONS = (
    ("Training step", ("step",), "Forward, softmax cross-entropy, backward and update of one batch."),
    ("Online training", ("online",), "Plain SGD, one sample per step. A time is that of the whole stretch of samples."),
    (
        "Epochs",
        ("epoch",),
        "Steps over data on the device, with rows gathered in a drawn order. A time is that of all steps together.",
    ),
    (
        "Single operations",
        ("linear_act", "linear_act_backward", "wgrad", "cross_entropy", "head"),
        "linear_act MxKxN: A = f(X W^T + b). linear_act_backward: (dX, dW, db). wgrad: (dW, db). cross_entropy MxC: "
        "loss and gradient. head MxKxC: last layer, loss and their backward pass.",
    ),
)

_INTRODUCTION = """# Results

`python -m bench report` generates this file from the JSON files under `bench/results/`; edit nothing here.
[README.md](README.md) says how the numbers are measured, and what they do not say.

Times are medians over rounds in which all contenders take turns. The spread is half the distance between the fastest
and the slowest round. "×" is how many times as fast as PyTorch eager in the same round: median, smallest and largest.
No spread is stated as less than 5 % either way, because one process may differ from the next by that much. Every
contender's result was compared with float64 before it was timed, and a wrong result has no time.
"""


def write_report(folder: Path = FOLDER, target: Path = ROOT / "bench" / "RESULTS.md") -> list[Path]:
    """Draw every plot and write the report; returns the paths.

    Raises:
        ValueError: there is no run below ``folder``, or a file that is not the JSON of one.
    """
    documents = load_all(folder)
    if not documents:
        raise ValueError(f"there are no runs below {folder}; measure with 'fastmlp bench full' first")
    plots: dict[str, list[tuple[str, Path]]] = {}
    paths = []
    measured_in_full = {d["machine"]["slug"] for d in documents if d["preset"] == "full"}
    for document in documents:
        slug = document["machine"]["slug"]
        roofline = document["preset"] == ("full" if slug in measured_in_full else "quick")
        for path in draw(document, folder / slug, roofline=roofline):
            plots.setdefault(path.stem, []).append((caption(document), path))
            paths.append(path)
    relative = {
        stem: [(text, Path(os.path.relpath(path, target.parent)).as_posix()) for text, path in drawn]
        for stem, drawn in plots.items()
    }
    atomic_write(target, render(documents, relative).encode())
    return [target, *paths]


def render(documents: list[Document], plots: dict[str, list[tuple[str, str]]]) -> str:
    """The text of the report; ``plots``: stem -> [(caption, path relative to the report)]."""
    times = [d for d in documents if d["kind"] == "times"]
    parts = [_INTRODUCTION, _machines(documents)]
    for title, kinds, text in _SECTIONS:
        parts.append(f"## {title}\n\n{text}\n\n{_table(times, kinds)}")
    parts.append(members_section(times, NOT_MEASURED))
    parts.append(_accuracy([d for d in documents if d["kind"] == "accuracy"]))
    parts.append(_figures(plots, documents))
    parts.append(_absent(times))
    return "\n".join(parts)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _machines(documents: list[Document]) -> str:
    lines = ["## Machines\n", *_head(["run", "device", "threads", "versions", "commit", "date", "command"])]
    for d in documents:
        about = d["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
        changed = " with changes" if about["changed_files"] else ""
        threads = "" if about["is_gpu"] else str(about["threads"])
        cells = [d["preset"], about["name"], threads, versions, f"{about['commit']}{changed}"]
        lines.append(_row([*cells, d["started"], f"`{d['command']}`"]))
    if not any(d["machine"]["is_gpu"] for d in documents):
        lines.append(_row(["full", "GPU", "", NOT_MEASURED, "", "", ""]))
    return "\n".join(lines) + "\n"


def _table(documents: list[Document], kinds: tuple[str, ...]) -> str:
    """One row per contender of a problem, three columns per device; the plots have the runs of the curves."""
    devices: dict[str, tuple[str, bool]] = {}
    ways: dict[str, dict[str, None]] = {}
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    # Where several runs of a device have the same case, the longest run counts.
    for d in sorted(documents, key=lambda d: d["rounds"]):
        slug, about = d["machine"]["slug"], d["machine"]
        chosen = [c for c in d["cases"] if c["problem"]["kind"] in kinds and not c["axis"]]
        if chosen:
            devices[slug] = (about["name"], about["is_gpu"])
            ways.setdefault(slug, {}).update(dict.fromkeys(filter(None, (timing_words(d, case) for case in chosen))))
        for case in chosen:
            cases.setdefault((case["problem"]["kind"], case["problem"]["name"]), {})[slug] = case
    gpu_is_missing = not any(is_gpu for _, is_gpu in devices.values())
    columns = [f"{name}: median" + "".join(f", {words}" for words in ways[slug]) for slug, (name, _) in devices.items()]
    lines = _head(["problem", "contender", *_interleave(columns, "spread", "×"), *(["GPU"] if gpu_is_missing else [])])
    for (kind, name), by_device in cases.items():
        title = name if len(kinds) == 1 else f"{kind} {name}"
        labels: dict[str, str] = {}
        for case in by_device.values():
            labels |= {entry["rival"]: entry["label"] for entry in sorted(timed(case), key=median)}
        for number, (rival, label) in enumerate(labels.items()):
            cells = [title if number == 0 else "", f"**{label}**" if rival == "fastmlp" else label]
            for slug in devices:
                found = by_device.get(slug)
                cells += _cells(found, rival)
            lines.append(_row([*cells, *([NOT_MEASURED if number == 0 else "″"] if gpu_is_missing else [])]))
    if len(lines) == 2:
        lines.append(_row([NOT_MEASURED if i == 1 else "" for i in range(3)]))
    return "\n".join(lines) + "\n"


def _interleave(names: list[str], *others: str) -> list[str]:
    return [cell for name in names for cell in (name, *others)]


def _cells(case: dict[str, Any] | None, rival: str) -> list[str]:
    """Median, spread and ratio, or why there are none."""
    entry = None if case is None else by_rival(case).get(rival)
    if case is None or entry is None:
        return ["", "", ""]
    if entry["status"] != "ok":
        return [f"{entry['status']}: {entry['reason']}", "", ""]
    return [duration(median(entry)), spread(entry), ratio_with_range(case, entry)]


def _accuracy(documents: list[Document]) -> str:
    lines = [
        "## Time to accuracy\n",
        "Seconds of training until 784-512-512-10 first reaches a test accuracy on FashionMNIST: mean and standard",
        "deviation over the runs that reach it, one run per seed, and their number where not all runs reach it.",
        "Set-up (compilation and warm-up) has a column of its own; evaluation is not counted.\n",
    ]
    gpu_is_missing = not any(d["machine"]["is_gpu"] for d in documents)
    for d in documents:
        targets = d["targets"]
        lines += [f"{d['machine']['name']}, {d['seeds']} seeds, `{d['command']}`:\n"]
        lines += _head(["contender", *(f"{100 * t:g} %" for t in targets), "best", "s per epoch", "set-up", "settings"])
        for c in d["contenders"]:
            if c["status"] != "ok":
                lines.append(_row([c["label"], f"{c['status']}: {c['reason']}", *[""] * (len(targets) + 3)]))
                continue
            cells = [f"**{c['label']}**" if c["name"].startswith("fastmlp") else c["label"]]
            cells += [reached(c, target) for target in targets]
            best = statistics.mean(max(p["accuracy"] for p in run["curve"]) for run in c["runs"])
            cells += [f"{100 * best:.2f} %", f"{epoch_seconds(c):.2f}", f"{c['setup_s']:.1f} s", c["settings"]]
            lines.append(_row(cells))
        lines.append("")
    if gpu_is_missing:
        lines.append(f"GPU: {NOT_MEASURED}.\n")
    return "\n".join(lines)


def _figures(plots: dict[str, list[tuple[str, str]]], documents: list[Document]) -> str:
    lines = ["## Plots\n"]
    gpu_is_missing = not any(d["machine"]["is_gpu"] for d in documents)
    for stem, title in PLOTS.items():
        lines.append(f"### {title}\n")
        for text, path in plots.get(stem, []):
            lines += [f"![{title}]({path})\n", f"{text}\n"]
        if not plots.get(stem):
            command = {"accuracy": "accuracy", "roofline": "quick", "members": "members"}.get(stem, "scaling")
            lines.append(f"CPU: not measured yet: run `fastmlp bench {command}`.\n")
        if gpu_is_missing:
            lines.append(f"GPU: {NOT_MEASURED}.\n")
    return "\n".join(lines)


def _absent(documents: list[Document]) -> str:
    """Every contender that was not timed in some problem, and why."""
    lines = ["## Not timed\n", *_head(["device", "contender", "reason", "problems"])]
    found: dict[tuple[str, str, str], set[str]] = {}
    for d in documents:
        for case in d["cases"]:
            for entry in case["results"]:
                if entry["status"] in ("unavailable", "wrong", "failed"):
                    reason = (
                        entry["reason"] if entry["status"] == "unavailable" else f"{entry['status']}: {entry['reason']}"
                    )
                    key = (d["machine"]["name"], entry["label"], reason)
                    found.setdefault(key, set()).add(case["problem"]["name"])
    for (device, label, reason), problems in sorted(found.items()):
        which = sorted(problems)
        text = ", ".join(which) if len(which) <= 3 else f"{len(which)} problems"
        lines.append(_row([device, label, reason, text]))
    return "\n".join(lines) + "\n"
