"""Stage 1: every kernel once in float32 and bfloat16, three steps with and without graphs, an epoch, tuple arguments.

Its units run in many processes with one cache of compiled kernels, which later stages find filled.
"""

from __future__ import annotations

import math

import torch

import fastmlp
from bench.tune import products
from fastmlp.cli import selfcheck
from fastmlp.cli.selfcheck import CHECKS, Problem
from tests.kernels.launches import LAUNCHES
from tests.support.steps import converted, flat, network, problem

from .judging import product_share
from .report import Report

__all__ = ["run", "units"]

DTYPES = ("float32", "bfloat16")
STEPS = 3


def units(report: Report) -> list[str]:
    """The steps first, because they compile most. A rehearsal takes some kernels, because the tests execute all."""
    every = 3 if report.rehearsal else 1
    steps = [f"{what} {dtype}" for what in ("steps", "tuple") for dtype in DTYPES]
    checks = [f"check {dtype} {name}" for name in list(CHECKS)[::every] for dtype in DTYPES]
    return [*steps, *checks, *(f"launch float32 {name}" for name in list(LAUNCHES)[::every])]


def run(unit: str, report: Report) -> None:
    """One kernel in one dtype, or the steps."""
    what, kind, *name = unit.split(" ", 2)
    dtype, device = getattr(torch, kind), torch.device(report.device.name)
    if what == "steps":
        _steps(report, kind, dtype)
    elif what == "tuple":
        (product,) = products("update", report.device.batches[0], dtype, device.type, report.device.sizes)
        share, result = product_share(product, kind)
        report.share(f"tuple arguments, {kind}", share, result=result)
    elif what == "check":
        _check(report, name[0], kind, Problem(*selfcheck.SMALL[0], dtype, device))
    else:
        results = [t for t in LAUNCHES[name[0]](device) if t is not None]
        unwritten = sum(not bool(t.isfinite().all()) for t in results if t.is_floating_point())
        status = "wrong" if unwritten else "ok"
        report.item(name[0], status, f"{unwritten} results are not finite" if unwritten else "", results=len(results))


def _check(report: Report, name: str, kind: str, operands: Problem) -> None:
    worst, share, count = "", -1.0, 0
    for comparison in CHECKS[name](operands, "triton"):
        count += 1
        error, allowed = comparison.error, comparison.allowed
        found = 0.0 if error == 0 else error / allowed if math.isfinite(error) and allowed > 0 else math.inf
        if found > share:
            worst, share = comparison.what, found
    report.share(f"{name}, {kind}", share, result=worst, results=count)


def _steps(report: Report, kind: str, dtype: torch.dtype) -> None:
    device, batch = report.device, report.device.batches[0]
    x, y = (t.to(device.name) for t in problem(device.sizes, batch))
    pixels = problem(device.sizes, batch, uint8=True)[0].to(device.name)
    start = network(device.sizes)
    ends = {}
    for graph in (False, True):
        model = converted(start, torch.float32).to(device.name)
        step = fastmlp.TrainStep(model, lr=0.1, dtype=dtype, cuda_graph=graph)
        losses = [step(x.float(), y).clone() for _ in range(STEPS)]
        losses.append(step.epoch(pixels, y, batch, order=torch.arange(batch, device=device.name).repeat(STEPS)))
        ends[graph] = torch.cat([flat(model), torch.stack(losses).double()])
        how = "graph" if graph else "launches"
        finite = bool(ends[graph].isfinite().all())
        report.item(
            f"steps and epoch, {how}, {kind}", "ok" if finite else "wrong", losses=[loss.item() for loss in losses]
        )
    same = torch.equal(ends[False], ends[True])
    report.item(f"graph and launches agree bit by bit, {kind}", "ok" if same else "wrong", backend=step.backend)
