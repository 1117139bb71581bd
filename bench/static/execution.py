"""Counts of the executed code: the compiled PTX of every workload run on the simulated GPU.

The counts are those of ``tests.ptxsim``: PTX instructions per warp, 32-byte sectors of global memory beside the fewest
sectors that each request needs, and wavefronts and bank conflicts of shared memory. No cache is modelled, so the
sectors are those that the programs ask of the L1 and L2 caches.

Large launches are sampled. All programs of a matrix product do the same, so only the first of them are executed, and
each row says how many. Counts are divided by the outputs of these programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

import fastmlp
from fastmlp.kernels.configs import cdiv
from tests.compile.targets import TARGETS
from tests.ptxsim import Launch, PtxKernel, Stats

from .gpus import MODES
from .machine import on_fma
from .numbers import significant
from .work import Work, work_of
from .workloads import BATCHES, SIZES, WORKLOADS, float32_precision, labels

__all__ = ["EXECUTED_TARGETS", "MATRIX_FLOPS", "STEP_BATCH", "execute", "execution_rows", "step_execution_rows"]

#: Two generations of NVIDIA's matrix instructions, each executed by one warp.
EXECUTED_TARGETS = ("sm_80", "sm_120")
#: The batch of the training step that is executed whole.
STEP_BATCH = 64
#: Matrix FLOPs of one launch that are executed at most, about: they take some seconds.
MATRIX_FLOPS = 3e8


def execution_rows(target: str, mode: str) -> list[dict[str, Any]]:
    """One row per launch of each workload, in one mode, on an architecture that can be executed."""
    rows = []
    for workload in WORKLOADS.values():
        if mode == "tf32" and not workload.gemm:
            continue
        for batch in BATCHES:
            with TARGETS[target].simulated() as gpu, float32_precision(mode):
                workload.run(batch, getattr(torch, MODES[mode].dtype))
            for launch in gpu.launches:
                of = {"target": target, "workload": workload.name, "mode": mode, "batch": batch}
                rows.append({**of, **_row(launch), "on_fma": on_fma(launch, getattr(torch, MODES[mode].dtype))})
    return rows


def step_execution_rows(target: str) -> list[dict[str, Any]]:
    """One row per launch of one ``fastmlp.TrainStep`` (float32, plain SGD) with every program executed."""
    x, y = torch.rand(STEP_BATCH, SIZES[0], generator=torch.Generator().manual_seed(0)), labels(STEP_BATCH)
    torch.manual_seed(0)
    model = fastmlp.MLP(SIZES)
    with TARGETS[target].simulated(execute=True) as gpu, fastmlp.use_backend("triton"):
        fastmlp.TrainStep(model, lr=0.1)(x, y)
    rows = []
    for launch in gpu.launches:
        assert launch.stats is not None
        counts = _counts(launch.stats, work_of(launch), 1.0)
        rows.append({"target": target, "kernel": launch.name, "programs": math.prod(launch.grid), **counts})
    return rows


def arguments_of(launch: Launch) -> Iterator[tuple[str, Any]]:
    """The kernel's run-time parameters in their order, with names; compiled-in values are left out."""

    def parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, tuple):
            for i, part in enumerate(value):
                yield from parts(f"{name}[{i}]", part)
        elif name not in launch.constexprs:
            yield name, value

    for name, value in launch.arguments.items():
        yield from parts(name, value)


def execute(launch: Launch, programs: int) -> tuple[Stats, int]:
    """Execute the first ``programs`` programs of a recorded launch, or all if there are fewer.

    Returns:
        The counts, and the number of executed programs.
    """
    x, y, z = launch.grid
    grid = launch.grid if programs >= x * y * z else (min(programs, x), 1, 1)
    kernel = PtxKernel(str(launch.asm["ptx"]), launch.shared, launch.num_warps)
    return kernel.launch(grid, dict(arguments_of(launch))), math.prod(grid)


def _row(launch: Launch) -> dict[str, Any]:
    work, total = work_of(launch), math.prod(launch.grid)
    ahead = _without_products(launch)
    programs = total
    if work.matrix_flops > MATRIX_FLOPS:
        programs = ahead + max(2, int((total - ahead) * MATRIX_FLOPS / work.matrix_flops))
    stats, executed = execute(launch, programs)
    share = (executed - ahead) / (total - ahead)
    return {"kernel": launch.name, "programs": total, "executed": executed, **_counts(stats, work, share)}


def _without_products(launch: Launch) -> int:
    """How many of the first programs add sums or average the loss: those of a weight gradient have no product."""
    if launch.name == "_wgrad_update_kernel":
        return int(launch.arguments["sum_programs"]) + (launch.arguments["loss_ptr"] is not None)
    if launch.name == "_linear_wgrad_kernel" and launch.constexprs["HAS_BIAS"]:
        return cdiv(int(launch.arguments["N"]), int(launch.constexprs["SUM_COLS"]))
    return 0


def _counts(stats: Stats, work: Work, share: float) -> dict[str, Any]:
    outputs = max(1.0, work.outputs * share)
    traffic = (stats.global_load, stats.async_copy, stats.global_store)
    sectors, least = (sum(t[what] for t in traffic) for what in ("sectors", "min_sectors"))
    shared = (stats.shared_load, stats.shared_store)
    wavefronts, conflicts = (sum(t[what] for t in shared) for what in ("wavefronts", "conflicts"))
    asked = 32 * (stats.global_load["sectors"] + stats.async_copy["sectors"])
    return {
        "wavefronts": wavefronts,
        "conflicts": conflicts,
        "warp_instructions": stats.warp_instructions,
        "warp_instructions_per_output": significant(stats.warp_instructions / outputs),
        "sectors": sectors,
        "sectors_over_minimum": significant(sectors / least) if least else None,
        "read_over_compulsory": significant(asked / (work.read * share)) if work.read else None,
        "wavefronts_per_output": significant(wavefronts / outputs),
        "conflict_share": significant(conflicts / wavefronts) if wavefronts else 0.0,
        "matrix_flops_over_needed": significant(stats.mma_flops / (work.matrix_flops * share))
        if work.matrix_flops
        else None,
        "on_matrix_units": stats.mma_flops > 0,
        "gemm": work.matrix_flops > 0,
        "barriers": stats.barriers,
    }
