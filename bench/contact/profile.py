"""Stage 4: the profiler's kernels of one step per batch size, and compute-sanitizer's memcheck."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import fastmlp
from tests.support.steps import converted, network, problem

from .pool import ROOT
from .report import Report

__all__ = ["run", "units"]


def units(report: Report) -> list[str]:
    """A profile per batch size, then the memory check."""
    return [*(f"profile {batch}" for batch in report.device.batches), "memcheck 0"]


def run(unit: str, report: Report) -> None:
    """One profile, or the memory check."""
    what, batch = unit.split()
    if what == "memcheck":
        _memcheck(report)
        return
    device = report.device
    x, y = (t.to(device.name) for t in problem(device.sizes, int(batch)))
    for dtype in (torch.float32, torch.bfloat16):
        model = converted(network(device.sizes), torch.float32).to(device.name)
        step = fastmlp.TrainStep(model, lr=0.01, dtype=dtype)
        given = x.to(dtype)
        for _ in range(3):
            step(given, y)
        for name, (count, us) in device.kernels(lambda: step(given, y)).items():  # noqa: B023
            report.item(name[:80], "info", batch=int(batch), dtype=str(dtype), launches=count, us=us)


def sanitizer() -> str | None:
    """The path of compute-sanitizer, on PATH or in a CUDA toolkit; None if there is none."""
    found = shutil.which("compute-sanitizer")
    folders = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return found or next((str(path) for path in folders), None)


def _memcheck(report: Report) -> None:
    """Every kernel once under the tool, whose exit status is 9 after an error; a rehearsal runs without the tool."""
    command = [sys.executable, "-m", "bench.contact.every_launch"]
    if report.rehearsal:
        command.append("--rehearse")
    elif (tool := sanitizer()) is not None:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    else:
        report.item("memcheck", "skipped", "compute-sanitizer is not installed")
        return
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, report.seconds_left), check=False
    )
    (report.out / "memcheck.txt").write_text(done.stdout[-100_000:] + done.stderr[-100_000:])
    lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "Error" in line]
    status = {0: "ok", 9: "wrong"}.get(done.returncode, "failed")
    report.item("memcheck", status, lines[-1] if lines else f"exit status {done.returncode}", lines=lines[:10])
