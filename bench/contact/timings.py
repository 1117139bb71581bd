"""Stage 3, alone on the machine: peaks, graph nodes, kernels hot and cold, steps, rivals, cuBLAS, the host's time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import fastmlp
from bench.measure import machine
from bench.problems import StepProblem
from bench.rivals import RIVALS
from bench.static.workloads import float32_precision
from bench.tune import products
from fastmlp import kernels
from fastmlp.kernels.dependent import dependent_launch
from tests.support.steps import converted, flat, network, problem

from .estimates import kernel_us, library_us, step_estimate
from .judging import dtype_of
from .report import Report

__all__ = ["run", "units"]

MODES = ("float32", "tf32", "bfloat16")
#: fastmlp itself, and contenders of a step that take minutes to build or run on a CPU only.
_LEFT_OUT = ("fastmlp", "compile_max_autotune", "whole_max_autotune", "sklearn", "numpy", "numpy_loop")
#: Contenders with the whole step in one graph.
_STRONGEST = ("whole_default", "cuda_graph")
#: The contenders of a rehearsal: those that need no compiler.
_REHEARSED = ("eager", "eager_fused", "cuda_graph", "fastmlp_modules")
_NODES = 100
_HOT = 20


def units(report: Report) -> list[str]:
    """The most important first, because time may run out."""
    batches = report.device.batches
    modes = MODES[-1:] if report.rehearsal else MODES
    rivals = [rival.name for rival in RIVALS if "step" in rival.kinds and rival.name not in _LEFT_OUT]
    if report.rehearsal:
        rivals = [name for name in rivals if name in _REHEARSED]
    # The strongest first: whole steps in one graph, then eager, then what compiles part of a step.
    rivals.sort(key=lambda name: (name not in _STRONGEST, "compile" in name and "graph" not in name, name != "eager"))
    grid = list(itertools.product(modes, batches))
    return [
        "peaks - 0",
        "gaps - 0",
        *(f"dependent {mode} {batch}" for mode, batch in itertools.product(modes, batches[:2])),
        *(f"step {mode} {batch}" for mode, batch in grid),
        *(f"host {mode} {batches[0]}" for mode in modes),
        *(f"kernels {mode} {batch}" for mode, batch in grid),
        *(f"rival:{name} {mode} {batch}" for name in rivals[:2] for mode, batch in grid),
        *(f"cublas {mode} {batch}" for mode, batch in grid),
        *(f"rival:{name} {mode} {batch}" for name in rivals[2:] for mode, batch in grid),
    ]


def run(unit: str, report: Report) -> None:
    """One kind of time."""
    what, mode, size = unit.split()
    batch = int(size)
    if what == "peaks":
        _peaks(report)
    elif what == "gaps":
        _gaps(report)
    else:
        name, _, rival = what.partition(":")
        function = {"step": _step, "dependent": _dependent, "host": _host, "kernels": _kernels, "cublas": _cublas}.get(
            name
        )
        with float32_precision(mode):
            if function is None:
                _rival(report, rival, mode, batch)
            else:
                function(report, mode, batch)


def _calls(report: Report, batch: int) -> int:
    """The calls of a chain: fewer where each takes milliseconds."""
    return max(1, min(report.device.calls, report.device.calls * 2048 // batch))


def _time(report: Report, name: str, us: float | None, **values: Any) -> None:
    """Send a time, which is None in a rehearsal."""
    report.item(name, "info", us=us, **values)


def _peaks(report: Report) -> None:
    # A CPU without 16-bit products takes minutes for one product of this size.
    for mode in ("float32", "tf32") if report.rehearsal else ("float32", "tf32", "bfloat16", "float16"):
        with float32_precision(mode):
            found = machine.peaks(report.device.name, (str(dtype_of(mode)).removeprefix("torch."),))
        flops, copied = (None, None) if report.rehearsal else (found[next(iter(found))], found["bytes"])
        text = f"{flops / 1e12:.1f} TFLOP/s, copy {copied / 1e9:,.0f} GB/s" if flops and copied else "rehearsed"
        report.item(f"cuBLAS {mode}", "info", table="facts", flops=flops, copy_bytes=copied, text=text)


def _gaps(report: Report) -> None:
    """Time per node of a graph of tiny kernels, in plain order or with programmatic dependent launch."""
    device = report.device
    x, out = torch.zeros(2, 1, 128, device=device.name)

    def nodes(count: int) -> float | None:
        def launch() -> None:
            for _ in range(count):
                kernels.activation_bwd(x, None, "identity", dz=out)

        return device.chain(device.capture(launch), _calls(report, 1))

    for name in _both_ways(report, "graph node"):
        one, many = nodes(1), nodes(1 + (1 if report.rehearsal else _NODES))
        us = None if one is None or many is None else (many - one) / _NODES
        _time(report, f"graph node, {name}", us, table="facts", one_node_us=one)


def _both_ways(report: Report, what: str) -> Iterator[str]:
    """Plain launches, then, where the device is able to make them, dependent ones; yields the name of each way."""
    yield "plain"
    try:
        dependent_launch(True)
    except RuntimeError as error:
        report.item(f"{what}, dependent launch", "info", str(error))
        return
    try:
        yield "dependent launch"
    finally:
        dependent_launch(False)


def _model(report: Report) -> fastmlp.MLP:
    return converted(network(report.device.sizes), torch.float32).to(report.device.name)


def _step(report: Report, mode: str, batch: int) -> None:
    """Steps on a batch on the device, back to back, and an epoch over uint8 images."""
    device, dtype, steps = report.device, dtype_of(mode), _calls(report, batch)
    x, y = (t.to(device.name) for t in problem(device.sizes, batch))
    x = x.to(dtype)
    step = fastmlp.TrainStep(_model(report), lr=0.01, dtype=dtype)
    us = device.chain(lambda: step(x, y), steps)
    estimates = step_estimate(report, mode, batch)
    _time(report, f"step {mode} {batch}", us, table="step", who="fastmlp", mode=mode, batch=batch, **estimates)
    images = problem(device.sizes, batch, uint8=True)[0].to(device.name)
    order = torch.arange(batch, device=device.name).repeat(steps)
    total = device.chain(lambda: step.epoch(images, y, batch, order), 3)
    us = None if total is None else total / steps
    _time(report, f"epoch {mode} {batch}", us, table="step", who="fm epoch", mode=mode, batch=batch, steps=steps)
    times = {name: None if t is None else t for name, (_, t) in device.kernels(lambda: step(x, y)).items()}
    report.item(f"kernels of a step {mode} {batch}", "info", kernels=times)


def _dependent(report: Report, mode: str, batch: int) -> None:
    """Steps with dependent launches beside steps without, whose parameters must agree bit by bit."""
    device, dtype, steps = report.device, dtype_of(mode), _calls(report, batch)
    x, y = (t.to(device.name) for t in problem(device.sizes, batch))
    images = problem(device.sizes, batch, uint8=True)[0].to(device.name)
    order = torch.arange(batch, device=device.name).repeat(steps)
    ends = []
    for how in _both_ways(report, f"step {mode} {batch}"):
        model = _model(report)
        step = fastmlp.TrainStep(model, lr=0.01, dtype=dtype)
        us = device.chain(partial(step, x.to(dtype), y), steps)
        _time(report, f"step, {how}, {mode} {batch}", us, table="facts")
        total = device.chain(partial(step.epoch, images, y, batch, order), 3)
        us = None if total is None else total / steps
        _time(report, f"step of an epoch, {how}, {mode} {batch}", us, table="facts")
        ends.append(flat(model))
    if len(ends) == 2:
        status = "ok" if torch.equal(*ends) else "wrong"
        report.item(f"plain and dependent launches agree bit by bit, {mode} {batch}", status)


def _host(report: Report, mode: str, batch: int) -> None:
    """Microseconds until the host may go on: step(x, y), a bare replay of a graph, eager PyTorch's step."""
    device, dtype = report.device, dtype_of(mode)
    x, y = (t.to(device.name) for t in problem(device.sizes, batch))
    x = x.to(dtype)
    step = fastmlp.TrainStep(_model(report), lr=0.01, dtype=dtype)
    plain = fastmlp.TrainStep(_model(report), lr=0.01, dtype=dtype, cuda_graph=False)
    plain(x, y)
    replay = device.capture(lambda: plain(x, y))
    eager = next(rival for rival in RIVALS if rival.name == "eager" and "step" in rival.kinds)
    kind = str(dtype).removeprefix("torch.")
    theirs = eager.build(StepProblem(device.sizes, batch, dtype=kind, device=device.name))
    calls = min(50, _calls(report, batch))  # few: a full queue of launches would make the host wait
    runs: tuple[tuple[str, Callable[[], object]], ...] = (
        ("step(x, y)", lambda: step(x, y)),
        ("step without graph", lambda: plain(x, y)),
        ("replay", replay),
        ("eager", theirs),
    )
    for name, call in runs:
        _time(report, f"host, {name}, {mode}, batch {batch}", device.host(call, calls), table="facts")


def _launches(report: Report, mode: str, batch: int) -> list[tuple[str, Callable[[], object], float | None]]:
    """(Name with the shape, launch, estimated microseconds in a step) of every kernel of a step."""
    device, dtype = report.device, dtype_of(mode)
    found: list[tuple[str, Callable[[], object], float | None]] = []
    for kind in ("fwd", "dgrad", "update"):
        for number, p in enumerate(products(kind, batch, dtype, device.name, device.sizes)):
            estimate = kernel_us(report, kind, number, mode, batch)
            found.append((f"{kind} {p.rows}x{p.cols} over {p.depth}", p.launch, estimate))
    width, classes = device.sizes[-2:]
    h = torch.rand(batch, width, device=device.name).to(dtype)
    w, b = torch.rand(classes, width, device=device.name).to(dtype), torch.zeros(classes, device=device.name).to(dtype)
    y = torch.zeros(batch, dtype=torch.int64, device=device.name)
    head = partial(kernels.head, h, w, b, y, activation="sigmoid", saved=h, scale=1 / batch)
    return [*found, (f"head {batch}x{classes} over {width}", head, kernel_us(report, "head", 0, mode, batch))]


def _hot(report: Report, launch: Callable[[], object], batch: int) -> float | None:
    """Microseconds of a launch among others of its kind in one graph."""

    def many() -> None:
        for _ in range(count):
            launch()

    count = 1 if report.rehearsal else _HOT
    launch()
    total = report.device.chain(report.device.capture(many), max(1, _calls(report, batch) // count))
    return None if total is None else total / count


def _kernels(report: Report, mode: str, batch: int) -> None:
    for name, launch, estimate in _launches(report, mode, batch):
        hot = _hot(report, launch, batch)
        cold = report.device.cold(launch, min(30, _calls(report, batch)))
        values = {"cold_us": cold, "estimate_us": estimate, "mode": mode, "batch": batch}
        _time(report, f"{name} {mode}", hot, table="kernels", **values)


def _cublas(report: Report, mode: str, batch: int) -> None:
    """The products of a step by torch.mm, forward, dX and dW of each layer."""
    device, dtype = report.device, dtype_of(mode)
    for k, n in itertools.pairwise(device.sizes):
        x, w, dz = (torch.rand(*shape, device=device.name).to(dtype) for shape in ((batch, k), (n, k), (batch, n)))
        a, dx, dw = torch.empty_like(dz), torch.empty_like(x), torch.empty_like(w)
        for name, shape, call in (
            ("fwd", (batch, n, k), partial(torch.mm, x, w.t(), out=a)),
            ("dgrad", (batch, k, n), partial(torch.mm, dz, w, out=dx)),
            ("wgrad", (n, k, batch), partial(torch.mm, dz.t(), x, out=dw)),
            ("linear with bias", (batch, n, k), partial(F.linear, x, w, w[:, 0].contiguous())),
        ):
            what = f"cuBLAS {name} {shape[0]}x{shape[1]} over {shape[2]} {mode}"
            values = {"estimate_us": library_us(report, *shape, mode), "mode": mode, "batch": batch}
            _time(report, what, _hot(report, call, batch), table="cublas", **values)


def _rival(report: Report, name: str, mode: str, batch: int) -> None:
    """A contender's steps, back to back like fastmlp's."""
    device = report.device
    rival = next(rival for rival in RIVALS if rival.name == name and "step" in rival.kinds)
    kind = str(dtype_of(mode)).removeprefix("torch.")
    timed = StepProblem(device.sizes, batch, dtype=kind, device=device.name)
    available = rival.available(timed)
    values = {"table": "step", "who": name, "mode": mode, "batch": batch}
    if not available.ok:
        report.item(f"{name} {mode} {batch}", "skipped", available.reason, **values)
        return
    run = rival.build(timed)
    _time(report, f"{name} {mode} {batch}", device.steps(run, _calls(report, batch)), **values)
