"""Softmax cross-entropy: loss and dZ = (softmax - onehot) * scale in one pass, or the forward pass alone.

Logits Z are [M, C], or [N, C, S] with S positions per sample (M = N S rows); any strides, float32, float16 or
bfloat16, never written to. Targets are labels (int64 or uint8, [M] or [N, S]) or class probabilities (shaped as Z,
any float dtype). Accumulation and statistics are float32.
Members: Z [E, M, C] and dZ alike, the loss [E, M]; targets, sample weights and ``rows`` may be the same for all members
or have the axis too. ``factor`` and the divisor are [E].

With the notation of ``softmax`` (this folder):
    loss_i = hot (log_sum - shift_y) + sum_c q_c (log_sum - shift_c)           0 where y = ignore_index
    dz_ic  = g_i (mass p_ic - q_ic - [c = y] hot)
    "sum" adds the rows; "mean" divides by sum_i w_{y_i} over rows that are not ignored, by M for probabilities.
A label outside [0, C) that is not ignore_index makes its row's loss and dz NaN; nothing is read or written for it
outside its row. (Checking labels on the host would cost a device synchronization.)

Rows of up to ``WHOLE_ROW`` (``softmax_tiles``) classes stay in registers: Z is read once, dz written once. Longer
rows are read block by block with a running maximum and sum in every lane (one rescaling for UNROLL elements, no
exchange between lanes until the row ends), then once more, last block first, to write dz. Rows of few classes share
a program: with C = 10 a warp's load covers consecutive rows.
Bytes: one pass reads M C and writes M C items for C <= WHOLE_ROW, else reads 2 M C; forward M C.
Launches: ``cross_entropy`` 1, or 2 with a divisor of many rows (``row_weights``); ``cross_entropy_fwd`` 1, or 2 for the
mean or sum of more rows than one program takes. No float atomics: two runs are bitwise equal.
Source: softmax NLL and its gradient p - onehot (notes 7.4; the notebook's g3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base.signature import Signature
from .configs import cdiv
from .dependent import wait_for_previous
from .device import current_device
from .launch import Call, Launches, New, call, remembered, with_active
from .members import count_of, inactive, stride_of
from .row_weights import batch_weight, load_sample_weights, summed_block, total_weight
from .softmax import load_labels, row_offsets, rows_grad, target_block, whole_rows_loss
from .softmax_tiles import LogitsShape, alignment, fwd_tile, label_strides, logits_shape

__all__ = ["cross_entropy", "cross_entropy_fwd", "cross_entropy_of_members"]


@triton.jit
def _finite_reference(top):
    """The maximum seen so far, 0 where nothing but -inf was: -inf - -inf would turn a sum into NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _by_lane(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block [rows, classes] as [rows, loads, LANES, VECTOR]: a lane loads VECTOR neighbouring classes at a time."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // (LANES * VECTOR), LANES, VECTOR))


class _Members(NamedTuple):
    """Elements from one member to the next."""

    z: int
    target: int
    rows: int
    sample: int
    dz: int


@triton.jit(do_not_specialize=["ignore_index", "M"])
def _cross_entropy_kernel(
    z_ptr, target_ptr, w_ptr, sample_ptr, divisor_ptr, rows_ptr, scale_ptr,
    loss_ptr, stats_ptr, partial_ptr, denominator_ptr, dz_ptr, correct_ptr, members, active_ptr,
    scale, smoothing, ignore_index: tl.int64,
    P, C, M,
    stride_zb, stride_zc, stride_zp, stride_tb, stride_tc, stride_tp, stride_w, stride_s,
    stride_db, stride_dc, stride_dp,
    PROBS: tl.constexpr, SMOOTH: tl.constexpr, SUM: tl.constexpr, REDUCE: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:  # each with a 2-D Z, a loss per row and dZ
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        z_ptr += tl.multiple_of(member * members.z, ALIGN)
        dz_ptr += tl.multiple_of(member * members.dz, ALIGN)
        loss_ptr += member * M
        if PROBS:
            target_ptr += tl.multiple_of(member * members.target, ALIGN)
        else:
            target_ptr += member * members.target
        if rows_ptr is not None:
            rows_ptr += member * members.rows
        if sample_ptr is not None:
            sample_ptr += member * members.sample
        if divisor_ptr is not None:
            divisor_ptr += member
        if scale_ptr is not None:
            scale_ptr += member
    # Rows are (b, p): one sample's positions, or all rows of a 2-D Z with b = 0. Row number b P + p.
    tiles = tl.cdiv(P, BLOCK_M)
    b = tl.program_id(0) // tiles
    offs_p = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_p < P
    row = b.to(tl.int64) * P + offs_p
    C = C // ALIGN * ALIGN
    z_rows = z_ptr + row_offsets(b, offs_p, stride_zb, stride_zp, ALIGN)[:, None]
    t_rows = z_rows
    HAS_Q: tl.constexpr = PROBS or SMOOTH
    if sample_ptr is not None:  # 2-D logits only
        row_s = row
        if rows_ptr is not None:
            row_s = tl.load(rows_ptr + offs_p, mask=mask_m, other=0).to(tl.int64)
        sample = load_sample_weights(sample_ptr, row_s * stride_s, mask_m)
    if PROBS:
        if rows_ptr is not None:
            row_t = tl.load(rows_ptr + offs_p, mask=mask_m, other=0).to(tl.int64)
            t_rows = target_ptr + tl.multiple_of(row_t * stride_tp, ALIGN)[:, None]
        else:
            t_rows = target_ptr + row_offsets(b, offs_p, stride_tb, stride_tp, ALIGN)[:, None]
        y = tl.full((BLOCK_M,), -1, tl.int32)
        w_y = tl.where(mask_m, 1.0, 0.0)
        ignored = offs_p < 0
        hot = tl.zeros((BLOCK_M,), tl.float32)
    else:
        if rows_ptr is not None:
            offs_t = tl.load(rows_ptr + offs_p, mask=mask_m, other=0).to(tl.int64) * stride_tp
        else:
            offs_t = b.to(tl.int64) * stride_tb + offs_p.to(tl.int64) * stride_tp
        y, w_y, ignored = load_labels(target_ptr, offs_t, mask_m, w_ptr, stride_w, C, ignore_index)
        if sample_ptr is not None:
            w_y *= sample
        hot = w_y * (1.0 - smoothing) if SMOOTH else w_y
    if dz_ptr is not None:
        g = scale
        if scale_ptr is not None:
            g *= tl.load(scale_ptr).to(tl.float32)
        if divisor_ptr is not None:
            g = g / batch_weight(
                divisor_ptr, target_ptr, rows_ptr, w_ptr, sample_ptr, stride_tp, stride_w, stride_s,
                1.0, M, C, ignore_index, not PROBS, SUM,
            )  # fmt: skip
        d_rows = dz_ptr + row_offsets(b, offs_p, stride_db, stride_dp, ALIGN)[:, None]

    if WHOLE:
        offs_c = tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        z = tl.load(z_rows + offs_c.to(tl.int64)[None, :] * stride_zc, mask=mask, other=float("-inf")).to(tl.float32)
        # Rows beyond the last are all zero rather than all -inf, so that they stay finite.
        z = tl.where(mask_m[:, None], z, 0.0)
        q = z
        if HAS_Q:
            t_ptrs = t_rows + offs_c.to(tl.int64)[None, :] * stride_tc
            q = target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, smoothing, PROBS, SMOOTH)
            if sample_ptr is not None:
                q *= sample[:, None]
        picked = offs_c[None, :] == y[:, None]
        loss, mass, top, shift, e, total = whole_rows_loss(z, q, hot, picked, mask, HAS_Q, PROBS)
        if correct_ptr is not None:
            first = tl.min(tl.where(shift == 0.0, offs_c[None, :], BLOCK_C), 1)
        if dz_ptr is not None:
            dz = rows_grad(e, total, mass, q, hot, picked, ignored, g, HAS_Q, PROBS, divisor_ptr is not None)
            d_ptrs = d_rows + offs_c.to(tl.int64)[None, :] * stride_dc
            tl.store(d_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    else:
        LANES: tl.constexpr = BLOCK_C // UNROLL
        VECTOR: tl.constexpr = min(ALIGN, 16 * 8 // z_ptr.dtype.element_ty.primitive_bitwidth, UNROLL)
        # Every lane has its own running maximum, sum of exponentials, sum of q and of q (maximum - z). While a lane
        # saw nothing but -inf its reference is 0, so that -inf - -inf does not turn the sum into NaN.
        lane_top = tl.full((BLOCK_M, LANES), float("-inf"), tl.float32)
        lane_total = tl.zeros((BLOCK_M, LANES), tl.float32)
        lane_mass = tl.zeros((BLOCK_M, LANES), tl.float32)
        lane_cross = tl.zeros((BLOCK_M, LANES), tl.float32)
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            z = tl.load(z_rows + offs_c.to(tl.int64)[None, :] * stride_zc, mask=mask, other=float("-inf"))
            z = _by_lane(z.to(tl.float32), LANES, VECTOR)
            seen_top = lane_top
            lane_top = tl.maximum(lane_top, tl.max(tl.max(z, 3), 1))
            ref = _finite_reference(lane_top)
            shift = z - ref[:, None, :, None]
            if HAS_Q:
                t_ptrs = t_rows + offs_c.to(tl.int64)[None, :] * stride_tc
                q = target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, smoothing, PROBS, SMOOTH)
                if sample_ptr is not None:
                    q *= sample[:, None]
                q = _by_lane(q, LANES, VECTOR)
                inside = _by_lane(mask, LANES, VECTOR)
                lane_cross += lane_mass * (ref - _finite_reference(seen_top))
                lane_cross -= tl.sum(tl.sum(tl.where(inside, q * shift, 0.0), 3), 1)
                lane_mass += tl.sum(tl.sum(q, 3), 1)
            lane_total = lane_total * tl.exp(seen_top - ref) + tl.sum(tl.sum(tl.exp(shift), 3), 1)
        top = tl.max(lane_top, 1)
        total = tl.sum(lane_total * tl.exp(lane_top - top[:, None]), 1)
        log_sum = tl.log(total)
        mass = hot
        loss = tl.zeros((BLOCK_M,), tl.float32)
        if HAS_Q:
            q_mass = tl.sum(lane_mass, 1)
            mass += q_mass
            loss += tl.sum(lane_cross + lane_mass * (top[:, None] - _finite_reference(lane_top)), 1) + q_mass * log_sum
        if not PROBS:
            z_y = tl.load(
                z_rows + tl.maximum(y, 0).to(tl.int64)[:, None] * stride_zc, mask=(y >= 0)[:, None], other=0.0
            ).to(tl.float32)
            loss += hot * (log_sum + (top - tl.sum(z_y, 1)))
        if dz_ptr is not None:
            first = tl.full((BLOCK_M,), 2147483647, tl.int32)
            blocks = tl.cdiv(C, BLOCK_C)
            for i in range(0, blocks):
                # From the end: the last blocks read are the ones still in the cache.
                offs_c = (blocks - 1 - i) * BLOCK_C + tl.arange(0, BLOCK_C)
                mask = mask_m[:, None] & (offs_c < C)[None, :]
                z = tl.load(z_rows + offs_c.to(tl.int64)[None, :] * stride_zc, mask=mask, other=float("-inf"))
                shift = z.to(tl.float32) - top[:, None]
                q = shift
                if HAS_Q:
                    t_ptrs = t_rows + offs_c.to(tl.int64)[None, :] * stride_tc
                    q = target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, smoothing, PROBS, SMOOTH)
                    if sample_ptr is not None:
                        q *= sample[:, None]
                picked = offs_c[None, :] == y[:, None]
                dz = rows_grad(
                    tl.exp(shift), total, mass, q, hot, picked, ignored, g, HAS_Q, PROBS, divisor_ptr is not None
                )
                if correct_ptr is not None:
                    first = tl.minimum(first, tl.min(tl.where(shift == 0.0, offs_c[None, :], 2147483647), 1))
                d_ptrs = d_rows + offs_c.to(tl.int64)[None, :] * stride_dc
                tl.store(d_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)

    loss = tl.where(ignored, 0.0, loss)
    if correct_ptr is not None:
        tl.store(correct_ptr + row, (first == y).to(correct_ptr.dtype.element_ty), mask=mask_m)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, top, mask=mask_m)
        tl.store(stats_ptr + row + M, total, mask=mask_m)
        if HAS_Q and (PROBS or w_ptr is not None):
            tl.store(stats_ptr + row + M + M, mass, mask=mask_m)
    if REDUCE == "none":
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)
    else:
        loss_sum = tl.sum(tl.where(mask_m, loss, 0.0), 0)
        weight_sum = tl.sum(w_y, 0)
        if partial_ptr is not None:
            tl.store(partial_ptr + tl.program_id(0), loss_sum)
            tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)
        else:
            _store_reduced(loss_sum, weight_sum, loss_ptr, denominator_ptr, REDUCE)


@triton.jit
def _store_reduced(loss_sum, weight_sum, loss_ptr, denominator_ptr, REDUCE: tl.constexpr):
    if REDUCE == "mean":
        loss_sum = loss_sum / weight_sum
        tl.store(denominator_ptr, weight_sum)
    tl.store(loss_ptr, loss_sum.to(loss_ptr.dtype.element_ty))


@triton.jit
def _reduce_kernel(partial_ptr, loss_ptr, denominator_ptr, count, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum [2, count] partial sums of loss and weight in a fixed order; one program."""
    wait_for_previous()
    loss_sums = tl.zeros((BLOCK,), tl.float32)
    weight_sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, count, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        loss_sums += tl.load(partial_ptr + offs, mask=offs < count, other=0.0)
        weight_sums += tl.load(partial_ptr + count + offs, mask=offs < count, other=0.0)
    _store_reduced(tl.sum(loss_sums, 0), tl.sum(weight_sums, 0), loss_ptr, denominator_ptr, REDUCE)


def _plan(
    logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, divisor: Tensor | None,
    rows: Tensor | None, factor: Tensor | None,
    loss: Tensor, stats: Tensor | None, denominator: Tensor | None, dz: Tensor | None, correct: Tensor | None,
    scale: float, smoothing: float,
    ignore_index: int, reduction: str, smooth: bool, summed: int = 0,
) -> Launches:  # fmt: skip
    shape = logits_shape(logits)
    device = current_device()
    probs = target.is_floating_point()
    tile = fwd_tile(shape, logits.element_size(), reduction != "none", probs or smooth, device)
    stride_d = (0, 0, 0) if dz is None else logits_shape(dz).strides
    stride_t = logits_shape(target).strides if probs else (0, 0, 0)
    if not probs:
        stride_t = (0, 0, target.stride(0)) if rows is not None else label_strides(target)
    programs = shape.batch * cdiv(shape.positions, tile.rows)
    partial = New(2, programs) if reduction != "none" and programs > 1 else None
    whole = call(
        _cross_entropy_kernel, (programs,),
        logits, target, weight, sample_weight, divisor, rows, factor,
        loss, stats, partial, denominator, dz, correct, None, None,
        scale, smoothing, ignore_index,
        shape.positions, shape.classes, shape.rows,
        *shape.strides, *stride_t, 0 if weight is None else weight.stride(0),
        None if sample_weight is None else sample_weight.stride(0), *stride_d,
        PROBS=probs, SMOOTH=smooth, SUM=summed, REDUCE=reduction, WHOLE=tile.unroll == 0,
        ALIGN=alignment(shape, shape.strides, stride_d, *([stride_t] if probs else [])),
        BLOCK_M=tile.rows, BLOCK_C=tile.cols, UNROLL=tile.unroll, **tile.compile_options(device),
    )  # fmt: skip
    if partial is None:
        return Launches([whole])
    reduce = call(
        _reduce_kernel, (1,), partial, loss, denominator, programs, REDUCE=reduction, BLOCK=1024, num_warps=4
    )  # fmt: skip
    return Launches([whole, reduce], [partial])


@remembered
def _launch_whole(
    logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, ignore_index: int, reduction: str,
    smooth: bool, dtype: torch.dtype,
) -> Launches:  # fmt: skip
    shape = logits_shape(logits)
    scalar = reduction != "none"
    loss = New(*(() if scalar else _loss_shape(logits)), dtype=dtype)
    stats = New(3 if target.is_floating_point() or (weight is not None and smooth) else 2, shape.rows)
    denominator = New() if reduction == "mean" else None
    launches = _plan(
        logits, target, weight, None, None, None, None, loss, stats, denominator, None, None, 1.0, smoothing,
        ignore_index, reduction, smooth,
    )  # fmt: skip
    results = [loss, stats] if denominator is None else [loss, stats, denominator]
    return Launches(launches.calls, [*results, *launches.news])


_launch = remembered(_plan)


def _members_plan(
    logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, divisor: Tensor | None,
    rows: Tensor | None, factor: Tensor | None, loss: Tensor, dz: Tensor,
    scale: float, smoothing: float,
    ignore_index: int, smooth: bool, summed: int, active: Tensor | None = None,
) -> Call:  # fmt: skip
    """As ``_plan`` of one pass: each member of logits [E, M, C] has the programs of logits [M, C]."""
    E, device, probs = count_of(logits) or 1, current_device(), target.is_floating_point()
    shape, of_dz = _members_shape(logits), _members_shape(dz)
    tile = fwd_tile(shape, logits.element_size(), False, probs or smooth, device)
    of_target, stride_t = stride_of(target, 2 if probs else 1), (0, 0, target.stride(-1))
    strides = [shape.strides, of_dz.strides]
    if probs:
        stride_t = (0, target.stride(-1), target.stride(-2))
        strides.append((of_target, *stride_t[1:]))
    members = _Members(
        shape.strides[0], of_target, stride_of(rows, 1), stride_of(sample_weight, 1), of_dz.strides[0]
    )  # fmt: skip
    return call(
        _cross_entropy_kernel, (cdiv(shape.positions, tile.rows), 1, E),
        logits, target, weight, sample_weight, divisor, rows, factor,
        loss, None, None, None, dz, None, members, active,
        scale, smoothing, ignore_index,
        shape.positions, shape.classes, shape.positions,
        0, *shape.strides[1:], *stride_t, 0 if weight is None else weight.stride(0),
        None if sample_weight is None else sample_weight.stride(-1), 0, *of_dz.strides[1:],
        PROBS=probs, SMOOTH=smooth, SUM=summed, REDUCE="none", WHOLE=tile.unroll == 0,
        ALIGN=alignment(shape, *strides),
        BLOCK_M=tile.rows, BLOCK_C=tile.cols, UNROLL=tile.unroll, **tile.compile_options(device),
    )  # fmt: skip


def _members_shape(logits: Tensor) -> LogitsShape:
    """The members as a batch, so that a tile counts the programs of all."""
    E, M, C = logits.shape
    stride_e, stride_m, stride_c = logits.stride()
    return LogitsShape(E, M, C, (stride_e, stride_c, stride_m))


_launch_members = remembered(_members_plan)
_launch_active = remembered(with_active(_members_plan))


def cross_entropy_of_members(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
    rows: Tensor | None = None,
    loss: Tensor | None = None,
    dz: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``cross_entropy`` for logits [E, M, C], which for ``cross_entropy`` would be C positions of M classes.

    Labels are [M] for all members or [E, M], probabilities [M, C] or [E, M, C], and sample weights [M] or [E, M]; any
    number of rows with ``rows`` [M] or [E, M]. ``factor`` and ``divisor`` are [E], the loss is [E, M], and the class
    weights are those of all members. ``active``, a bool per member: no loss and no dZ are written for others.
    """
    if dz is None:
        dz = torch.empty_like(logits)
    if loss is None:
        loss = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    if rows is not None and rows.stride(-1) != 1:
        rows = rows.contiguous()
    if logits.numel():
        summed = 0
        if divisor is not None:
            summed = _summed(divisor, logits, target, weight, ignore_index, sample_weight, rows)
        tensors = (logits, target, weight, sample_weight, divisor, rows, factor, loss, dz)
        settings, numbers = (ignore_index, smoothing != 0.0, summed), (float(scale), float(smoothing))
        if active is None:
            _launch_members(tensors, settings, numbers)
        else:
            _launch_active((active, *tensors), settings, numbers)
    return loss, dz


def _summed(
    divisor: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    sample_weight: Tensor | None, rows: Tensor | None,
) -> int:  # fmt: skip
    """How many weights the kernel adds at a time; 0 where they are many, and another launch has added them."""
    M, C = logits.shape[-2:]
    summed = summed_block(M)
    if not summed:
        of_labels = {} if target.is_floating_point() else {"target": target, "classes": C, "class_weight": weight}
        total_weight(divisor, M, ignore_index=ignore_index, sample_weight=sample_weight, rows=rows, **of_labels)
    return summed


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
    rows: Tensor | None = None,
    loss: Tensor | None = None,
    dz: Tensor | None = None,
    correct: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the one-pass kernel: (loss of each row, dZ = scale * dloss/dZ).

    Args:
        logits: [M, C] or [N, C, S].
        target: labels [M] or [N, S], int64 or uint8; or probabilities shaped as logits.
        scale, factor: factors of dZ: 1/M for the mean over the batch, and a 0-d float32 that the kernel reads.
        sample_weight: float [M], any stride: factors of the rows' losses and gradients (2-D logits only).
        divisor: float32 0-d, an output: the weight of the batch (``row_weights``), by which dZ is divided (2-D only).
        rows: int64 [M], any stride; row m's label or probabilities are then target[rows[m]], and its weight is
            sample_weight[rows[m]] (2-D logits only).
        loss: output to reuse, contiguous, one value per row, any float dtype; default float32.
        dz: output to reuse, shaped as logits, any strides; default like logits.
        correct: output, contiguous, one value per row, any dtype: 1 where the label is the first largest logit, else 0.
    """
    if dz is None:
        dz = torch.empty_like(logits)
    if loss is None:
        loss = torch.empty(_loss_shape(logits), dtype=torch.float32, device=logits.device)
    if rows is not None:
        rows = rows.contiguous()
    if logits.numel():
        summed = 0
        if divisor is not None:
            summed = _summed(divisor, logits, target, weight, ignore_index, sample_weight, rows)
        _launch(
            (logits, target, weight, sample_weight, divisor, rows, factor, loss, None, None, dz, correct),
            (ignore_index, "none", smoothing != 0.0, summed),
            (float(scale), float(smoothing)),
        )
    return loss, dz


def _loss_shape(logits: Tensor) -> tuple[int, ...]:
    return (*logits.shape[:1], *logits.shape[2:])


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    known: Signature | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward pass: (loss, statistics for the backward pass, denominator of the mean or None).

    ``loss`` is 0-d for "mean" and "sum", else [M] or [N, S], in ``dtype`` (default logits'). The statistics are
    float32 [2 or 3, rows]: maximum, sum of exponentials, and mass where the backward pass cannot see it from the
    label. The denominator is a float32 0-d tensor on the device. ``logits`` must not be empty.
    ``known`` is the signature of logits, target and weight, if the caller has it.
    """
    made = _launch_whole(
        (logits, target, weight),
        (ignore_index, reduction, smoothing != 0.0, dtype or logits.dtype),
        (float(smoothing),),
        known,
    )
    return made[0], made[1], made[2] if reduction == "mean" else None
