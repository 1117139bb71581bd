"""Numbers of a run as text: medians with their spread, ratios, and the table at the end of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import click

from bench.measure.results import Document, timing_of
from bench.rivals import BASELINE, OURS

__all__ = [
    "by_rival",
    "duration",
    "epoch_seconds",
    "median",
    "print_accuracy",
    "print_run",
    "ratio",
    "ratio_with_range",
    "ratios",
    "reached",
    "spread",
    "stated_range",
    "timed",
    "timing_words",
]


def median(entry: dict[str, Any]) -> float:
    """Median seconds per call of a result that was timed."""
    return statistics.median(entry["seconds"])


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


#: The least spread that is stated. The rounds of one process do not show by how much the next process differs, which
#: has its data elsewhere in memory.
LEAST_SPREAD = 0.05


def stated_range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value, or ``LEAST_SPREAD`` either side of the median if that is more."""
    middle = statistics.median(values)
    return min(*values, middle / (1 + LEAST_SPREAD)), max(*values, middle * (1 + LEAST_SPREAD))


def spread(entry: dict[str, Any]) -> str:
    """Half the stated range of the rounds, in percent of the median."""
    smallest, largest = stated_range(entry["seconds"])
    return f"±{50 * (largest - smallest) / median(entry):.0f} %"


def timed(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a case that have times, in the order of the JSON."""
    return [entry for entry in case["results"] if entry["status"] == "ok"]


def by_rival(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of a case by the contender's name."""
    return {entry["rival"]: entry for entry in case["results"]}


def timing_words(document: Document, case: dict[str, Any]) -> str:
    """How the calls of a case were timed on a GPU; empty for a CPU, where there is one way."""
    if not document["machine"].get("is_gpu"):
        return ""
    return {"chain": "calls in a row", "flushed": "L2 overwritten before each call"}[timing_of(document, case)]


def ratios(case: dict[str, Any], entry: dict[str, Any]) -> list[float]:
    """How many times as fast as the baseline in each round; empty where the baseline was not timed."""
    base = by_rival(case).get(BASELINE)
    if base is None or base["status"] != "ok":
        return []
    return [theirs / own for theirs, own in zip(base["seconds"], entry["seconds"], strict=True)]


def ratio(case: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """The median of ``ratios``; None where there are none."""
    found = ratios(case, entry)
    return statistics.median(found) if found else None


def ratio_with_range(case: dict[str, Any], entry: dict[str, Any]) -> str:
    """Median and stated range of ``ratios``; the median alone for the baseline, whose ratios are all 1."""
    found = ratios(case, entry)
    if not found:
        return ""
    text = f"{statistics.median(found):.2f}"
    if entry["rival"] == BASELINE:
        return text
    smallest, largest = stated_range(found)
    return f"{text} ({smallest:.2f}–{largest:.2f})"


#: Characters of the longest label.
_LABEL = 37


def _line(label: str, cells: Iterable[str], ours: bool = False) -> None:
    *numbers, last = cells
    text = f"  {label:<{_LABEL}}" + "".join(f"{cell:>9}" for cell in numbers) + f"  {last}"
    click.echo(click.style(text, bold=True) if ours else text)


def print_run(document: Document) -> None:
    """Print a run in 80 columns: one block per problem, the fastest contender first."""
    about = document["machine"]
    click.echo(f"{document['preset']}: {about['name']}, {about['threads']} threads, commit {about['commit']}\n")
    absent: dict[tuple[str, str], int] = {}
    for case in document["cases"]:
        click.echo(f"{case['problem']['kind']}: {case['problem']['name']}")
        if words := timing_words(document, case):
            click.echo(f"  {words}")
        members = case["problem"].get("members")
        _line("contender", ("median", "a member" if members else "GFLOP/s", "x eager (range)"))
        for entry in sorted(timed(case), key=median):
            second = f"{case['flops'] / median(entry) / 1e9:,.1f}" if case["flops"] else ""
            if members:
                second = duration(median(entry) / members)
            compared = entry["rival"] != BASELINE and ratio_with_range(case, entry)
            row = (duration(median(entry)), second, compared or f"time {spread(entry)}")
            _line(entry["label"], row, entry["rival"] == OURS)
        for entry in case["results"]:
            if entry["status"] in ("wrong", "failed"):
                click.echo(f"  {entry['label']}: {entry['status']}: {entry['reason']}")
            elif entry["status"] == "unavailable":
                key = entry["label"], entry["reason"]
                absent[key] = absent.get(key, 0) + 1
        click.echo()
    if absent:
        click.echo("not timed")
    for (label, reason), count in sorted(absent.items()):
        click.echo(f"  {label}: {reason} ({count} of {len(document['cases'])} problems)")


def print_accuracy(document: Document) -> None:
    """Print a time to accuracy: mean and standard deviation over the seeds."""
    targets = document["targets"]
    about = document["machine"]
    click.echo(f"time to accuracy: {about['name']}, {about['threads']} threads, {document['seeds']} seeds\n")
    for contender in document["contenders"]:
        click.echo(f"{contender['label']} ({contender['settings']})")
        if contender["status"] != "ok":
            click.echo(f"  {contender['status']}: {contender['reason']}")
            continue
        for target in targets:
            click.echo(f"  {100 * target:g} %: {reached(contender, target)}")
        click.echo(f"  set-up {contender['setup_s']:.1f} s, {epoch_seconds(contender):.2f} s per epoch")


def reached(contender: dict[str, Any], target: float) -> str:
    """Seconds to a test accuracy: mean and standard deviation, and the number of runs that reach it if not all do."""
    runs = [run["reached"][str(target)] for run in contender["runs"]]
    seconds = [s for s in runs if s is not None]
    if not seconds:
        return "not reached"
    text = f"{statistics.mean(seconds):.1f}"
    if len(seconds) > 1:
        text += f" ± {statistics.stdev(seconds):.1f}"
    return f"{text} s" if len(seconds) == len(runs) else f"{text} s ({len(seconds)} of {len(runs)} runs)"


def epoch_seconds(contender: dict[str, Any]) -> float:
    """Mean seconds of training per epoch."""
    return statistics.mean(run["seconds"] / run["epochs"] for run in contender["runs"])
