"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .ensembles import ensemble_table
from .findings import LIMITS
from .gpus import GPUS
from .instructions import GROUPS
from .latency.text import latency_text
from .numbers import bytes_text, compact
from .tables import table
from .workloads import WORKLOADS

__all__ = ["markdown", "table"]

Row = dict[str, Any]

_INTRODUCTION = """# Static performance report

This report says what the kernels cost, without a GPU. It has machine code that was compiled for every target, and
compiled code that was executed on a simulated GPU. Times are rooflines, which are lower bounds from published rates.
Nothing here was measured on hardware. `python -m bench.static` writes this file and its numbers, `static.json`.
"""

_STEPS = """## A training step

The step trains 784-512-512-10 with sigmoid, cross-entropy, plain SGD and float32. fastmlp's launches are recorded on a
simulated GPU. Eager PyTorch's kernels are its dispatched aten operations (forward, CrossEntropyLoss, backward,
optimizer). Each operation that is no view and no allocation counts as one kernel, which is a lower bound. Bytes are
compulsory: every kernel reads its operands once and writes its results once. "x, y" begins at a batch. "uint8 on the
device" begins at images, labels and row numbers in device memory. An `aten.copy_` in a fastmlp step copies the step's
few numbers to the device. The roofline takes fastmlp's float32 as three tf32 products, and torch's, whose default is no
tf32, as FMA. Kernels run one after another.
"""

_ROOFLINES = """## Rooflines

The table has the least time of each kernel in microseconds. It is the largest of bytes / bandwidth, matrix FLOPs /
matrix rate and other FLOPs / vector rate. The brackets say what bounds it (m: memory, x: matrix units, v: vector
units). float32 is three tf32 products on NVIDIA's tensor cores and one float32 product on AMD's matrix units. A launch
takes a few microseconds more, unless graphs or the queue hide them. FLOPs/byte counts mathematical products once. Where
tiles or splits differ by target, FLOPs and bytes are those of the first target. "-" is a kernel that the GPU does not
need.
"""

_EXECUTION = """## Executed code

The counts are those of the executed PTX. "Sectors over min." has the sectors (32 bytes) that the programs' global
accesses touch, divided by the fewest that each single access needs. Where a thread reads neighbouring elements one by
one, the L1 cache has the sector after the first access. No cache is modelled. "Read over compulsory" has the bytes that
the programs ask of the caches, divided by the bytes that must come from memory. "Products" has the executed matrix
FLOPs, divided by the needed ones (float32 is three products). Large launches are sampled: "programs" says how many of
how many were executed.
"""

_MACHINE = """## Machine code

The tables have registers per thread, spills (bytes per thread, on AMD also registers), and bytes of shared memory per
program. Occupancy is the share of the multiprocessor's warps that are resident, and "limited by" names its limit. Waves
are programs divided by the programs that all multiprocessors hold. The instruction mix is static: each instruction
counts once, wherever it stands. Integer has logic, moves and addresses too.
"""

_STEP_EXECUTION = """### A step executed

These are the launches of one `fastmlp.TrainStep(x, y)` of the same network in float32 at batch 64. Every program was
executed on a simulated {}.
"""

_NUMERICS = """## Numerics

The table has the errors against float64 of the kernels (executed for sm_80) and of torch on a CPU in the same dtype:
largest and root-mean-square, relative to the exact result's. The budget of the tests is twice torch's own largest error
plus a floor that grows with the reduction length. Above 100 % it is broken. Operands rounded to tf32 stand in for
torch's tf32.
"""

_SOURCES = """## Sources

NVIDIA's occupancy is from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
rules in `cuda_occupancy.h`. AMD's is from the CDNA 2, CDNA 3 and RDNA 3 instruction set guides and LLVM's AMDGPU
backend. These are the rates and bandwidths (dense, boost clock):
"""


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    sections = [
        f"{_INTRODUCTION}\nCompiled with {versions}.\n",
        _findings(report["findings"]),
        _steps(report["steps"]),
        ensemble_table(report.get("ensembles", [])),
        _step_execution(report["step_execution"]),
        latency_text(report.get("latency", []), report.get("constants", [])),
        _rooflines(report["machine"]),
        _execution(report["execution"]),
        _numerics(report["numerics"]),
        _machine(report["machine"]),
        _sources(),
    ]
    return "\n".join(section for section in sections if section)


def _unique(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _label(row: Row) -> str:
    """The workload, and the kernel where it is not the workload's own."""
    own = row["workload"].split()[0]
    kernel = row["kernel"].strip("_").removesuffix("_kernel")
    return row["workload"] if own.startswith(kernel) else f"{row['workload']}: {kernel}"


def _findings(rows: list[Row]) -> str:
    text = "## Findings\n\nThese are the limits, and what breaks them:\n\n"
    for limit, says in LIMITS.items():
        reasons = [row["reason"] for row in rows if row["limit"] == limit]
        broken, excepted = reasons.count(""), sum(map(bool, reasons))
        counts = [f"{count} {word}" for count, word in ((broken, "broken"), (excepted, "excepted")) if count]
        text += f"- {limit}: {says}. {', '.join(counts) or 'Kept everywhere'}.\n"
    if not rows:
        return text
    cells = [
        (r["limit"], r["workload"], f"`{r['kernel'].strip('_')}`", _some(r["places"]), compact(r["worst"]), r["reason"])
        for r in rows
    ]
    lines = table(("limit", "workload", "kernel", "where", "worst", "why that may be"), cells, left=4)
    return f"{text}\n{lines}"


def _some(places: Sequence[str], most: int = 4) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more


def _steps(rows: list[Row]) -> str:
    text = _STEPS if rows else ""
    for target in _unique(rows, "target"):
        here = [row for row in rows if row["target"] == target]
        batches = _unique(here, "batch")
        ways: dict[tuple[str, str], list[Row]] = {}
        for row in here:
            ways.setdefault((row["way"], row["data"]), []).append(row)
        header = ("way", "data", *(f"{batch:,}" for batch in batches))
        counts = (
            (*way, *(f"{row['launches']} / {bytes_text(row['bytes'])}" for row in found)) for way, found in ways.items()
        )
        text += f"\n### {target}: launches / bytes of a step, by batch\n\n" + table(header, counts, left=2)
        text += f"\nWhat runs at batch {batches[-1]:,}:\n\n"
        text += "".join(f"- {', '.join(way)}: {_kernels(found[-1]['kernels'])}\n" for way, found in ways.items())
        for gpu in here[0]["roofline_microseconds"]:
            times = (
                (*way, *(compact(row["roofline_microseconds"][gpu]) for row in found)) for way, found in ways.items()
            )
            text += f"\nRoofline on {gpu}, microseconds:\n\n" + table(header, times, left=2)
    return text


def _step_execution(rows: list[Row]) -> str:
    if not rows:
        return ""
    counted = ("programs", "warp_instructions", "sectors", "wavefronts", "conflicts", "barriers")
    lines = [
        (row["kernel"].strip("_"), *(f"{row[key]:,}" for key in counted), compact(row["sectors_over_minimum"]))
        for row in rows
    ]
    lines.append(("all", *(f"{sum(row[key] for row in rows):,}" for key in counted), ""))
    header = (
        "kernel", "programs", "warp instructions", "sectors", "shared wavefronts", "of them conflicts", "barriers",
        "sectors over min.",
    )  # fmt: skip
    return f"{_STEP_EXECUTION.format(rows[0]['target'])}\n" + table(header, lines)


def _kernels(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name.strip('_').removesuffix('_kernel')}" for name, n in counts.items())


def _rooflines(rows: list[Row]) -> str:
    bound = [row for row in rows if row["roofline"]]
    if not bound:
        return ""
    gpus = [name for name in GPUS if any(name in row["roofline"] for row in bound)]
    merged: dict[tuple[Any, ...], Row] = {}
    for row in bound:
        times = merged.setdefault((_label(row), row["mode"], row["batch"]), {"first": row})
        times.update(row["roofline"])
    order = {mode: i for i, mode in enumerate(("float32", "tf32", "bfloat16", "float16"))}
    keys = sorted(merged, key=lambda key: (key[2], order[key[1]]))
    lines = []
    for key in keys:
        row = merged[key]["first"]
        size = bytes_text(row["bytes_read"] + row["bytes_written"])
        flops = compact(row["matrix_flops"] + row["vector_flops"])
        cells = [_time(merged[key].get(gpu)) for gpu in gpus]
        lines.append((key[0], key[1], f"{key[2]:,}", flops, size, compact(row["intensity"]), *cells))
    return f"{_ROOFLINES}\n" + table(("kernel", "mode", "batch", "FLOPs", "bytes", "FLOPs/byte", *gpus), lines, left=2)


def _time(line: Row | None) -> str:
    if line is None:
        return "-"
    letter = {"memory": "m", "matrix": "x", "vector": "v"}[line["bound"]]
    return f"{compact(line['microseconds'])} ({letter})"


def _execution(rows: list[Row]) -> str:
    text = _EXECUTION if rows else ""
    header = (
        "kernel", "mode", "batch", "programs", "warp instr./output", "sectors over min.", "read over compulsory",
        "wavefronts/output", "conflicts", "products",
    )  # fmt: skip
    for target in _unique(rows, "target"):
        lines = (
            (
                _label(row), row["mode"], f"{row['batch']:,}", _of(row["executed"], row["programs"]),
                compact(row["warp_instructions_per_output"]), compact(row["sectors_over_minimum"]),
                compact(row["read_over_compulsory"]), compact(row["wavefronts_per_output"]),
                f"{100 * row['conflict_share']:.1f} %", compact(row["matrix_flops_over_needed"]),
            )
            for row in rows
            if row["target"] == target
        )  # fmt: skip
        text += f"\n### {target}\n\n" + table(header, lines, left=2)
    return text


def _of(some: int, all_of_them: int) -> str:
    return f"{all_of_them:,}" if some == all_of_them else f"{some:,} of {all_of_them:,}"


def _machine(rows: list[Row]) -> str:
    text = _MACHINE if rows else ""
    header = (
        "kernel", "mode", "batch", "programs", "warps", "registers", "spilled", "shared", "occupancy", "limited by",
        "waves", *GROUPS,
    )  # fmt: skip
    for target in _unique(rows, "target"):
        lines = (
            (
                _label(row), row["mode"], f"{row['batch']:,}", f"{row['programs']:,}", row["num_warps"],
                row["registers"], row["spilled"], f"{row['shared']:,}",
                "-" if row["occupancy"] is None else f"{100 * row['occupancy']:.0f} %",
                row["limited_by"], compact(row["waves"]), *row["instructions"].values(),
            )
            for row in rows
            if row["target"] == target
        )  # fmt: skip
        text += f"\n<details><summary>{target}</summary>\n\n" + table(header, lines, left=2) + "\n</details>\n"
    return text


def _numerics(rows: list[Row]) -> str:
    if not rows:
        return ""
    header = ("kernel", "shape", "output", "mode", "max", "RMS", "torch's max", "torch's RMS", "budget used")
    lines = (
        (
            row["kernel"], row["shape"], row["output"], row["mode"],
            *(f"{row[key]:.1e}" for key in ("kernel_max", "kernel_rms", "torch_max", "torch_rms")),
            f"{100 * row['budget_share']:.3g} %",
        )
        for row in rows
    )  # fmt: skip
    return f"{_NUMERICS}\n" + table(header, lines, left=4)


def _sources() -> str:
    names = ("fp32", "tf32", "bf16", "fp32_matrix")
    lines = (
        (
            name,
            gpu.target,
            gpu.source,
            f"{gpu.bandwidth / 1e12:g} TB/s",
            *(f"{gpu.rates[n] / 1e12:g}" if n in gpu.rates else "-" for n in names),
        )
        for name, gpu in GPUS.items()
    )
    header = ("GPU", "target", "source", "bandwidth", "fp32 TFLOP/s", "tf32", "bf16, fp16", "fp32 matrix")
    shapes = ((w.name, w.shape) for w in WORKLOADS.values())
    return (
        f"{_SOURCES}\n"
        + table(header, lines, left=3)
        + "\nThese are the workloads; M is the batch:\n\n"
        + table(("workload", "computation"), shapes, left=2)
    )
