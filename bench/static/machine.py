"""The machine code of every workload for every target: resources, occupancy, instructions, work and rooflines."""

from __future__ import annotations

from typing import Any

import torch

from tests.compile.machine_code import instructions, resources
from tests.compile.targets import TARGETS, Target
from tests.ptxsim import Launch

from .gpus import GPUS, MODES, roofline
from .instructions import mix
from .numbers import significant
from .occupancy import occupancy
from .work import Work, work_of
from .workloads import BATCHES, WORKLOADS, Workload, float32_precision

__all__ = ["GEMM_KERNELS", "machine_rows", "modes_of", "on_fma"]

#: The kernels that must use matrix units where the target has them.
GEMM_KERNELS = frozenset(
    {"_linear_fwd_kernel", "_linear_dgrad_kernel", "_linear_wgrad_kernel", "_head_kernel", "_wgrad_update_kernel"}
)
# One target per family of matrix units, and the targets of the GPUs of the rooflines.
_TF32_TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")


def on_fma(launch: Launch, dtype: torch.dtype) -> bool:
    """Whether NVIDIA's float32 products run outside of the matrix units, as the tile says."""
    return "ptx" in launch.asm and dtype == torch.float32 and launch.constexprs.get("INPUT_PRECISION") == "ieee"


def modes_of(target: Target, workload: Workload) -> list[str]:
    """The modes that are compiled: float32, one 16-bit dtype, and tf32 for matrix products where it differs."""
    half = "bfloat16" if torch.bfloat16 in target.dtypes else "float16"
    return ["float32", *(["tf32"] if workload.gemm and target.name in _TF32_TARGETS else []), half]


def machine_rows(name: str) -> list[dict[str, Any]]:
    """One row per launch of each workload on the target of that name."""
    target, rows = TARGETS[name], []
    for workload in WORKLOADS.values():
        for mode in modes_of(target, workload):
            for batch in BATCHES:
                with target.simulated(assemble=True) as gpu, float32_precision(mode):
                    workload.run(batch, getattr(torch, MODES[mode].dtype))
                rows += [_row(target, workload, mode, batch, launch) for launch in gpu.launches]
    return rows


def _row(target: Target, workload: Workload, mode: str, batch: int, launch: Launch) -> dict[str, Any]:
    needs, work = resources(launch), work_of(launch)
    # A kernel that asks for too much shared memory fits no multiprocessor; the findings say so.
    fits = needs.shared <= target.device.shared_limit
    resident = occupancy(target.name, needs.registers, needs.shared, launch.num_warps) if fits else None
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    together = resident.programs * target.device.multiprocessors if resident else 0
    return {
        "target": target.name,
        "workload": workload.name,
        "kernel": launch.name,
        "mode": mode,
        "batch": batch,
        "programs": programs,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "registers": needs.registers,
        "spilled": needs.spilled,
        "shared": needs.shared,
        "shared_limit": target.device.shared_limit,
        "occupancy": significant(resident.fraction) if resident else None,
        "resident_programs": resident.programs if resident else 0,
        "limited_by": resident.limited_by if resident else "shared memory",
        "waves": significant(programs / together) if together else None,
        "instructions": mix(instructions(launch).counts),
        "expects_tensor_core": launch.name in GEMM_KERNELS
        and bool(target.matrix_units[getattr(torch, MODES[mode].dtype)])
        and not on_fma(launch, getattr(torch, MODES[mode].dtype)),
        **_work(work),
        "roofline": _rooflines(target.name, mode, work),
    }


def _work(work: Work) -> dict[str, Any]:
    return {
        "matrix_flops": work.matrix_flops,
        "vector_flops": work.vector_flops,
        "bytes_read": work.read,
        "bytes_written": work.written,
        "intensity": significant(work.intensity),
    }


def _rooflines(target: str, mode: str, work: Work) -> dict[str, Any]:
    """The least time on each GPU with this target."""
    found = {}
    for name, gpu in GPUS.items():
        if gpu.target == target:
            line = roofline(work, gpu, MODES[mode])
            found[name] = {"microseconds": significant(1e6 * line.seconds), "bound": line.bound}
    return found
