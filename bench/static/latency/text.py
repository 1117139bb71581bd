"""The section of the report on the latency model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..numbers import compact
from ..tables import table
from .constants import CHIPS

__all__ = ["latency_text"]

Row = dict[str, Any]

_INTRODUCTION = """## Latency model

The tables estimate how long a training step takes inside a CUDA graph. **No number in this section was measured.**
Every number is an estimate from counts and published constants, and may be off by a third or more. The step trains
784-512-512-10 with sigmoid, cross-entropy and plain SGD. A first run on a GPU (`bench/first_contact.py`) prints the
measured times beside these.

A program of a kernel is a row of sections: the code before, in and behind each loop of the machine code. The latency
of a section is that of one warp: the stall counts that the compiler wrote into the instructions, which contain the
chain of dependent matrix instructions, the barriers that it waits for, and its turns on units that it shares with the
other warps of its program. The demand of a section counts issue slots, cycles of the arithmetic and matrix units,
wavefronts of shared memory and bytes from the L2 cache. `r` programs on one multiprocessor take the longer of the
latency and `r` times the largest demand. Registers and shared memory say how many programs fit, and programs are
dealt in waves. A kernel takes the longest of its waves, its matrix FLOPs at the sustained rate, its bytes at the L2
cache's bandwidth and its bytes at the memory's bandwidth, after the gap between two kernels of a graph. Bytes come
from the L2 cache as far as the tensors touched since their last use leave room there.

"floor" is the roofline of all launches. "eager" is eager PyTorch with fused SGD in one CUDA graph: its dispatched
operations through the same model, products as cuBLAS-class kernels (the fastest of six tiles and ten splits of the
reduction), other operations by bytes. Autocast casts the weights in every step of bfloat16. "products" are these
products alone. Eager's float32 products run outside of NVIDIA's matrix units, as torch computes by default. On MI300X
they run on the matrix units, which AMD's libraries use. AMD's assembly has no stall counts, and its compiler reorders
the loops of the update, so numbers for MI300X are the least certain.
"""

_ABOVE = "\nThe estimate exceeds eager in a graph here: {}.\n"
#: Why the estimate exceeds eager's, by GPU and mode.
_REASONS = {
    ("RTX 4090", "float32"): (
        "The forward product takes three tf32 products on this GPU, which has no more tf32 multiply-adds than float32 "
        "ones. Multiply-adds outside of the matrix units would read W along the reduction: a simulated sm_120 counts "
        "1.9 wavefronts of shared memory per multiply-add of a warp, where the gradients have 0.33 and 0.25 would "
        "keep the units busy. The other way round, W is read without conflicts, so the gradients run there."
    ),
}
_NOWHERE = "\nThe estimate exceeds eager in a graph nowhere.\n"

_KERNELS = """
### {}: each kernel

"fit" is the number of programs that one multiprocessor holds. The bound says which term decides: the latency or the
busiest shared unit of a section, or the matrix units, the L2 cache or the memory (HBM) of the whole GPU. Microseconds
have the gap before the kernel. "library" is the time of the kernel's bare products as cuBLAS-class kernels, one after
the other, without activations, loss and update.
"""

_CONSTANTS = """
### Constants

None of the constants was measured here. Where sources disagree, the range says by how much. Where a source is named
without a number, its text was not at hand, and the value is the one commonly cited from it.
"""


def latency_text(rows: list[Row], constants: list[Row], detail: str = "H100 SXM") -> str:
    """The whole section; ``detail`` is the GPU whose kernels are listed."""
    if not rows:
        return ""
    text = _INTRODUCTION
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    for gpu in gpus:
        text += f"\n### {gpu}: microseconds per step, estimate, never measured\n\n"
        text += table(
            ("mode", "batch", "step", "floor", "eager", "products", "step / eager"), _steps(rows, gpu), left=1
        )
    slower = [
        f"{row['gpu']} {row['mode']} {row['batch']:,} ({row['step_us'] / row['eager_us']:.2f} times)"
        for row in rows
        if row["step_us"] > row["eager_us"]
    ]
    text += _ABOVE.format(", ".join(slower)) if slower else _NOWHERE
    above = dict.fromkeys((row["gpu"], row["mode"]) for row in rows if row["step_us"] > row["eager_us"])
    text += "".join(f"\n{gpu}, {mode}: {_REASONS[gpu, mode]}\n" for gpu, mode in above if (gpu, mode) in _REASONS)
    if detail in gpus:
        header = (
            "kernel", "bound", "mode", "batch", "us", "library", "programs", "fit", "waves", "by waves", "matrix", "L2",
            "HBM",
        )  # fmt: skip
        text += _KERNELS.format(detail) + "\n" + table(header, _kernels(rows, detail), left=3)
    names = ("constant", "meaning", "source", "range", "unit", *CHIPS)
    return text + _CONSTANTS + "\n" + table(names, _constants(constants), left=5)


def _steps(rows: Iterable[Row], gpu: str) -> Iterable[tuple[object, ...]]:
    for row in rows:
        if row["gpu"] == gpu:
            times = (compact(row[key]) for key in ("step_us", "floor_us", "eager_us", "products_us"))
            yield row["mode"], f"{row['batch']:,}", *times, f"{row['step_us'] / row['eager_us']:.2f}"


def _kernels(rows: Iterable[Row], gpu: str) -> Iterable[tuple[object, ...]]:
    for row in rows:
        if row["gpu"] == gpu:
            for kernel in row["kernels"]:
                terms = (compact(kernel["terms_us"][name]) for name in ("waves", "matrix", "L2", "HBM"))
                note = f" ({kernel['note']})" if "note" in kernel else ""
                yield (
                    kernel["kernel"], kernel["bound"] + note, row["mode"], f"{row['batch']:,}", compact(kernel["us"]),
                    compact(kernel["library_us"]), f"{kernel['programs']:,}", kernel["resident"],
                    compact(kernel["waves"]), *terms,
                )  # fmt: skip


def _constants(rows: Iterable[Row]) -> Iterable[tuple[object, ...]]:
    for row in rows:
        values = (f"{value:g}" for value in row["values"])
        yield f"`{row['name']}`", row["meaning"], row["source"], row["range"], row["unit"], *values
