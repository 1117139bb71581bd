"""Numbers of a run as text: medians with their spread, ratios, and the table that a run ends with."""

from __future__ import annotations

from typing import Any

from .results import Document
from .rivals import BASELINE
from .timing import quartiles

__all__ = ["by_rival", "duration", "median", "print_run", "ratio", "spread", "timed"]


def median(entry: dict[str, Any]) -> float:
    """Median seconds a call of a result that was timed."""
    return quartiles(entry["seconds"])[1]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(entry: dict[str, Any]) -> str:
    """Half the distance between the quartiles, in percent of the median."""
    low, middle, high = quartiles(entry["seconds"])
    return f"±{50 * (high - low) / middle:.0f} %"


def timed(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's results that have times, in the order of the JSON."""
    return [entry for entry in case["results"] if entry["status"] == "ok"]


def by_rival(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The case's results by the contender's name."""
    return {entry["rival"]: entry for entry in case["results"]}


def ratio(case: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """How many times as fast as the baseline; None where that was not timed."""
    base = by_rival(case).get(BASELINE)
    return median(base) / median(entry) if base is not None and base["status"] == "ok" else None


def print_run(document: Document) -> None:
    """The run as one table on standard output."""
    from rich.console import Console
    from rich.table import Table

    about = document["machine"]
    table = Table(title=f"{document['preset']}: {about['name']}, {about['threads']} threads, commit {about['commit']}")
    for name, justify in (("problem", "left"), ("contender", "left"), ("median", "right"), ("spread", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("× eager", justify="right")
    table.add_column("FLOP/s", justify="right")
    for case in document["cases"]:
        title = f"{case['problem']['kind']}: {case['problem']['name']}"
        for entry in sorted(timed(case), key=median):
            times = ratio(case, entry)
            flops = f"{case['flops'] / median(entry) / 1e9:,.1f} G" if case["flops"] else ""
            row = (duration(median(entry)), spread(entry), "" if times is None else f"{times:.2f}", flops)
            table.add_row(title, entry["label"], *row)
            title = ""
        for entry in case["results"]:
            if entry["status"] in ("wrong", "failed", "unavailable"):
                table.add_row(title, entry["label"], f"[dim]{entry['status']}: {entry['reason']}[/dim]")
                title = ""
        table.add_section()
    Console(soft_wrap=True).print(table)
