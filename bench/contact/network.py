"""Stage 2b: the reference network at four batch sizes, every optimizer and mode, float and uint8 inputs.

Three steps are compared with float64, and launches with graphs and with repeated launches bit by bit. Special cases
show what only a GPU has: its NaN, labels that are no class, many batch sizes, a thread that allocates while a graph is
captured, torch's newer setting of float32's precision.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

import fastmlp
from bench.static.workloads import float32_precision
from fastmlp import kernels
from tests.support.steps import Reference, converted, flat, network, problem
from tests.support.torchs import OPTIMIZERS

from .judging import NUMERICS, Tf32Products, dtype_of, run_share
from .report import Report

__all__ = ["run", "units"]

RULES = ("weight decay", "nesterov", "adamw")
INPUTS = ("uint8", "float")
STEPS = 3
#: The 32-bit NaN that a GPU's instructions make; a CPU's is 0x7FC00000.
GPU_NAN = 0x7FFFFFFF
_GROWTH = 16 << 20


def units(report: Report) -> list[str]:
    """Batch, input, mode, optimizer; a rehearsal takes a few combinations that cover every value."""
    batches = sorted(report.device.batches, reverse=True)
    cases: Iterable[tuple[int, str, str, str]] = itertools.product(batches, INPUTS, NUMERICS, RULES)
    if report.rehearsal:
        cases = zip(2 * batches, 2 * INPUTS, NUMERICS, (*RULES, RULES[0]), strict=True)
    special = [f"{name} -" for name in SPECIAL]
    return special + [f"train {batch} {kind} {mode} {rule}" for batch, kind, mode, rule in cases]


def run(unit: str, report: Report) -> None:
    """One combination, or one of the special cases."""
    name, *rest = unit.split(" ", 4)
    if name != "train":
        SPECIAL[name](report)
        return
    batch, kind, mode, rule = rest
    with float32_precision(mode):
        _train(report, kind == "uint8", int(batch), rule, mode)


def _start(report: Report) -> fastmlp.MLP:
    return network(report.device.sizes).to(report.device.name)


def _float32(report: Report) -> fastmlp.MLP:
    return converted(_start(report), torch.float32).to(report.device.name)


def _batch(report: Report, rows: int, *, pixels: bool = False) -> tuple[Tensor, Tensor]:
    x, y = problem(report.device.sizes, rows, uint8=pixels)
    return (x if pixels else x.float()).to(report.device.name), y.to(report.device.name)


def _train(report: Report, pixels: bool, batch: int, rule: str, mode: str) -> None:
    device, dtype, settings = report.device, dtype_of(mode), OPTIMIZERS[rule]
    x, y = _batch(report, batch, pixels=pixels)
    data = [(x, y)] * STEPS
    start = _start(report)
    expected = Reference(start, settings).train([(x if pixels else x.double(), y)] * STEPS).flat()
    compute = dtype if dtype.itemsize == 2 else None
    with Tf32Products() if mode == "tf32" else nullcontext():
        own = Reference(start, settings, master=torch.float32, compute=compute).train(data).flat()
    order = torch.arange(batch, device=device.name).repeat(STEPS)

    def trained(*, graph: bool, epoch: bool) -> Tensor:
        model = _float32(report)
        step = fastmlp.TrainStep(model, dtype=dtype, cuda_graph=graph, **settings)
        if epoch:
            step.epoch(x, y, batch, order)
        else:
            for batch_x, batch_y in data:
                step(batch_x, batch_y)
        return flat(model)

    for epoch in (False, True):
        what = f"{'epoch' if epoch else 'step'} {'uint8' if pixels else 'float'} batch {batch} {rule} {mode}"
        first = trained(graph=False, epoch=epoch)
        share = run_share(first, expected, own, STEPS)
        report.share(what, share, batch=batch, optimizer=rule, mode=mode, epoch=epoch)
        if not torch.equal(trained(graph=True, epoch=epoch), first):
            report.item(f"{what}: graph", "wrong", "the graph's parameters are not those of the launches")
        if epoch and not pixels:
            continue
        differ = sum(not torch.equal(trained(graph=False, epoch=epoch), first) for _ in range(device.repeats))
        if differ:
            report.item(f"{what}: repeats", "wrong", f"{differ} of {device.repeats} repeats differ from the first run")


def _nan(report: Report) -> None:
    """A NaN in one input reaches its whole row, the loss and the first layer's gradient, in every mode."""
    for mode in NUMERICS:
        dtype = dtype_of(mode)
        x, y = _batch(report, report.device.batches[0])
        bits = torch.tensor([GPU_NAN if dtype.itemsize == 4 else GPU_NAN >> 16], dtype=torch.int32)
        nan = bits.view(torch.float32) if dtype.itemsize == 4 else bits.short().view(dtype)
        x = x.to(dtype)
        x[1, 2] = nan.to(x.device)[0]
        with float32_precision(mode):
            model = _float32(report)
            weight, bias = (p.detach().to(dtype) for p in list(model.parameters())[:2])
            a, _ = kernels.linear_fwd(x, weight, bias, "sigmoid")
            step = fastmlp.TrainStep(model, lr=0.1, dtype=dtype)
            grads = step.gradients(x, y)
            loss = step(x, y)
        found = {
            "forward": bool(a[1].isnan().all()) and not bool(a[0].isnan().any()),
            "loss": bool(loss.isnan()),
            "gradient": bool(grads["layers.0.weight"][:, 2].isnan().all()),
        }
        lost = [name for name, kept in found.items() if not kept]
        report.item(f"GPU NaN, {mode}", "wrong" if lost else "ok", f"lost in {', '.join(lost)}" if lost else "")


def _labels(report: Report) -> None:
    """A label that is no class makes the loss NaN; in a rehearsal, where the tensors are on a CPU, it raises."""
    for label in (-1, report.device.sizes[-1]):
        x, y = _batch(report, report.device.batches[0])
        y[3] = label
        try:
            loss = fastmlp.TrainStep(_float32(report), lr=0.1)(x, y).item()
            status, reason = ("ok", "") if math.isnan(loss) else ("wrong", f"the loss is {loss:.4g}, not NaN")
        except IndexError as error:
            status, reason = ("ok" if report.rehearsal else "wrong"), f"IndexError: {error}"
        report.item(f"label {label}", status, reason)


def _batch_sizes(report: Report) -> None:
    """Many batch sizes, in two rounds: the second round needs no more memory than the first."""
    device = report.device
    step = fastmlp.TrainStep(_float32(report), lr=0.01)
    x, y = _batch(report, 8 * (device.batch_sizes + 1))
    before, taken = device.allocated(), list[int]()
    for _ in range(2):
        for i in range(device.batch_sizes):
            rows = 8 * (i + 1)
            step(x[:rows], y[:rows])
        taken.append(device.allocated() - before)
    grown = taken[1] > taken[0] + _GROWTH
    finite = bool(flat(step.model).isfinite().all())
    report.item(
        f"{device.batch_sizes} batch sizes",
        "wrong" if grown or not finite else "ok",
        "the second round took more memory" if grown else "" if finite else "parameters are not finite",
        bytes_by_round=taken,
    )


def _capture_beside_allocations(report: Report) -> None:
    """Another thread allocates page-locked and device memory while steps are captured."""
    device, stop, errors, rounds = report.device, threading.Event(), list[str](), 0

    def allocate() -> None:
        nonlocal rounds
        kept: list[Tensor] = []
        while not stop.is_set() and rounds < 2000:
            try:
                kept = [device.pinned(1 << 12), torch.empty((rounds % 64 + 1) << 16, device=device.name), *kept[:4]]
            except RuntimeError as error:
                errors.append(str(error).splitlines()[0])
                return
            rounds += 1

    x, y = _batch(report, device.batches[0])
    device.release()
    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(5):
            loss = fastmlp.TrainStep(_float32(report), lr=0.1)(x, y).item()
    finally:
        stop.set()
        thread.join()
    status = "wrong" if errors or not math.isfinite(loss) else "ok"
    report.item("capture beside allocations", status, "; ".join(errors), allocations=rounds)


def _fp32_precision(report: Report) -> None:
    """torch's newer setting of float32's precision is followed: tf32 products round differently.

    After it is set, torch refuses to answer for the older setting, so the process takes no other unit after this one.
    """
    report.spent = True
    x, y = _batch(report, report.device.batches[0])
    ends = []
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        model = _float32(report)
        fastmlp.TrainStep(model, lr=0.1)(x, y)
        ends.append(flat(model))
    followed = not torch.equal(*ends)
    report.item("fp32_precision", "ok" if followed else "wrong", "" if followed else "it is not followed")


SPECIAL = {
    "fp32_precision": _fp32_precision,
    "nan": _nan,
    "labels": _labels,
    "batch-sizes": _batch_sizes,
    "capture": _capture_beside_allocations,
}
