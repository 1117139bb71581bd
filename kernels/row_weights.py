"""Weights of the rows in a mean: D, the weight of a batch, by which the loss and its gradient are divided.

    D = sum over the rows m of the batch of s_m w_m

    s_m   the row's sample weight, 1 without sample weights
    w_m   of labels the class weight w_y, 1 without class weights, and 0 where the label is ignored; else 1

D has to be known before dZ is written. Up to ``SUMMED_HERE`` rows, every program of the loss's kernel computes D
itself, because a launch of its own would take longer. The first program also writes D for the mean of the losses.
Longer batches cost one launch more, of ``total_weight``. Either way the additions have a fixed order, so that all
programs have the same bits, and so do two runs.

Shapes: labels [M] (int64 or uint8), sample weights [M] (any float dtype), both of any number of rows with ``rows``,
and of any stride; class weights [C]; D float32 0-d. Accumulated in float32. With members D is [E], and labels, row
numbers and sample weights have an axis of members in front, or do without.
Bytes: reads 8 bytes per label, 8 per row number, and the sample weights, once per program.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .dependent import wait_for_previous
from .launch import Call, call, remembered
from .members import stride_of
from .softmax import load_labels

__all__ = ["SUMMED_HERE", "summed_block", "total_weight"]

#: Rows up to which the programs of a loss sum the weights themselves. A program takes them in blocks of 1,024, each of
#: two or three loads that wait for each other: about as long as a launch for two blocks (an estimate).
SUMMED_HERE = 2048
#: Rows that a program of a loss adds at a time, of short and of longer batches; and those of ``total_weight``.
SHORT, LONG, BLOCK = 128, 1024, 4096
NUM_WARPS = 16


def summed_block(m: int) -> int:
    """How many of ``m`` weights a program of a loss's kernel adds at a time; 0: ``total_weight`` adds them."""
    if m > SUMMED_HERE:
        return 0
    return SHORT if m <= SHORT else LONG


@triton.jit
def load_sample_weights(sample_ptr, offs, mask):
    """Sample weights in float32, 0 outside ``mask``."""
    return tl.load(sample_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sum_of_weights(
    target_ptr, rows_ptr, w_ptr, sample_ptr, stride_t, stride_w, stride_s, M, C, ignore_index,
    LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D, blocks added in order. Without LABELS every w_m is 1."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, M, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < M
        row = offs.to(tl.int64)
        if rows_ptr is not None:
            row = tl.load(rows_ptr + offs, mask=mask, other=0).to(tl.int64)
        weight = tl.where(mask, 1.0, 0.0)
        if LABELS:
            _y, weight, _ignored = load_labels(target_ptr, row * stride_t, mask, w_ptr, stride_w, C, ignore_index)
        if sample_ptr is not None:
            weight *= load_sample_weights(sample_ptr, row * stride_s, mask)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def batch_weight(
    divisor_ptr, target_ptr, rows_ptr, w_ptr, sample_ptr, stride_t, stride_w, stride_s, scale, M, C, ignore_index,
    LABELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """D times ``scale``: summed here and written by the first program, or, if SUM is 0, read."""
    if SUM > 0:
        total = sum_of_weights(
            target_ptr, rows_ptr, w_ptr, sample_ptr, stride_t, stride_w, stride_s, M, C, ignore_index, LABELS, SUM
        )  # fmt: skip
        divisor = total * scale
        tl.store(divisor_ptr, divisor, mask=tl.program_id(0) == 0)
    else:
        divisor = tl.load(divisor_ptr)
    return divisor


class _Members(NamedTuple):
    """Elements from one member to the next."""

    target: int
    rows: int
    sample: int


@triton.jit(do_not_specialize=["ignore_index", "M"])
def _total_weight_kernel(
    divisor_ptr, target_ptr, rows_ptr, w_ptr, sample_ptr, scale, ignore_index: tl.int64,
    M, C, stride_t, stride_w, stride_s, members, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        divisor_ptr += member
        if target_ptr is not None:
            target_ptr += member * members.target
        if rows_ptr is not None:
            rows_ptr += member * members.rows
        if sample_ptr is not None:
            sample_ptr += member * members.sample
    total = sum_of_weights(
        target_ptr, rows_ptr, w_ptr, sample_ptr, stride_t, stride_w, stride_s, M, C, ignore_index, LABELS, BLOCK
    )
    tl.store(divisor_ptr, total * scale)


@remembered
def _launch(
    divisor: Tensor, target: Tensor | None, rows: Tensor | None, class_weight: Tensor | None,
    sample_weight: Tensor | None, scale: float, ignore_index: int, m: int, classes: int,
) -> Call:  # fmt: skip
    members = None
    if divisor.dim():
        members = _Members(*(stride_of(t, 1) for t in (target, rows, sample_weight)))
    return call(
        _total_weight_kernel, (1,) if members is None else (1, 1, divisor.shape[0]),
        divisor, target, rows, class_weight, sample_weight, scale, ignore_index,
        m, classes, *[None if t is None else t.stride(-1) for t in (target, class_weight, sample_weight)], members,
        LABELS=target is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def total_weight(
    divisor: Tensor,
    m: int,
    *,
    target: Tensor | None = None,
    classes: int = 0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Launch divisor = scale * D of ``m`` rows, by one program, or one per member.

    Args:
        divisor: float32, 0-d or [E].
        target: labels of ``classes`` classes; None: w_m is 1.
        rows: int64 [m], contiguous; row m then has the label target[rows[m]] and the weight sample_weight[rows[m]].
    """
    _launch(
        (divisor, target, rows, class_weight, sample_weight), (ignore_index, m, classes), (float(scale),)
    )  # fmt: skip
