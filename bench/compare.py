"""Two runs beside each other: what became slower or faster by more than their spread."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import click

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
    """All changes on standard output, the largest slowdown first."""
    for letter, document in (("A", before), ("B", after)):
        about = document["machine"]
        click.echo(
            f"{letter}: {document['preset']}, {about['name']}, {about['threads']} threads, commit {about['commit']}, "
            f"{document['started']}"
        )
    if before["machine"]["slug"] != after["machine"]["slug"]:
        click.echo("A and B were measured on different machines")
    colours = {"slower": "red", "faster": "green", "same": None}
    click.echo(f"\n{'':<7}{'B / A':>6}{'A':>9}{'spread':>8}{'B':>9}{'spread':>8}  contender, problem")
    for change in changes:
        sides = "".join(f"{duration(median(e)):>9}{spread(e):>8}" for e in (change.before, change.after))
        line = f"{change.verdict:<7}{change.factor:>6.2f}{sides}  {change.label}, {change.problem}"
        click.echo(click.style(line, fg=colours[change.verdict]))
    counts = Counter(change.verdict for change in changes)
    click.echo(f"\n{', '.join(f'{counts[verdict]} {verdict}' for verdict in colours)}")
