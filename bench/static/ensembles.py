"""A training step of an ensemble: launches, programs and bytes for 1 to 1,000 members, from recorded launches.

A loop over the members launches as many kernels for each of them, and each of its launches has the programs of one
member. The ensemble's bytes and FLOPs are those of the loop; the number of launches and the tiles are what differs.
"""

from __future__ import annotations

from typing import Any

import torch

import fastmlp
from fastmlp.kernels.configs import cdiv
from tests.compile.targets import TARGETS
from tests.ptxsim import Launch

from .gpus import GPUS, MODES, total_roofline
from .numbers import bytes_text, significant
from .tables import table
from .work import work_of

__all__ = ["ENSEMBLE_BATCH", "ENSEMBLE_MEMBERS", "ENSEMBLE_SIZES", "ensemble_rows", "ensemble_table"]

ENSEMBLE_SIZES, ENSEMBLE_BATCH = (64, 64, 64, 10), 64
ENSEMBLE_MEMBERS = (1, 10, 100, 1000)
#: Modes of the products, and their dtypes.
_MODES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _launches(target: str, members: int, dtype: torch.dtype) -> list[Launch]:
    """One step of AdamW with a rate per member."""
    x, y = torch.zeros(ENSEMBLE_BATCH, ENSEMBLE_SIZES[0]), torch.zeros(ENSEMBLE_BATCH, dtype=torch.int64)
    settings: dict[str, Any] = {"lr": [0.01 / (1 + e) for e in range(members)]}
    with TARGETS[target].simulated() as gpu, fastmlp.use_backend("triton"):
        model = fastmlp.MLPEnsemble(ENSEMBLE_SIZES, members)
        fastmlp.TrainStep(model, "adamw", dtype=dtype, **settings)(x, y)
    return gpu.launches


def ensemble_rows(target: str) -> list[dict[str, Any]]:
    """One row per mode and number of members."""
    return [_row(target, mode, members) for mode in _MODES for members in ENSEMBLE_MEMBERS]


def _row(target: str, mode: str, members: int) -> dict[str, Any]:
    launches = _launches(target, members, _MODES[mode])
    works = [work_of(launch) for launch in launches]
    multiprocessors = TARGETS[target].device.multiprocessors
    programs = {
        f"{i} {launch.name}": launch.grid[0] * launch.grid[1] * launch.grid[2] for i, launch in enumerate(launches)
    }
    return {
        "target": target,
        "mode": mode,
        "members": members,
        "launches": len(launches),
        "launches_of_a_loop": members * len(launches),
        "programs": programs,
        "busiest_multiprocessor": sum(cdiv(count, multiprocessors) for count in programs.values()),
        "bytes": sum(work.bytes for work in works),
        "matrix_flops": sum(work.matrix_flops for work in works),
        "roofline_microseconds": {
            name: significant(1e6 * total_roofline(works, gpu, MODES[mode]))
            for name, gpu in GPUS.items()
            if gpu.target == target
        },
    }


_INTRODUCTION = """## An ensemble's step

The step trains members of {} with AdamW and a rate per member, all on one batch of {} rows. "Launches" is one step of
all members, "in a loop" one step of a TrainStep for each of them. "Programs" has the programs of every launch, and
"busiest" how many of them the busiest multiprocessor has, all launches together. The rooflines are lower bounds from
published rates. Nothing was measured.
"""


def ensemble_table(rows: list[dict[str, Any]]) -> str:
    """The section of the report; empty for a report without such rows."""
    if not rows:
        return ""
    header = ["target", "products", "members", "launches", "in a loop", "programs", "busiest", "bytes", "roofline, us"]
    text = _INTRODUCTION.format("-".join(map(str, ENSEMBLE_SIZES)), ENSEMBLE_BATCH)
    cells = [
        (
            row["target"],
            row["mode"],
            f"{row['members']:,}",
            row["launches"],
            f"{row['launches_of_a_loop']:,}",
            ", ".join(f"{count:,}" for count in row["programs"].values()),
            f"{row['busiest_multiprocessor']:,}",
            bytes_text(row["bytes"]),
            ", ".join(f"{name} {time}" for name, time in row["roofline_microseconds"].items()),
        )
        for row in rows
    ]
    return f"{text}\n{table(header, cells, left=2)}"
