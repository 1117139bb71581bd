"""The table of steps of many networks: microseconds of a member by contender and number of members."""

from __future__ import annotations

from typing import Any

from bench.measure.results import Document

from .tables import by_rival, duration, median, ratio, timed

__all__ = ["MEMBERS_AXIS", "curves", "largest_table", "member_seconds", "members_section"]

#: ``Case.axis`` of the steps of many networks.
MEMBERS_AXIS = "members"

_INTRODUCTION = """\
One training step of E networks of one shape, each on a batch of its own. A time is that of the whole step divided by E.
"×" is how many times as fast as the loop of eager PyTorch in the same round. The plot has the spread.
"""


def curves(document: Document) -> dict[str, list[dict[str, Any]]]:
    """The cases of each network, batch size and optimizer, by their number of members."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in document.get("cases", []):
        if case["axis"] == MEMBERS_AXIS:
            problem = case["problem"]
            title = f"{'-'.join(map(str, problem['sizes']))}, batch {problem['batch']}, {problem['optimizer']}"
            found.setdefault(title, []).append(case)
    return {title: sorted(cases, key=lambda case: int(case["value"])) for title, cases in found.items()}


def member_seconds(case: dict[str, Any], entry: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of a member and step: of the fastest round, median, of the slowest."""
    members, seconds = case["value"], entry["seconds"]
    return min(seconds) / members, median(entry) / members, max(seconds) / members


def _table(title: str, cases: list[dict[str, Any]]) -> list[str]:
    labels: dict[str, str] = {}
    for case in cases:
        labels |= {entry["rival"]: entry["label"] for entry in timed(case)}
    lines = [f"| {title} | {' | '.join(_number(case['value']) for case in cases)} |", "|---" * (len(cases) + 1) + "|"]
    for rival, label in labels.items():
        cells = [f"**{label}**" if rival == "fastmlp" else label]
        lines.append(f"| {' | '.join([*cells, *(_cell(case, rival) for case in cases)])} |")
    return [*lines, ""]


def largest_table(document: Document) -> list[str]:
    """The largest number of members: a row per network, batch size and optimizer, and a column per contender."""
    rows: list[tuple[str, dict[str, Any]]] = []
    labels: dict[str, str] = {}
    for title, cases in curves(document).items():
        rows.append((title, cases[-1]))
        labels |= {entry["rival"]: entry["label"] for entry in timed(cases[-1])}
    most = max(case["value"] for _, case in rows)
    header = [f"{_number(most)} networks, time per network", *labels.values()]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for title, case in rows:
        lines.append(f"| {' | '.join([title, *(_cell(case, rival) for rival in labels)])} |")
    return lines


def _number(members: int) -> str:
    return "1 member" if members == 1 else f"{members:,}"


def _cell(case: dict[str, Any], rival: str) -> str:
    entry = by_rival(case).get(rival)
    if entry is None or entry["status"] != "ok":
        return "–"
    times = ratio(case, entry)
    text = duration(member_seconds(case, entry)[1])
    return text if times is None or rival == "eager" else f"{text} ({times:.2f}×)"


def members_section(documents: list[Document], gpu: str) -> str:
    """The section of RESULTS.md; ``gpu`` is what it says where no GPU was measured."""
    lines = ["## Many networks\n", _INTRODUCTION]
    chosen = [document for document in documents if curves(document)]
    for document in chosen:
        about = document["machine"]
        lines.append(f"{about['name']}, {document['rounds']} rounds, `{document['command']}`:\n")
        for title, cases in curves(document).items():
            lines += _table(title, cases)
    if not any(not document["machine"]["is_gpu"] for document in chosen):
        lines.append("CPU: not measured yet: run `fastmlp bench members`.\n")
    if not any(document["machine"]["is_gpu"] for document in chosen):
        lines.append(f"GPU: {gpu}.\n")
    return "\n".join(lines)
