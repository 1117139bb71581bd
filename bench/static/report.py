"""The whole report: its parts are collected in parallel and written as JSON and Markdown."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastmlp.base.atomic import atomic_write
from tests.compile.targets import TARGETS

from .ensembles import ensemble_rows
from .execution import EXECUTED_TARGETS, execution_rows, step_execution_rows
from .findings import findings
from .gpus import GPUS
from .latency.rows import LATENCY_TARGETS, constant_rows, latency_rows
from .machine import machine_rows
from .markdown import markdown
from .numerics import NUMERICS_MODES, numerics_rows
from .steps import STEP_TARGETS, step_rows

__all__ = ["collect", "dump", "write"]

SECTIONS = ("machine", "execution", "steps", "ensembles", "step_execution", "latency", "numerics")
EXECUTED_MODES = ("float32", "bfloat16", "tf32")

Part = tuple[str, Callable[..., list[dict[str, Any]]], tuple[str, ...]]


def parts() -> list[Part]:
    """(section, function, its arguments) of every independent part, the longest first."""
    return [
        *(("execution", execution_rows, (target, mode)) for mode in EXECUTED_MODES for target in EXECUTED_TARGETS),
        *(("steps", step_rows, (target,)) for target in STEP_TARGETS),
        *(("ensembles", ensemble_rows, (target,)) for target in STEP_TARGETS),
        *(("latency", latency_rows, (target,)) for target in LATENCY_TARGETS),
        ("step_execution", step_execution_rows, ("sm_80",)),
        *(("machine", machine_rows, (target,)) for target in TARGETS),
        *(("numerics", numerics_rows, (mode,)) for mode in NUMERICS_MODES),
    ]


def collect(jobs: int, progress: Callable[[str], None], chosen: Iterable[Part] | None = None) -> dict[str, Any]:
    """Collect every part, and what the parts say about the limits.

    Args:
        jobs: number of processes.
        progress: gets a line per part that is done.
        chosen: the parts to collect; all by default.
    """
    todo = list(parts() if chosen is None else chosen)
    found: dict[int, list[dict[str, Any]]] = {}
    # Not forked: torch's threads and Triton's driver would come along.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _one_thread) as pool:
        numbers = {pool.submit(function, *arguments): i for i, (_, function, arguments) in enumerate(todo)}
        for future in as_completed(numbers):
            i = numbers[future]
            found[i] = future.result()
            progress(f"{todo[i][0]} {' '.join(todo[i][2])}: {len(found[i])} rows ({len(found)} of {len(todo)})")
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    for i, (section, _, _) in enumerate(todo):
        sections[section] += found[i]
    return {
        "versions": {name: version(name).split("+")[0] for name in ("torch", "triton")},
        "constants": constant_rows(),
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "findings": [asdict(f) for f in findings(sections["machine"], sections["execution"], sections["numerics"])],
        **sections,
    }


def _one_thread() -> None:
    torch.set_num_threads(1)


def dump(report: dict[str, Any]) -> str:
    """JSON with one row per line, so that a difference shows the rows that changed."""
    sections = []
    for name, value in report.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            sections.append(f"{json.dumps(name)}: [\n{rows}\n ]")
        else:
            sections.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(sections) + "\n}\n"


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write static.json and STATIC.md into ``folder``; returns their paths."""
    files = {folder / "static.json": dump(report), folder / "STATIC.md": markdown(report)}
    for path, text in files.items():
        atomic_write(path, text.encode())
    return list(files)
