"""db = sum over the batch of dZ: partial sums by the kernel that makes dZ, and the sum of the rows of a matrix.

A kernel that stores a block of dZ has the block in registers. ``store_block_sums`` adds the rows of the block, rounded
as they are stored, and writes one row of float32 sums. The weight gradient then adds these few rows in place of all of
dZ. Where nobody has made such sums, ``column_sums`` adds the rows of dZ itself.

The order of the additions is fixed, so two runs agree bit by bit. A producer adds the rows of its block as a tree.
``column_sums`` keeps ROWS running sums per column: sum i adds the rows i, i + ROWS, ... in this order. A tree adds the
ROWS sums. Where the batch is split over programs, each adds its own share of the rows.
Bytes: a block of B rows adds 4 / B bytes to each element of dZ that is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .device import interpreting

__all__ = ["ColumnSums", "padded"]

#: Columns that one program of ``column_sums`` adds; few in the interpreter, so that small tests have several programs.
SUM_COLS = 32 if interpreting() else 128
#: No producer's blocks have fewer rows.
_LEAST_ROWS = 16


def padded(n: int) -> int:
    """The length of rows of ``n`` elements that all begin at multiples of 16 elements."""
    return cdiv(n, 16) * 16


class ColumnSums:
    """Float32 sums of the rows of dZ [m, n], one row of ``values`` per block of rows of dZ; or of dZ [members, m, n].

    The producer of dZ decides how many rows a block has, and calls ``written``.
    """

    def __init__(self, m: int, n: int, device: torch.device, *, members: int | None = None) -> None:
        shape = (cdiv(m, _LEAST_ROWS), padded(n))
        self.values = torch.empty(shape if members is None else (members, *shape), dtype=torch.float32, device=device)
        self.blocks = 0

    def written(self, blocks: int) -> Tensor:
        """Where ``blocks`` rows of sums go."""
        if blocks > self.values.shape[-2]:
            raise ValueError(f"{blocks} blocks of rows do not fit column sums of {self.values.shape[-2]} rows")
        self.blocks = blocks
        return self.values


@triton.jit
def store_block_sums(block, mask_rows, row_ptr, offs, mask):
    """Write the sums of the rows of ``block`` where ``mask_rows`` is set to row_ptr + offs, one per column."""
    tl.store(row_ptr + offs, tl.sum(tl.where(mask_rows[:, None], block.to(tl.float32), 0.0), axis=0), mask=mask)


@triton.jit
def column_sums(
    ptr, first, end, stride_row, stride_col, offs, mask, ROWS: tl.constexpr
):  # fmt: skip
    """Float32 sums of the rows first <= r < end of the columns ``offs`` where ``mask`` is set; elsewhere 0."""
    rows = first + tl.arange(0, ROWS)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + offs.to(tl.int64)[None, :] * stride_col
    step = tl.cast(ROWS, tl.int64) * stride_row
    total = tl.zeros((ROWS, offs.shape[0]), dtype=tl.float32)
    for r in range(first, end, ROWS):
        present = (tl.arange(0, ROWS) < end - r)[:, None] & mask[None, :]
        total += tl.load(ptrs, mask=present, other=0.0).to(tl.float32)
        ptrs += step
    return tl.sum(total, axis=0)
