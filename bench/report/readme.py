"""The speed figures of README.md, between two markers, from the committed JSON alone: ``fastmlp bench report``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.measure.machine import ROOT
from bench.measure.results import Document
from bench.presets import REFERENCE
from fastmlp.base.atomic import atomic_write

from .figures import PLOTS, caption
from .members import largest_table
from .tables import by_rival, duration, epoch_seconds, median, ratios, spread, stated_range

__all__ = ["BEGIN", "END", "speed_section", "update_readme"]

BEGIN = "<!-- speed: written by `fastmlp bench report` -->"
END = "<!-- end of speed -->"

#: Contender -> its column of the table.
_COLUMNS = {
    "fastmlp": "fastmlp",
    "eager": "PyTorch eager",
    "eager_fused": "eager, fused SGD",
    "compile_default": "torch.compile",
    "inplace": "in-place loop by hand",
    "jax": "JAX jit",
}

_INTRODUCTION = """\
This is the speed of a training step of 784-512-512-10 (sigmoid, plain SGD) on one machine. All contenders take turns in
one run. A cell has the median time over the rounds. "×" is how many times as fast as eager PyTorch in the same round.
The brackets have the worst and the best round, or 5 % either way where the rounds differ less. Every result was
compared with float64 before it was timed.
"""
_NO_GPU = "**No GPU has been timed.** `fastmlp bench full` measures one.\n\n"
_MORE = """\
`fastmlp bench quick` and `fastmlp bench accuracy` measure these figures. All results and plots are in
[bench/RESULTS.md](bench/RESULTS.md). How they are measured, and what they do not say, is in
[bench/README.md](bench/README.md).
"""


def _shown(case: dict[str, Any]) -> bool:
    problem = case["problem"]
    of_the_readme = problem["kind"] in ("step", "online") and tuple(problem["sizes"]) == REFERENCE
    return of_the_readme and problem["optimizer"] == "sgd" and problem["activation"] == "sigmoid" and not case["axis"]


def _title(problem: dict[str, Any]) -> str:
    if problem["kind"] == "online":
        return f"{problem['samples']} samples one by one"
    return f"batch {problem['batch']:,}" + ("" if problem["dtype"] == "float32" else f", {problem['dtype']}")


def _cell(case: dict[str, Any], rival: str) -> str:
    entry = by_rival(case).get(rival)
    if entry is None or entry["status"] != "ok":
        return "–"
    times, text = ratios(case, entry), duration(median(entry))
    if rival == "eager" or not times:
        return f"{text} {spread(entry)}"
    smallest, largest = stated_range(times)
    return f"{text}: {statistics.median(times):.2f}× ({smallest:.2f}–{largest:.2f})"


def _newest(documents: list[Document], kind: str, preset: str, slug: str | None = None) -> Document | None:
    """The newest run of a preset; of one machine, if ``slug`` names its folder."""
    chosen = [d for d in documents if d["kind"] == kind and d["preset"] == preset]
    chosen = [d for d in chosen if slug in (None, d["machine"]["slug"])]
    return max(chosen, key=lambda d: str(d["started"]), default=None)


def _table(document: Document) -> list[str]:
    header = ["one training step", *_COLUMNS.values()]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for case in document["cases"]:
        if _shown(case):
            cells = (_title(case["problem"]), *(_cell(case, rival) for rival in _COLUMNS))
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"*{caption(document)}*", ""]


def _epochs(document: Document) -> list[str]:
    seconds = {c["label"]: epoch_seconds(c) for c in document["contenders"] if c["status"] == "ok"}
    text = ", ".join(f"{value:.2f} ({label})" for label, value in seconds.items())
    about = f"Seconds of training per epoch of 60,000 images, mean of {document['seeds']} seeds: {text}."
    return [about, "", f"*{caption(document)}*", ""]


def _members(document: Document) -> list[str]:
    """The steps of many networks; their JSON and their plot are in one folder."""
    plot = f"bench/results/{document['machine']['slug']}/members.png"
    about = (
        "An `MLPEnsemble` trains many networks of one shape in one step, each on a batch of its own. A cell has the "
        'median time of a step divided by the number of networks, and "×" is relative to the loop of eager PyTorch.'
    )
    return [about, "", *largest_table(document), "", f"![{PLOTS['members']}]({plot})", "", f"*{caption(document)}*", ""]


def speed_section(documents: list[Document]) -> str:
    """The text between the markers, of one machine: that of the newest ``quick`` run.

    A table of that run, and the seconds per epoch of the machine's accuracy run if it has one. Then the newest run of
    many networks, on whichever machine.
    """
    steps = _newest(documents, "times", "quick")
    if steps is None:
        return f"{_INTRODUCTION}\n{_MORE}"
    epochs = _newest(documents, "accuracy", "accuracy", steps["machine"]["slug"])
    many = _newest(documents, "times", "members")
    lines = [*_table(steps), *(_epochs(epochs) if epochs else []), *(_members(many) if many else [])]
    where = "" if any(d["machine"]["is_gpu"] for d in documents) else _NO_GPU
    return "\n".join([_INTRODUCTION, *lines, f"{where}{_MORE}"])


def update_readme(documents: list[Document], readme: Path = ROOT / "README.md") -> None:
    """Replace what is between the markers.

    Raises:
        ValueError: the file does not have both markers.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} does not have the lines {BEGIN} and {END}")
    atomic_write(readme, f"{before}{BEGIN}\n\n{speed_section(documents)}\n{END}{after}".encode())
