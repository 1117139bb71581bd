"""Two runs beside each other: what became slower or faster by more than their spread.

A contender is compared by its time in units of the baseline's time in the same round, which changes little on a machine
that is slower today. The baseline is compared by its time, and so is every contender of a run without the baseline. The
spread of n rounds is their whole range. The ranges of two runs of n rounds differ by chance alone once in C(2n, n) / 2
comparisons, which is 126 for n = 5. The spread is at least 5 % either side of the median, because the rounds share one
process, and the next process has its data elsewhere in memory.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import click

from bench.measure.results import Document, timing_of
from bench.rivals import BASELINE

from .tables import by_rival, duration, median, ratio_with_range, ratios, spread, stated_range

__all__ = ["Change", "compare", "print_changes"]

_Case = dict[str, Any]
_Entry = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One contender in one case of both runs: (case, entry) before and after."""

    problem: str
    label: str
    before: tuple[_Case, _Entry]
    after: tuple[_Case, _Entry]

    @property
    def relative(self) -> bool:
        """Whether times are in units of the baseline's time."""
        own = self.before[1]["rival"] == BASELINE
        return not own and bool(ratios(*self.before)) and bool(ratios(*self.after))

    def _times(self, side: tuple[_Case, _Entry]) -> list[float]:
        return [1 / r for r in ratios(*side)] if self.relative else side[1]["seconds"]

    @property
    def factor(self) -> float:
        """The new median time divided by the old."""
        return statistics.median(self._times(self.after)) / statistics.median(self._times(self.before))

    @property
    def agrees(self) -> bool:
        """Whether the stated ranges overlap."""
        a, b = stated_range(self._times(self.before)), stated_range(self._times(self.after))
        return a[0] <= b[1] and b[0] <= a[1]

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        if self.agrees:
            return "same"
        return "slower" if self.factor > 1 else "faster"


def compare(before: Document, after: Document) -> list[Change]:
    """Every contender that both runs have timed in the same case, the largest slowdown first.

    Raises:
        ValueError: a run is no run of times, or the runs have no case in common that was timed alike.
    """
    for document in (before, after):
        if document["kind"] != "times":
            raise ValueError(f"expected two runs of times, got one of kind {document['kind']!r}")

    def cases(document: Document) -> dict[tuple[str, str, str], _Case]:
        """The cases by kind, name and way of timing, because times taken in two ways cannot be compared."""
        return {
            (case["problem"]["kind"], case["problem"]["name"], timing_of(document, case)): case
            for case in document["cases"]
        }

    old, new = cases(before), cases(after)
    changes = []
    for key in old.keys() & new.keys():
        first, second = by_rival(old[key]), by_rival(new[key])
        for name in first.keys() & second.keys():
            if first[name]["status"] == second[name]["status"] == "ok":
                sides = (old[key], first[name]), (new[key], second[name])
                changes.append(Change(": ".join(key[:2]), first[name]["label"], *sides))
    if not changes:
        raise ValueError("the two runs have no case in common that was timed alike; compare runs of one preset")
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
    click.echo(f"\n{'':<7}{'B / A':>6}{'A':>24}{'B':>24}  contender, problem")
    for change in changes:
        sides = "".join(f"{_side(change, side):>24}" for side in (change.before, change.after))
        line = f"{change.verdict:<7}{change.factor:>6.2f}{sides}  {change.label}, {change.problem}"
        click.echo(click.style(line, fg=colours[change.verdict]))
    counts = Counter(change.verdict for change in changes)
    agree = sum(change.agrees for change in changes)
    click.echo(
        f"\n{', '.join(f'{counts[verdict]} {verdict}' for verdict in colours)}; "
        f"{agree} of {len(changes)} agree within their spread"
    )


def _side(change: Change, side: tuple[_Case, _Entry]) -> str:
    if change.relative:
        return f"{ratio_with_range(*side)} x"
    return f"{duration(median(side[1]))} {spread(side[1])}"
