"""Two runs beside each other: what became slower or faster by more than their spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .results import Document
from .tables import by_rival, duration, median, spread
from .timing import quartiles

__all__ = ["Change", "compare", "print_changes"]

#: Less than this is no change, however narrow the spreads are.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Change:
    """One contender in one case of both runs; ``factor`` is the new time by the old."""

    problem: str
    label: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def factor(self) -> float:
        """New median time by old."""
        return median(self.after) / median(self.before)

    @property
    def verdict(self) -> str:
        """slower, faster or same: quartiles that do not overlap, and medians that differ by more than 5 %."""
        low_a, _, high_a = quartiles(self.before["seconds"])
        low_b, _, high_b = quartiles(self.after["seconds"])
        if self.factor > 1 + TOLERANCE and low_b > high_a:
            return "slower"
        if self.factor < 1 / (1 + TOLERANCE) and high_b < low_a:
            return "faster"
        return "same"


def compare(before: Document, after: Document) -> list[Change]:
    """Every contender that both runs have timed in the same case, the largest slowdown first.

    Raises:
        ValueError: the runs are not times, or have no case in common.
    """
    for document in (before, after):
        if document["kind"] != "times":
            raise ValueError(f"expected two runs of times, got one of kind {document['kind']!r}")

    def cases(document: Document) -> dict[tuple[str, str], dict[str, Any]]:
        return {(case["problem"]["kind"], case["problem"]["name"]): case for case in document["cases"]}

    old, new = cases(before), cases(after)
    changes = []
    for key in old.keys() & new.keys():
        first, second = by_rival(old[key]), by_rival(new[key])
        for name in first.keys() & second.keys():
            if first[name]["status"] == second[name]["status"] == "ok":
                changes.append(Change(": ".join(key), first[name]["label"], first[name], second[name]))
    if not changes:
        raise ValueError("the two runs have no case in common; compare runs of one preset")
    return sorted(changes, key=lambda change: (-change.factor, change.problem, change.label))


def print_changes(before: Document, after: Document, changes: list[Change]) -> None:
    """All changes as one table on standard output."""
    from rich.console import Console
    from rich.table import Table

    def title(document: Document) -> str:
        about = document["machine"]
        return f"{about['name']}, {about['threads']} threads, commit {about['commit']}, {document['started']}"

    table = Table(title=f"A: {title(before)}\nB: {title(after)}")
    for name in ("problem", "contender", "A", "spread", "B", "spread", "B / A", ""):
        table.add_column(name)
    colours = {"slower": "red", "faster": "green", "same": "dim"}
    for change in changes:
        table.add_row(
            change.problem,
            change.label,
            duration(median(change.before)),
            spread(change.before),
            duration(median(change.after)),
            spread(change.after),
            f"{change.factor:.2f}",
            f"[{colours[change.verdict]}]{change.verdict}[/]",
        )
    Console(soft_wrap=True).print(table)
