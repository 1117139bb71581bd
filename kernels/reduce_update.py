"""Sums of slices of flat buffers, and the optimizer's update with them: one launch for all parameters.

    g = scale * sum over the slices, in their order;  parameter <- optimizer(parameter, g)

``wgrad_update`` leaves slices behind where a long batch is split over programs. With one slice the launch updates from
gradients that were clipped, unscaled or accumulated. With the optimizer "none" it makes plain gradients, their squares
and the flag of an overflow.

One program takes SEGMENT elements of the flat buffers, which belong to one parameter each.
Bytes: reads the slices; reads and writes the parameters and their states once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .before_update import mark_overflow
from .dependent import wait_for_previous
from .launch import call, launch_plainly
from .layout import SEGMENT, Layout
from .linear_wgrad import sum_slices
from .members import inactive, stride_of
from .optimizer import update_block

__all__ = ["reduce_update"]


class _ReduceMembers(NamedTuple):
    """Elements from one member to the next."""

    flat: int
    squares: int
    hyper: int


@triton.jit
def _reduce_update_kernel(
    partial_ptr, parameters, grad_ptr, squares_ptr, overflow_ptr, states, hyper_ptr, scale_ptr, skip_ptr,
    members, active_ptr, n_splits, stride_split,
    PARAMETERS: tl.constexpr, OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        hyper_ptr += member * members.hyper
        if squares_ptr is not None:
            squares_ptr += member * members.squares
        if overflow_ptr is not None:
            overflow_ptr += member
        if scale_ptr is not None:
            scale_ptr += member
        if skip_ptr is not None:
            skip_ptr += member
    pid = tl.program_id(0)
    parameter = parameters[0]
    for i in tl.static_range(1, PARAMETERS):
        if pid >= parameters[i].first_block:
            parameter = parameters[i]
    offs = (pid - parameter.first_block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    flat = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < parameter.numel
    w_ptr, low_ptr = parameter.w_ptr, parameter.low_ptr
    if members is not None:
        flat += member * members.flat
        w_ptr += member * parameter.numel
        if low_ptr is not None:
            low_ptr += member * parameter.numel
    g = sum_slices(partial_ptr, flat, mask, n_splits, stride_split)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr)
    if OPTIMIZER == "none":
        if ACCUMULATE:
            g += tl.load(grad_ptr + flat, mask=mask, other=0.0)
        if grad_ptr is not None:
            tl.store(grad_ptr + flat, g, mask=mask)
        if squares_ptr is not None:
            tl.store(squares_ptr + pid, tl.sum(g * g, 0))
        if overflow_ptr is not None:
            mark_overflow(g, mask, overflow_ptr)
    else:
        if skip_ptr is not None:
            mask = mask & (tl.load(skip_ptr) == 0)
        if parameter.settings is not None:
            hyper_ptr += parameter.settings
        update_block(
            g, w_ptr, low_ptr, states, offs, flat, mask, hyper_ptr, OPTIMIZER, LOW_IS_PARAM,
        )  # fmt: skip


def reduce_update(
    layout: Layout,
    partial: Tensor,
    n_splits: int,
    optimizer: str,
    hyper_row: Tensor,
    *,
    states: Sequence[Tensor] = (),
    unscale: Tensor | None = None,
    grads: Tensor | None = None,
    skip: Tensor | None = None,
    accumulate: bool = False,
    squares: Tensor | None = None,
    overflow: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """Launch g = sum of the slices of ``partial``, times ``unscale``, then the update, or with "none" the outputs.

    Args:
        skip: 0-d int32: nothing is updated unless it is 0.
        grads: float32, as long as ``layout.total``: g, or what is there plus g if ``accumulate``.
        squares: float32, layout.total / SEGMENT or more: the sum of the squares of each segment of g.
        overflow: 0-d int32: becomes 1 where g has an infinity or NaN, else it stays as it is.
        active: with members, a bool per member. All tensors then have an axis of members, in ``partial`` the second;
            ``hyper_row`` may do without.
    """
    count, members = layout.members, None
    if count is not None:
        members = _ReduceMembers(layout.total, stride_of(squares, 1), stride_of(hyper_row, 1))
    launch_plainly(call(
        _reduce_update_kernel, (layout.total // SEGMENT, 1, count or 1),
        partial, layout.of_parameters, grads, squares, overflow, tuple(states), hyper_row, unscale, skip,
        members, active, n_splits, math.prod(layout.flat_shape),
        PARAMETERS=len(layout.of_parameters), OPTIMIZER=optimizer, LOW_IS_PARAM=layout.low_is_param,
        ACCUMULATE=accumulate, BLOCK=SEGMENT,
    ))  # fmt: skip
