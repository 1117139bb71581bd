"""Squared error on softmax probabilities, L = |softmax(z) - y|^2, and its gradient through the softmax, in one pass.

    p = softmax(z),  d = p - y,  L = sum_c d_c^2
    dL/dz = J^T 2 d with J = diag(p) - p p^T:   dz_c = 2 g p_c (d_c - sum_k p_k d_k)       dy_c = -2 g d_c

J is diagonal plus rank one, so no C x C matrix is needed: a row costs one more sum.

Shapes: Z [M, C], any strides; Y labels [M] (int64 or uint8) or values [M, C]. Dtypes: float32, float16, bfloat16;
computed in float32. A label outside [0, C) makes its row NaN. Rows of up to ``WHOLE_ROW`` classes stay in registers;
longer ones are read three times (maximum and sum; the two sums over d; dz).
Members: Z, the loss and dZ have an axis E in front; Y and ``rows`` may have it, and ``factor`` is [E].
Bytes: reads Z (and Y) and writes dZ: 2 M C items, or 4 M C for long rows. Launches: one pass 1, backward 1, forward 1
or 2 (mean and sum).
Source: "Basic mnist" of the backpropagation blog post.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, register_limit
from .dependent import wait_for_previous
from .device import current_device
from .launch import Call, call, remembered, with_active
from .members import count_of, inactive, stride_of
from .reduce_sum import reduce_sum
from .row_weights import batch_weight, load_sample_weights, summed_block, total_weight
from .softmax import softmax_block

__all__ = ["softmax_squared_error", "softmax_squared_error_bwd", "softmax_squared_error_fwd"]

#: Rows of up to this many classes are held in registers by one program.
WHOLE_ROW = 8192
#: Classes at a time of longer rows.
BLOCK_C = 4096


@triton.jit
def _error_block(p, z_mask, y, y_ptrs, offs_c, LABELS: tl.constexpr):
    """D = p - y of a block [BLOCK_M, BLOCK_C], 0 outside the mask."""
    if LABELS:
        target = tl.where(offs_c[None, :] == y[:, None], 1.0, 0.0)
    else:
        target = tl.load(y_ptrs, mask=z_mask, other=0.0).to(tl.float32)
    return tl.where(z_mask, p - target, 0.0)


class _Members(NamedTuple):
    """Elements from one member to the next."""

    z: int
    y: int
    rows: int
    sample: int
    dz: int


@triton.jit(do_not_specialize=["M"])
def _softmax_squared_error_kernel(
    z_ptr, y_ptr, rows_ptr, g_ptr, sample_ptr, divisor_ptr, loss_ptr, dz_ptr, dy_ptr, members, active_ptr,
    scale, M, C,
    stride_zm, stride_zc, stride_ym, stride_yc, stride_g, stride_s, stride_dm, stride_dc,
    LABELS: tl.constexpr, SUM: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        z_ptr += member * members.z
        y_ptr += member * members.y
        loss_ptr += member * M
        dz_ptr += member * members.dz
        if rows_ptr is not None:
            rows_ptr += member * members.rows
        if g_ptr is not None:
            g_ptr += member
        if sample_ptr is not None:
            sample_ptr += member * members.sample
        if divisor_ptr is not None:
            divisor_ptr += member
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < M
    z_rows = z_ptr + row[:, None] * stride_zm
    row_y = row
    if rows_ptr is not None:
        row_y = tl.load(rows_ptr + row, mask=mask_m, other=0).to(tl.int64)
    y_rows = y_ptr + row_y[:, None] * stride_ym
    y = tl.zeros((BLOCK_M,), tl.int64)
    poison = tl.zeros((BLOCK_M,), tl.float32)
    if LABELS:
        y = tl.load(y_ptr + row_y * stride_ym, mask=mask_m, other=0).to(tl.int64)
        poison = tl.where((y >= 0) & (y < C), 0.0, float("nan"))
    g = tl.full((BLOCK_M,), scale, tl.float32)
    if g_ptr is not None:
        g *= tl.load(g_ptr + row * stride_g, mask=mask_m, other=0.0).to(tl.float32)
    if divisor_ptr is not None:
        g = g / batch_weight(
            divisor_ptr, y_ptr, rows_ptr, None, sample_ptr, None, None, stride_s, 1.0, M, C, 0, False, SUM
        )  # fmt: skip
    if sample_ptr is not None:
        sample = load_sample_weights(sample_ptr, row_y * stride_s, mask_m)
        g *= sample

    if WHOLE:
        offs_c = tl.arange(0, BLOCK_C)
        cols = offs_c.to(tl.int64)[None, :]
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        z = tl.load(z_rows + cols * stride_zc, mask=mask, other=float("-inf")).to(tl.float32)
        z = tl.where(mask_m[:, None], z, 0.0)
        top, _, e, total = softmax_block(z)
        p = e / total[:, None]
        d = _error_block(p, mask, y, y_rows + cols * stride_yc, offs_c, LABELS)
        if loss_ptr is not None:
            if sample_ptr is not None:
                loss = (tl.sum(d * d, 1) + poison) * sample
                tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)
            else:
                tl.store(loss_ptr + row, (tl.sum(d * d, 1) + poison).to(loss_ptr.dtype.element_ty), mask=mask_m)
        offs_d = row[:, None] * stride_dm + cols * stride_dc
        if dz_ptr is not None:
            dz = (2.0 * g + poison)[:, None] * p * (d - tl.sum(p * d, 1)[:, None])
            tl.store(dz_ptr + offs_d, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dy_ptr is not None:
            tl.store(dy_ptr + offs_d, (-2.0 * g[:, None] * d).to(dy_ptr.dtype.element_ty), mask=mask)
    else:
        # One row per program: BLOCK_M is 1. Each lane keeps its own maximum and sum until the row ends.
        lane_top = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
        lane_total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            z = tl.load(z_rows + offs_c.to(tl.int64)[None, :] * stride_zc, mask=mask, other=float("-inf"))
            z = z.to(tl.float32)
            seen = lane_top
            lane_top = tl.maximum(lane_top, z)
            # The reference of a lane that has seen only -inf is 0, so that -inf - -inf makes no NaN.
            ref = tl.where(lane_top == float("-inf"), 0.0, lane_top)
            lane_total = lane_total * tl.exp(seen - ref) + tl.exp(z - ref)
        top = tl.max(lane_top, 1)
        total = tl.sum(lane_total * tl.exp(lane_top - top[:, None]), 1)
        square = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        inner = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            cols = offs_c.to(tl.int64)[None, :]
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            z = tl.load(z_rows + cols * stride_zc, mask=mask, other=float("-inf")).to(tl.float32)
            p = tl.exp(z - top[:, None]) / total[:, None]
            d = _error_block(p, mask, y, y_rows + cols * stride_yc, offs_c, LABELS)
            square += d * d
            inner += p * d
            if dy_ptr is not None:
                offs_d = row[:, None] * stride_dm + cols * stride_dc
                tl.store(dy_ptr + offs_d, (-2.0 * g[:, None] * d).to(dy_ptr.dtype.element_ty), mask=mask)
        if loss_ptr is not None:
            if sample_ptr is not None:
                loss = (tl.sum(square, 1) + poison) * sample
                tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=mask_m)
            else:
                tl.store(loss_ptr + row, (tl.sum(square, 1) + poison).to(loss_ptr.dtype.element_ty), mask=mask_m)
        if dz_ptr is not None:
            inner_sum = tl.sum(inner, 1)
            for c in range(0, C, BLOCK_C):
                offs_c = c + tl.arange(0, BLOCK_C)
                cols = offs_c.to(tl.int64)[None, :]
                mask = mask_m[:, None] & (offs_c < C)[None, :]
                z = tl.load(z_rows + cols * stride_zc, mask=mask, other=float("-inf")).to(tl.float32)
                p = tl.exp(z - top[:, None]) / total[:, None]
                d = _error_block(p, mask, y, y_rows + cols * stride_yc, offs_c, LABELS)
                dz = (2.0 * g + poison)[:, None] * p * (d - inner_sum[:, None])
                offs_d = row[:, None] * stride_dm + cols * stride_dc
                tl.store(dz_ptr + offs_d, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _launch(
    logits: Tensor,
    target: Tensor,
    *,
    taken: Tensor | None = None,
    g: Tensor | None = None,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    loss: Tensor | None = None,
    dz: Tensor | None = None,
    dy: Tensor | None = None,
    scale: float = 1.0,
    active: Tensor | None = None,
) -> None:
    M = logits.shape[-2]
    summed = 0 if divisor is None else summed_block(M)
    if divisor is not None and not summed:
        total_weight(divisor, M, sample_weight=sample_weight, rows=taken)
    tensors = (logits, target, taken, g, sample_weight, divisor, loss, dz, dy)
    if active is None:
        _launch_planned(tensors, (summed,), (float(scale),))
    else:
        _launch_active((active, *tensors), (summed,), (float(scale),))


def _plan(
    logits: Tensor, target: Tensor, taken: Tensor | None, g: Tensor | None, sample_weight: Tensor | None,
    divisor: Tensor | None, loss: Tensor | None, dz: Tensor | None, dy: Tensor | None, scale: float, summed: int,
    active: Tensor | None = None,
) -> Call:  # fmt: skip
    M, C = logits.shape[-2:]
    labels = not target.is_floating_point()
    cols = max(2, triton.next_power_of_2(C))
    whole = cols <= WHOLE_ROW
    if whole:
        num_warps = min(8, max(1, cols // 512))
        rows = max(1, min(triton.next_power_of_2(M), 512 * num_warps // cols))
    else:
        num_warps, rows, cols = 8, 1, BLOCK_C
    # Without the limit ptxas spills registers of long rows to fit one more program on a multiprocessor.
    options = register_limit(128 if cols > 512 else None, current_device())
    stride_d = next((t.stride()[-2:] for t in (dz, dy) if t is not None), (0, 0))
    count, members = count_of(logits), None
    if count is not None:
        of_members = (logits, 2), (target, 1 if labels else 2), (taken, 1), (sample_weight, 1), (dz, 2)
        members = _Members(*[stride_of(*of) for of in of_members])
    return call(
        _softmax_squared_error_kernel, (cdiv(M, rows), 1, count or 1),
        logits, target, taken, g, sample_weight, divisor, loss, dz, dy, members, active,
        scale, M, C,
        *logits.stride()[-2:], *((target.stride(-1), 0) if labels else target.stride()[-2:]),
        0 if g is None or g.dim() == 0 or members is not None else g.stride(0),
        None if sample_weight is None else sample_weight.stride(-1), *stride_d,
        LABELS=labels, SUM=summed, WHOLE=whole, BLOCK_M=rows, BLOCK_C=cols, num_warps=num_warps,
        # A sum over lanes adds a lane's own square to another lane's. The fused fma(d, d, other) would round the other
        # square but not the own one, and the lanes that hold one row would end with different sums.
        enable_fp_fusion=False,
        **options,
    )  # fmt: skip


_launch_planned = remembered(_plan)
_launch_active = remembered(with_active(_plan))


def softmax_squared_error(
    logits: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    factor: Tensor | None = None,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    rows: Tensor | None = None,
    loss: Tensor | None = None,
    dz: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch one pass over logits [M, C]: (loss of each row in float32, dZ = scale factor dL/dZ).

    ``scale`` is 1/M for the mean; ``factor`` is a 0-d float32 that the kernel reads. ``rows`` (int64 [M], contiguous)
    takes row m's target from target[rows[m]], of any number of them, and its sample weight likewise. ``sample_weight``
    [M] are factors of the rows' losses and gradients. ``divisor`` (float32, 0-d) is an output: the weight of the batch
    (``row_weights``), by which dZ is divided. ``active``, a bool per member of logits [E, M, C]: nothing is written for
    others.
    """
    if loss is None:
        loss = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    if dz is None:
        dz = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel():
        weights = {"sample_weight": sample_weight, "divisor": divisor}
        _launch(logits, target, taken=rows, g=factor, loss=loss, dz=dz, scale=scale, active=active, **weights)
    else:
        loss.zero_()  # of rows without classes
    return loss, dz


def softmax_squared_error_fwd(logits: Tensor, target: Tensor, *, scale: float | None = None) -> Tensor:
    """Launch the forward pass, in logits' dtype: the loss of each row [M], or scale times their sum (0-d)."""
    M = logits.shape[0]
    rows = torch.empty(M, dtype=logits.dtype if scale is None else torch.float32, device=logits.device)
    if logits.numel():
        _launch(logits, target, loss=rows)
    else:
        rows.zero_()  # rows without classes
    if scale is None:
        return rows
    out = torch.empty((), dtype=logits.dtype, device=logits.device)
    reduce_sum(rows, out, scale)
    return out


def softmax_squared_error_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, *, scale: float = 1.0, want_dz: bool = True, want_dy: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward pass: (dZ, dY), each None unless wanted; ``dloss`` is 0-d or [M] with any stride."""
    dz = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want_dz else None
    dy = torch.empty(target.shape, dtype=target.dtype, device=target.device) if want_dy else None
    if logits.numel():
        _launch(logits, target, g=dloss, dz=dz, dy=dy, scale=scale)
    return dz, dy
