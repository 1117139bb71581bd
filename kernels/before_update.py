"""What an update takes from all gradients together, in one small launch: clipping's factor, float16's skip and scale.

    factor = min(1, max_grad_norm / (|g| + 1e-6))     with clipping; |g|^2 comes as one partial sum per block
    factor = 1 / scale                                float16, where the update divides by the loss scale
    skip   = 1 where a gradient of float16 overflowed, else 0
    scale  = scale backoff after an overflow, scale growth after ``growth_steps`` good steps, at least ``least``
    count  = the number of updates that were not skipped, with AdamW's corrections for this update

The kernels that make the gradients set ``overflow`` by an integer atomic (``mark_overflow``), whose result does not
depend on their order. This launch reads the flag and clears it for the next step. One program of one warp does
everything, because a second warp could read a number after the first warp has replaced it.

The scale moves as in ``torch._amp_update_scale_``, and the factor is that of ``torch.nn.utils.clip_grad_norm_``.
Members have a program each, and numbers of their own: [E] where a single model has 0-d tensors, and a row [E, 8].
Bytes: one float32 per block of gradients, and some 20 numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .dependent import wait_for_previous
from .launch import call, launch_plainly
from .members import inactive, stride_of
from .optimizer import MAX_NORM, correct_rows

__all__ = ["LossScaleState", "before_update"]

BLOCK = 1024


class LossScaleState(NamedTuple):
    """float16's loss scale on the device, and how it moves; 0-d tensors."""

    scale: Tensor  #: float32
    inverse: Tensor  #: float32, 1 / scale
    good_steps: Tensor  #: int32: steps without overflow since the scale last moved
    overflow: Tensor  #: int32: not 0 where a gradient of this step overflowed
    skip: Tensor  #: int32, an output: whether this step's update is skipped
    growth_steps: int
    growth: float
    backoff: float
    least: float


@triton.jit
def mark_overflow(g, mask, overflow_ptr):
    """Set the flag if an element of the block is infinite or NaN."""
    bad = tl.where(mask & ~(tl.abs(g) < float("inf")), 1, 0)
    if tl.max(bad) > 0:
        tl.atomic_or(overflow_ptr, 1, sem="relaxed")


class _Members(NamedTuple):
    """Elements from one member to the next."""

    hyper: int
    squares: int


@triton.jit
def _before_update_kernel(
    hyper_ptr, squares_ptr, factor_ptr, loss_scale, count_ptr, decays_ptr, row_ptr, members, active_ptr, blocks,
    OPTIMIZER: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    member = 0
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        hyper_ptr += member * members.hyper
        factor_ptr += member
        if squares_ptr is not None:
            squares_ptr += member * members.squares
        if count_ptr is not None:
            count_ptr += member
            row_ptr += member * COLUMNS * ROWS
    factor = 1.0
    if SCALED:
        factor = tl.load(loss_scale.inverse + member)
    if squares_ptr is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, blocks, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            total += tl.load(squares_ptr + offs, mask=offs < blocks, other=0.0)
        clipped = tl.load(hyper_ptr + MAX_NORM) / (tl.sqrt(tl.sum(total, 0)) + 1e-6)
        factor = tl.where(clipped > 1.0, 1.0, clipped)  # NaN stays NaN
    tl.store(factor_ptr, factor)
    if loss_scale is not None:
        overflow = tl.load(loss_scale.overflow + member) != 0
        tl.store(loss_scale.overflow + member, 0)
        tl.store(loss_scale.skip + member, overflow.to(tl.int32))
        good = tl.where(overflow, 0, tl.load(loss_scale.good_steps + member) + 1)
        grows = good == loss_scale.growth_steps
        tl.store(loss_scale.good_steps + member, tl.where(grows, 0, good))
        scale = tl.load(loss_scale.scale + member)
        grown = scale * loss_scale.growth
        scale = tl.where(grows & (grown < float("inf")), grown, tl.where(overflow, scale * loss_scale.backoff, scale))
        scale = tl.where(scale < loss_scale.least, loss_scale.least, scale)
        tl.store(loss_scale.scale + member, scale)
        tl.store(loss_scale.inverse + member, tl.div_rn(1.0, scale))
        if count_ptr is not None:
            count = tl.load(count_ptr) + 1
            tl.store(count_ptr, tl.where(overflow, count - 1, count))
            correct_rows(hyper_ptr, row_ptr, decays_ptr, count, OPTIMIZER, COLUMNS, ROWS)


def before_update(
    optimizer: str,
    hyper_row: Tensor,
    factor: Tensor,
    *,
    squares: Tensor | None = None,
    loss_scale: LossScaleState | None = None,
    scaled: bool = False,
    count: Tensor | None = None,
    decays: Tensor | None = None,
    counted_row: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """Launch what comes before the update.

    Args:
        optimizer, hyper_row: the rule, and its settings for this step, [columns] or, of param groups, [G, columns].
        factor: 0-d float32, an output: what the update multiplies the gradients by.
        squares: float32, the sum of the squares of each block of gradients, which are then clipped. A length that is a
            multiple of 16, the rest zeros, is read 16 bytes at a time.
        loss_scale: of float16. ``scaled`` says whether the gradients still have to be divided by it; they are not
            clipped then.
        count: int32, 0-d: the number of updates so far. ``decays``, float64, are the rule's numbers whose powers the
            count is of, and ``counted_row`` is an output like ``hyper_row``, corrected by the count.
        active: with members, a bool per member. ``factor`` and all other numbers are [E] then, ``squares`` [E, blocks]
            and ``counted_row`` [E, columns] or [E, G, columns]; ``hyper_row`` [columns] may be that of all members.
    """
    members = None
    has_groups = hyper_row.dim() == factor.dim() + 2
    if factor.dim() == 1:
        members = _Members(stride_of(hyper_row, 1), stride_of(squares, 1))
    launch_plainly(call(
        _before_update_kernel, (1, 1, factor.numel()),
        hyper_row, squares, factor, loss_scale, count, decays, counted_row, members, active,
        0 if squares is None else squares.shape[-1],
        OPTIMIZER=optimizer, SCALED=scaled, COLUMNS=hyper_row.shape[-1],
        ROWS=hyper_row.shape[-2] if has_groups else 1, BLOCK=BLOCK, num_warps=1,
    ))  # fmt: skip
