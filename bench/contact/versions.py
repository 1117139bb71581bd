"""Stage 0: versions, device, driver, clocks, power, MIG, and the C compiler that Triton's launchers need.

Modules are imported where they are needed, because a failed import is a result and must not hide the other results.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from .report import Report

__all__ = ["DEVICE", "run", "units"]

DEVICE = False
_PACKAGES = (
    "torch triton numpy click rich matplotlib safetensors pillow pytest pytest-benchmark pytest-xdist hypothesis jax "
    "jaxlib scikit-learn onnx onnxruntime lightning platformdirs liger-kernel trainkernel"
)
_FIELDS = (
    "name driver_version vbios_version mig.mode.current persistence_mode pstate temperature.gpu power.draw power.limit "
    "clocks.sm clocks.max.sm clocks.mem clocks.max.mem clocks_throttle_reasons.active ecc.mode.current memory.total "
    "memory.used utilization.gpu compute_mode"
)


def units(report: Report) -> list[str]:
    """Parts that fail independently."""
    return ["packages", "imports", "machine", "device", "nvidia-smi", "compiler"]


def run(unit: str, report: Report) -> None:
    """One part."""
    match unit:
        case "packages":
            found: dict[str, Any] = {name: _version(name) for name in _PACKAGES.split()}
            report.item(unit, "info", python=platform.python_version(), executable=sys.executable, **found)
        case "imports":
            for name in ("fastmlp", "fastmlp.kernels"):
                report.item(f"import {name}", file=importlib.import_module(name).__file__)
        case "machine":
            from bench.measure import machine

            about = machine.describe("cpu")
            keys = ("processor", "cores", "load_before", "platform", "commit", "changed_files")
            report.item(unit, "info", **{key: about[key] for key in keys})
        case "device":
            from .device import opened

            with opened(rehearsal=report.rehearsal) as device:
                report.item(unit, "info", **device.properties())
        case "nvidia-smi":
            from .device import Gpu, Rehearsal

            report.item(unit, "info", **(Rehearsal() if report.rehearsal else Gpu()).query(_FIELDS))
        case "compiler":
            _compiler(report)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler(report: Report) -> None:
    path = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if path is None:
        report.item("compiler", "failed", "no C compiler, which Triton builds its launchers with")
        return
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    report.item("compiler", path=path, version=done.stdout.splitlines()[0])
