"""Sum of partial sums in a fixed order, by one program: two runs are bitwise equal.

Shapes: partial float32 [count], contiguous; out 0-d, any float dtype. out = scale * sum partial.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dependent import wait_for_previous
from .launch import Call, call, remembered

__all__ = ["reduce_sum"]

BLOCK = 4096
NUM_WARPS = 16


@triton.jit(do_not_specialize=["count"])
def _reduce_sum_kernel(partial_ptr, out_ptr, scale, count, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    wait_for_previous()
    # Whole blocks need no mask, so that a thread loads 16 bytes at a time. The rest may end anywhere, and each thread
    # loads one value of it: neighbouring threads read neighbouring values, which masked 16-byte pieces would not.
    whole = count // BLOCK * BLOCK
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, whole, BLOCK):
        acc += tl.load(partial_ptr + i + tl.arange(0, BLOCK))
    tail = tl.zeros((TAIL,), tl.float32)
    for i in range(whole, count, TAIL):
        offs = i + tl.arange(0, TAIL)
        tail += tl.load(partial_ptr + offs, mask=offs < count, other=0.0)
    tl.store(out_ptr, ((tl.sum(acc, 0) + tl.sum(tail, 0)) * scale).to(out_ptr.dtype.element_ty))


@remembered
def _launch(partial: Tensor, out: Tensor, scale: float) -> Call:
    return call(
        _reduce_sum_kernel, (1,),
        partial, out, scale, partial.numel(), BLOCK=BLOCK, TAIL=32 * NUM_WARPS, num_warps=NUM_WARPS,
    )  # fmt: skip


def reduce_sum(partial: Tensor, out: Tensor, scale: float) -> None:
    """Launch out = scale * sum partial."""
    _launch((partial, out), (), (float(scale),))
