"""``fastmlp doctor``: versions, devices, where the data is, and every kernel checked on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from . import common
from .progress import cpu_name

TIMEOUT_S = 600
#: GPU memory of one process that checks a kernel, nearly all of it for the CUDA context.
PROCESS_BYTES = 1 << 30
#: Processes at once, since they take main memory too.
MOST_PROCESSES = 16


@click.command("doctor", short_help="Check this machine and every kernel.")
@common.fashion_mnist_option
@click.option("--all", "everything", is_flag=True, help="On a GPU: in every dtype, and for a batch of 1 as well.")
@common.json_option
def command(data: str | None, everything: bool, as_json: bool) -> int:
    """Show what fastmlp finds on this machine and check every kernel against the reference.

    On a GPU the kernels are checked in float32 and in one 16-bit dtype. Without one they run in Triton's interpreter,
    on small problems. The exit code is 1 if a check fails.
    """
    from fastmlp.cpu import about_choices

    report: dict[str, Any] = {
        "versions": common.versions(),
        "platform": platform.platform(),
        **_devices(),
        "cpu_products": about_choices(),
        "data": _data(data),
    }
    report["triton"] = _triton(report["gpus"])
    report["auto_backend"] = "triton" if report["triton"]["runs_on"] == "gpu" else "torch"
    if not as_json:
        for name, text in _lines(report):
            click.echo(f"{name:<16}{text}")
    report["checks"] = _checks(report, everything)
    report["ok"] = all(check["passed"] for check in report["checks"]) and report["data"]["problem"] is None
    if as_json:
        click.echo(json.dumps(report))
    else:
        for check in report["checks"]:
            click.echo(f"  {_verdict(check)}")
        passed, count = sum(check["passed"] for check in report["checks"]), len(report["checks"])
        click.echo(f"{passed} of {count} checks passed{'' if report['ok'] else '; this installation has problems'}")
    return 0 if report["ok"] else 1


def _devices() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
        }
        for gpu in map(torch.cuda.get_device_properties, range(count))
    ]
    return {"cuda": torch.version.cuda, "hip": torch.version.hip, "cpu": cpu_name(), "gpus": gpus}


def _data(folder: str | None) -> dict[str, Any]:
    """Where the full data is; UserError if ``folder`` does not have the data."""
    from fastmlp.data import find_fashion_mnist

    try:
        found = find_fashion_mnist(folder)
    except (OSError, RuntimeError) as error:
        if folder is not None:
            raise common.UserError(str(error)) from error
        return {"folder": None, "problem": str(error)}
    return {"folder": None if found is None else str(found), "problem": None}


def _triton(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the kernels can run: "gpu", "interpreter", or None without triton."""
    from fastmlp.backend import triton_available

    if not triton_available():
        note = "triton is not installed (it exists for Linux only), so its kernels are not checked"
        return {"runs_on": None, "note": note}
    if gpus:
        return {"runs_on": "gpu", "note": "Triton kernels on the GPU; --all takes every dtype"}
    note = "no GPU, so the Triton kernels run in Triton's interpreter, small problems"
    return {"runs_on": "interpreter", "note": note}


def _checks(report: dict[str, Any], everything: bool) -> list[dict[str, Any]]:
    from fastmlp.cli.selfcheck import run_checks

    found = []
    if report["triton"]["runs_on"] == "interpreter":
        found = _interpreted()
    elif report["triton"]["runs_on"] == "gpu":
        found = _on_gpu(report["gpus"][0], everything)
    return found + [dataclasses.asdict(result) for result in run_checks("cpu", "torch")]


def _interpreted() -> list[dict[str, Any]]:
    """The checks in Triton's interpreter, in a process of its own: the import of triton fixes the mode."""
    found = {"kernel": "all", "device": "cpu", "dtype": "-"}
    return _apart("Triton's interpreter", found, ["--problems", "small"], {"TRITON_INTERPRET": "1"})


def _on_gpu(gpu: dict[str, Any], everything: bool) -> list[dict[str, Any]]:
    """The checks on the first GPU, one process per kernel and dtype, as many at once as the machine has room for.

    Compiling takes nearly all of the time. A kernel that destroys its CUDA context stops no other check.
    """
    from fastmlp.cli.selfcheck import CHECKS

    dtypes = ["float32", "bfloat16", "float16"]
    if int(gpu["capability"].partition(".")[0]) < 8:
        dtypes.remove("bfloat16")  # Triton compiles bfloat16 from sm_80 on
    problems = "full" if everything else "short"
    jobs = [(kernel, dtype) for kernel in CHECKS for dtype in (dtypes if everything else dtypes[:2])]
    room = max(1, min(os.cpu_count() or 1, gpu["memory_bytes"] // PROCESS_BYTES, MOST_PROCESSES))

    def check(job: tuple[str, str]) -> list[dict[str, Any]]:
        kernel, dtype = job
        found = {"kernel": kernel, "device": "cuda", "dtype": dtype}
        return _apart("its process", found, ["--kernels", kernel, "--dtypes", dtype, "--problems", problems], {})

    with ThreadPoolExecutor(room) as pool:
        try:
            return [result for results in pool.map(check, jobs) for result in results]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _apart(who: str, failed: dict[str, Any], arguments: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """The results of `fastmlp.cli.selfcheck` in a process of its own, or one failed result if the process failed."""
    # The interpreter computes with numpy, which warns of overflow in lanes that are masked afterwards.
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "fastmlp.cli.selfcheck"]
    command += ["--backend", "triton", "--device", failed["device"], *arguments]
    failure = {**failed, "backend": "triton", "passed": False, "worst": "", "error": None, "allowed": None}
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return [{**failure, "message": f"{who} did not finish in {TIMEOUT_S} s"}]
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return [{**failure, "message": f"{who} failed: {last}"}]
    except ValueError:
        return [{**failure, "message": f"{who} gave no results"}]


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report without the checks, for reading."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in report["versions"].items())
    built = f"CUDA {report['cuda']}" if report["cuda"] else f"ROCm {report['hip']}" if report["hip"] else "CPUs only"
    gpus = [
        f"{gpu['name']} (compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
        f"{gpu['multiprocessors']} multiprocessors)"
        for gpu in report["gpus"]
    ]
    data, products = report["data"], report["cpu_products"]
    missing = "not on this machine; training will download it, or else use the bundled subset"
    return [
        ("versions", versions),
        ("torch built for", built),
        ("platform", report["platform"]),
        ("processor", report["cpu"]),
        ("CPU products", f"{products['measured_shapes']} shapes measured, kept in {products['file']}"),
        ("GPU", "; ".join(gpus) or "none that torch can use"),
        ("auto backend", report["auto_backend"]),
        ("data", data["problem"] or data["folder"] or missing),
        ("checks", report["triton"]["note"]),
    ]


def _verdict(check: dict[str, Any]) -> str:
    name = f"{check['backend']:<7}{check['device']:<6}{check['kernel']:<23}{check['dtype']:<10}"
    if not check["passed"]:
        return f"{name}FAILED  {' '.join(check['message'].split())}"
    return f"{name}ok      largest error {check['error']:.1e} of {check['allowed']:.1e} allowed ({check['worst']})"
