"""The latency model's estimates of the device at hand, from the static report in this checkout.

The estimates are numbers that were computed where Triton's tools and machine code were at hand. A device that the model
has no constants for has none. A rehearsal takes those of an A100 at the batch sizes of the report, in their order, so
that the code runs; its items say so.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.static.latency import eager
from bench.static.latency.constants import CHIPS, Chip, chip_of

from .report import Report

__all__ = ["kernel_us", "library_us", "step_estimate"]

RESULTS = Path(__file__).parent.parent / "results" / "static" / "static.json"
#: How the model's kernels are called among the products of a step.
_KERNELS = {"fwd": "linear_fwd", "dgrad": "linear_dgrad", "update": "update", "head": "head"}


@lru_cache
def _rows(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    try:
        found = json.loads(path.read_text()).get("latency", [])
    except (OSError, ValueError):
        return {}
    return {(row["gpu"], row["mode"], row["batch"]): row for row in found}


def _chip(report: Report) -> Chip | None:
    if report.rehearsal:
        return CHIPS["A100 SXM 80 GB"]
    return chip_of(str(report.device.properties()["device"]))


def _row(report: Report, mode: str, batch: int) -> dict[str, Any]:
    chip = _chip(report)
    if chip is None:
        return {}
    rows = _rows(RESULTS)
    if report.rehearsal:
        batches = sorted({size for _, _, size in rows})
        batch = dict(zip(report.device.batches, batches, strict=False)).get(batch, -1)
    return rows.get((chip.name, mode, batch), {})


def step_estimate(report: Report, mode: str, batch: int) -> dict[str, Any]:
    """What an item of a step says beside the measured time: the estimates, and whose they are."""
    row = _row(report, mode, batch)
    if not row:
        return {}
    whose = f"{row['gpu']}, batch {row['batch']}" + (", standing in" if report.rehearsal else "")
    return {
        "estimate_us": row["step_us"],
        "estimate_eager_us": row["eager_us"],
        "estimate_of": f"{whose}; never measured",
        "estimate_kernels_us": _kernels(row),
    }


def _kernels(row: dict[str, Any]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for kernel in row["kernels"]:
        found.setdefault(kernel["kernel"], []).append(kernel["us"])
    return found


def kernel_us(report: Report, kind: str, number: int, mode: str, batch: int) -> float | None:
    """The estimate of launch ``number`` of a kind in the step; None for products that a step does not launch."""
    row = _row(report, mode, batch)
    if not row:
        return None
    if kind == "update":
        return sum(us for name, all_us in _kernels(row).items() if name.endswith("update") for us in all_us)
    launches = _kernels(row).get(_KERNELS[kind], [])
    return launches[number] if number < len(launches) else None


def library_us(report: Report, m: int, n: int, k: int, mode: str) -> float | None:
    """The model's estimate of a product [M, N] over K by cuBLAS."""
    chip = _chip(report)
    if chip is None:
        return None
    return eager.library_us(m, n, k, mode, chip)
