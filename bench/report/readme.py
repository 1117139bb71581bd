"""The speed figures of README.md, between two markers, from the committed JSON alone (``fastmlp bench report``)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.measure.machine import ROOT
from bench.measure.results import Document
from bench.presets import REFERENCE
from fastmlp.base.atomic import atomic_write

from .figures import caption
from .markdown import NOT_MEASURED
from .tables import by_rival, duration, epoch_seconds, median, ratios, spread, stated_range

__all__ = ["BEGIN", "END", "speed_section", "update_readme"]

BEGIN = "<!-- speed: written by `fastmlp bench report` -->"
END = "<!-- end of speed -->"

#: Contenders of the table, by name, and their column.
_COLUMNS = {
    "fastmlp": "fastmlp",
    "eager": "PyTorch eager",
    "eager_fused": "eager, fused SGD",
    "compile_default": "torch.compile",
    "inplace": "in-place loop by hand",
    "jax": "JAX jit",
}


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


def _newest_first(documents: list[Document], kind: str, preset: str) -> list[Document]:
    chosen = [d for d in documents if d["kind"] == kind and d["preset"] == preset]
    return sorted(chosen, key=lambda d: str(d["started"]), reverse=True)


def _table(document: Document) -> list[str]:
    header = ["one training step", *_COLUMNS.values(), "GPU"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for number, case in enumerate(case for case in document["cases"] if _shown(case)):
        gpu = "″" if number else NOT_MEASURED
        cells = (_title(case["problem"]), *(_cell(case, rival) for rival in _COLUMNS), gpu)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"*{caption(document)}*", ""]


def _epochs(document: Document) -> list[str]:
    seconds = {c["label"]: epoch_seconds(c) for c in document["contenders"] if c["status"] == "ok"}
    text = "; ".join(f"{label}: {value:.2f} s" for label, value in seconds.items())
    about = f"Seconds of training an epoch of 60,000 images, mean of {document['seeds']} seeds: {text}."
    return [about, "", f"*{caption(document)}*", ""]


def speed_section(documents: list[Document]) -> str:
    """The text between the markers: a table of the ``quick`` runs, and the seconds an epoch of the accuracy runs.

    Those of the newest run are seen at once, those of other machines unfold.
    """
    steps, epochs = _newest_first(documents, "times", "quick"), _newest_first(documents, "accuracy", "accuracy")
    lines = [line for d in steps[:1] for line in _table(d)] + [line for d in epochs[:1] for line in _epochs(d)]
    older = [line for d in steps[1:] for line in _table(d)] + [line for d in epochs[1:] for line in _epochs(d)]
    if older:
        names = " and ".join(dict.fromkeys(str(d["machine"]["name"]) for d in (*steps[1:], *epochs[1:])))
        lines += [f"<details><summary>The same on {names}</summary>", "", *older, "</details>", ""]
    return "\n".join(lines)


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
