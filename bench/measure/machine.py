"""What a reader of a result must know: device, clocks, threads, versions, commit, and the machine's peaks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastmlp.cli.progress import cpu_name
from fastmlp.cpu import product_dtype

__all__ = ["ROOT", "describe", "device_name", "peaks", "pin_threads", "slug"]

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (
    "fastmlp",
    "torch",
    "triton",
    "numpy",
    "jax",
    "jaxlib",
    "scikit-learn",
    "apex",
    "tinycudann",
    "liger-kernel",
    "trainkernel",
)


def pin_threads(count: int | None = None) -> int:
    """Use ``count`` threads, by default one per core that this process may run on; returns the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = cores if count is None else count
    torch.set_num_threads(count)
    return count


def device_name(device: str) -> str:
    """The GPU's or the processor's name, without the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return cpu_name().rpartition(",")[0]


def slug(name: str, device: str, threads: int) -> str:
    """The name of a device's folder: letters, digits and dashes; a CPU's ends in its threads."""
    suffix = "" if device.startswith("cuda") else f" {threads} threads"
    return re.sub(r"[^a-z0-9]+", "-", f"{name}{suffix}".lower()).strip("-")


def describe(device: str) -> dict[str, Any]:
    """The machine, as the JSON of a run has it."""
    about: dict[str, Any] = {
        "device": device,
        "name": device_name(device),
        "is_gpu": device.startswith("cuda"),
        "processor": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "thread_settings": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))},
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "float32_precision": {
            "cuda": torch.backends.cuda.matmul.fp32_precision,
            "mkldnn": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        },
        **_commit(),
    }
    about["slug"] = slug(about["name"], device, about["threads"])
    if about["is_gpu"]:
        about["cuda"] = torch.version.cuda or torch.version.hip
        about["clocks"] = _clocks()
    return about


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The checkout's commit, and the files that the numbers depend on and that differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fastmlp", "kernels", "bench/*.py")
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "changed_files": changed.splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed_files": []}


def _clocks() -> str | None:
    """Present and highest clocks of the GPUs, as nvidia-smi prints them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = "name,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,persistence_mode"
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{fields}: {done.stdout.strip()}" if done.returncode == 0 else None


def peaks(device: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> dict[str, float]:
    """Measure the FLOP/s of a large square product in each dtype, and the bytes/s of a copy too large for the caches.

    On a CPU the product is that of the faster library, aten or oneDNN, in ``fastmlp.cpu.product_dtype``.
    """

    def best(run: Any, repeats: int = 5) -> float:
        times = []
        for _ in range(repeats + 1):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    n = 8192 if device.startswith("cuda") else 2048
    out = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        a = torch.rand(n, n, device=device).to(product_dtype(dtype, torch.device(device)))
        seconds = best(partial(torch.mm, a, a, out=torch.empty_like(a)))
        if device == "cpu" and torch.backends.mkldnn.is_available():
            onednn = partial(torch.ops.mkldnn._linear_pointwise, a, a, None, "none", [], "")
            seconds = min(seconds, best(onednn))
        out[f"flops {name}"] = 2 * n**3 / seconds
    source = torch.rand(64 << 20, device=device)
    target = torch.empty_like(source)
    out["bytes"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    return out
