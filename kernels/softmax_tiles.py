"""Which logits a program of the softmax kernels takes: Z as [batch, C, positions], and tiles by shape.

Host code only; ``softmax`` has the device functions, ``cross_entropy`` and ``cross_entropy_bwd`` the kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .configs import cdiv, register_limit
from .device import Device

__all__ = [
    "WHOLE_ROW",
    "LogitsShape",
    "SoftmaxTile",
    "alignment",
    "bwd_tile",
    "fwd_tile",
    "label_strides",
    "logits_shape",
    "row_strides",
]

#: Rows of up to this many classes are held in registers by one program; half as many where q is held beside Z.
WHOLE_ROW = 16384


class SoftmaxTile(NamedTuple):
    """One program's rows and, at a time, classes."""

    rows: int
    cols: int
    unroll: int  #: classes that a lane folds before it rescales; 0: a row is one block
    num_warps: int
    #: Registers per thread (NVIDIA only). Without this limit ptxas spills some to fit one more program.
    max_registers: int | None = None

    def compile_options(self, device: Device) -> dict[str, int]:
        """The launch options that are not tile sizes."""
        return {"num_warps": self.num_warps} | register_limit(self.max_registers, device)


class LogitsShape(NamedTuple):
    """Logits as [batch, C, positions] with strides; a 2-D Z is one batch of M positions."""

    batch: int
    positions: int
    classes: int
    strides: tuple[int, int, int]

    @property
    def rows(self) -> int:
        """M, the number of rows in all."""
        return self.batch * self.positions

    @property
    def along_classes(self) -> bool:
        """Whether neighbouring lanes should hold neighbouring classes, by the smaller stride."""
        return self.positions == 1 or self.strides[1] <= self.strides[2]


def logits_shape(logits: Tensor) -> LogitsShape:
    """The view of logits, or of anything shaped as they are: [M, C] or [N, C, S]."""
    if logits.dim() == 2 or logits.shape[2] == 1:
        return LogitsShape(1, logits.shape[0], logits.shape[1], (0, logits.stride(1), logits.stride(0)))
    n, c, s = logits.shape
    return LogitsShape(n, s, c, (logits.stride(0), logits.stride(1), logits.stride(2)))


def row_strides(values: Tensor) -> tuple[int, int]:
    """(batch, position) strides of a tensor with one value per row: [M], or [N, S] for 3-D logits."""
    if values.dim() == 2 and values.shape[1] != 1:
        return values.stride(0), values.stride(1)
    return 0, values.stride(0)


def label_strides(target: Tensor) -> tuple[int, int, int]:
    """(batch, class, position) strides of labels, which have no classes."""
    of_batch, of_position = row_strides(target)
    return of_batch, 0, of_position


def _power(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def alignment(shape: LogitsShape, *strides: tuple[int, int, int]) -> int:
    """The power of two, 16 at most, that divides C and every row's offset in every tensor; 1 if classes are strided."""
    if shape.strides[1] != 1:
        return 1
    return math.gcd(16, shape.classes, *(s for stride in strides for s in (stride[0], stride[2])))


def fwd_tile(shape: LogitsShape, itemsize: int, reduce: bool, has_q: bool, device: Device) -> SoftmaxTile:
    """Rows and classes of one program.

    Along classes, rows are packed to 512 elements per warp (16 per thread), with as many warps as still leave every
    multiprocessor a program. From 128 classes on, where a row is as wide as a warp's load, programs have one warp, so
    that reductions over a row of up to 1,024 classes need no shared memory. Where the rows fit one program that also
    reduces them, a launch is saved. Across classes (Z column-major, or [N, C, S]) a lane has whole rows.
    """
    P, C = shape.positions, shape.classes
    cols = max(2, _power(C))
    if not shape.along_classes:
        rows = min(128, max(2, _power(P)))
        return SoftmaxTile(rows, cols, 0, 4) if C <= 32 else SoftmaxTile(rows, 16, 16, 4)
    whole_row = WHOLE_ROW // 2 if has_q else WHOLE_ROW
    if whole_row < C:
        if device.backend == "interpreter":
            return SoftmaxTile(min(16, _power(P)), max(4, WHOLE_ROW), 2, 1)
        # A lane takes 32 bytes per step, or 8 classes where each has an address of its own; half as much where q takes
        # registers beside Z. A row has many warps, so that few rows are read at a time and the second reading finds
        # them in the L2 cache.
        wide = alignment(shape, shape.strides) * itemsize >= 16
        unroll = (32 // itemsize if wide else 8) // (2 if has_q else 1)
        return SoftmaxTile(1, 512 * unroll, unroll, 16, 64)
    if reduce and shape.batch == 1 and _power(P) * cols <= 4096:
        return SoftmaxTile(_power(P), cols, 0, 4)
    if device.backend == "interpreter":
        return SoftmaxTile(min(32, _power(P)), cols, 0, 1)
    if cols > 128:
        return SoftmaxTile(max(1, 512 // cols), cols, 0, min(16, max(1, cols // 1024)))
    for warps in (4, 2):
        rows = 512 * warps // cols
        if shape.batch * cdiv(P, rows) >= device.multiprocessors:
            return SoftmaxTile(rows, cols, 0, warps, 128 if cols > 64 else None)
    return SoftmaxTile(max(1, 512 // cols), cols, 0, 1, 255)  # at most two programs for each multiprocessor


def bwd_tile(shape: LogitsShape, device: Device) -> SoftmaxTile:
    """An elementwise tile of 2,048 logits, 16 per thread, along the contiguous dimension."""
    if not shape.along_classes:
        return SoftmaxTile(min(128, max(2, _power(shape.positions))), 16, 0, 4)
    cols = min(max(2, _power(shape.classes)), 1024)
    return SoftmaxTile(max(1, 2048 // cols), cols, 0, 4 if device.backend != "interpreter" else 1)
