"""The JSON of a run: its content, its place, and how it is written and read.

    {"format": 1, "kind": "times", "preset": ..., "command": ..., "started": ..., "machine": {...}, "peaks": {...},
     "cases": [{"problem": {...}, "axis": ..., "value": ..., "flops": ..., "bytes": ..., "rows": ...,
                "timing": ..., "results": [{"rival": ..., "label": ..., "notes": ..., "status": ..., "reason": ...,
                             "setup_s": ..., "calls": ..., "seconds": [...],
                             "error": ..., "allowed": ..., "worst": ..., "overall": ...}, ...]}, ...]}

``timing`` is "chain" (calls in a row) or "flushed" (a GPU's L2 cache was overwritten before each call); the module
``timing`` explains both. A run without ``timing`` on a GPU is "flushed".

``status`` is "ok" (timed), "unavailable" (not installed, no GPU, ...), "wrong" (the gate rejected it), "failed" (it
raised), or "left out" (not part of the preset). Only "ok" has ``seconds``, one number per round. Errors are relative to
float64. ``error`` is that of the ``worst`` tensor, ``allowed`` its limit, and ``overall`` the error of all tensors
together. ``bench.accuracy.run`` describes the other kind of run, "accuracy".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastmlp.base.atomic import atomic_write

from .machine import ROOT

__all__ = ["FOLDER", "FORMAT", "Document", "load", "load_all", "save", "timing_of"]

FORMAT = 1
FOLDER = ROOT / "bench" / "results"

Document = dict[str, Any]


def save(document: Document, folder: Path = FOLDER) -> Path:
    """Write a run to ``folder``/DEVICE/PRESET.json; returns the path."""
    path = folder / document["machine"]["slug"] / f"{document['preset']}.json"
    atomic_write(path, (json.dumps(_published(document), indent=1) + "\n").encode())
    return path


def _published(value: Any) -> Any:
    """``value`` with only the last name of each absolute path, such as those in the errors of contenders."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w.:/~-])/(?:[\w.+@~-]+/)+", ".../", value)
    if isinstance(value, dict):
        return {key: _published(item) for key, item in value.items()}
    return [_published(item) for item in value] if isinstance(value, (list, tuple)) else value


def load(path: Path) -> Document:
    """Read a run.

    Raises:
        ValueError: not the JSON of a run, or of another format.
        OSError: the file cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not a run of the benchmarks in format {FORMAT}; measure again")
    return document


def load_all(folder: Path = FOLDER) -> list[Document]:
    """Every run below ``folder``, in the order of the paths; the folder ``static`` has the static report, not runs."""
    return [load(path) for path in sorted(folder.glob("*/*.json")) if path.parent.name != "static"]


def timing_of(document: Document, case: dict[str, Any]) -> str:
    """How a case of a run was timed: "chain" or "flushed"."""
    known: str | None = case.get("timing")
    return known or ("flushed" if document["machine"].get("is_gpu") else "chain")
