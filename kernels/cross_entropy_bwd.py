"""Softmax cross-entropy, the backward pass apart: dZ and dTarget from the upstream gradient and saved statistics.

    dz_ic = g_i (mass p_ic - q_ic - [c = y] hot)
    dt_ic = g_i (1-e) w_c (log_sum - shift_ic)            probabilities only

Notation, shapes and dtypes are those of ``cross_entropy``, whose forward pass saves the statistics. g is the upstream
gradient, 0-d or one number per row, for the mean divided by the denominator that the forward pass stored.
Bytes: reads M C items of Z, and of probabilities, and writes M C per gradient wanted. Launches: 1. Every element is
written by one program, without atomics: two runs are bitwise equal.
Source: softmax NLL and its gradient p - onehot (notes 7.4; the notebook's g3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .dependent import wait_for_previous
from .device import current_device
from .launch import Launches, New, call, remembered
from .softmax import load_labels, row_offsets, target_block
from .softmax_tiles import alignment, bwd_tile, label_strides, logits_shape, row_strides

__all__ = ["cross_entropy_bwd"]


@triton.jit(do_not_specialize=["ignore_index", "M"])
def _cross_entropy_bwd_kernel(
    z_ptr, target_ptr, w_ptr, stats_ptr, g_ptr, denominator_ptr, dz_ptr, dt_ptr,
    smoothing, ignore_index: tl.int64,
    P, C, M,
    stride_zb, stride_zc, stride_zp, stride_tb, stride_tc, stride_tp, stride_w, stride_gb, stride_gp,
    stride_db, stride_dc, stride_dp,
    PROBS: tl.constexpr, SMOOTH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    C = C // ALIGN * ALIGN
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_p = tl.cdiv(P, BLOCK_M)
    pid = tl.program_id(0) // tiles_c
    b = pid // tiles_p
    offs_p = (pid % tiles_p) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_p < P
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    row = b.to(tl.int64) * P + offs_p

    g = tl.load(g_ptr + b.to(tl.int64) * stride_gb + offs_p.to(tl.int64) * stride_gp, mask=mask_m, other=0.0)
    g = g.to(tl.float32)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr)
    top = tl.load(stats_ptr + row, mask=mask_m, other=0.0)
    total = tl.load(stats_ptr + row + M, mask=mask_m, other=1.0)
    HAS_Q: tl.constexpr = PROBS or SMOOTH
    t_rows = z_ptr + row_offsets(b, offs_p, stride_zb, stride_zp, ALIGN)[:, None]
    z = tl.load(t_rows + offs_c.to(tl.int64)[None, :] * stride_zc, mask=mask, other=0.0).to(tl.float32)
    shift = z - top[:, None]
    if PROBS:
        t_rows = target_ptr + row_offsets(b, offs_p, stride_tb, stride_tp, ALIGN)[:, None]
        mass = tl.zeros((BLOCK_M,), tl.float32)
    else:
        offs_t = b.to(tl.int64) * stride_tb + offs_p.to(tl.int64) * stride_tp
        y, mass, ignored = load_labels(target_ptr, offs_t, mask_m, w_ptr, stride_w, C, ignore_index)
        g = tl.where(ignored, 0.0, g)
        hot = mass * (1.0 - smoothing) if SMOOTH else mass
    if HAS_Q and (PROBS or w_ptr is not None):
        mass = tl.load(stats_ptr + row + M + M, mask=mask_m, other=0.0)
    offs_d = row_offsets(b, offs_p, stride_db, stride_dp, ALIGN)[:, None] + offs_c.to(tl.int64)[None, :] * stride_dc
    if dz_ptr is not None:
        dz = tl.exp(shift) * (mass / total)[:, None]
        if HAS_Q:
            t_ptrs = t_rows + offs_c.to(tl.int64)[None, :] * stride_tc
            dz -= target_block(t_ptrs, mask, w_ptr, stride_w, offs_c, C, smoothing, PROBS, SMOOTH)
        if not PROBS:
            dz = tl.where(offs_c[None, :] == y[:, None], dz - hot[:, None], dz)
        tl.store(dz_ptr + offs_d, (dz * g[:, None]).to(dz_ptr.dtype.element_ty), mask=mask)
    if dt_ptr is not None:
        dt = (g * (1.0 - smoothing))[:, None] * (tl.log(total)[:, None] - shift)
        if w_ptr is not None:
            dt *= tl.load(w_ptr + offs_c.to(tl.int64) * stride_w, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(dt_ptr + offs_d, dt.to(dt_ptr.dtype.element_ty), mask=mask)


@remembered
def _launch_bwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, dloss: Tensor, denominator: Tensor | None,
    smoothing: float, ignore_index: int, smooth: bool, want_dz: bool, want_dt: bool,
) -> Launches:  # fmt: skip
    shape = logits_shape(logits)
    probs = target.is_floating_point()
    tile = bwd_tile(shape, current_device())
    dz = New.like(logits) if want_dz else None
    dt = New.like(logits, target.dtype) if want_dt else None
    stride_d = logits_shape(dz or dt or logits).strides
    stride_t = logits_shape(target).strides if probs else label_strides(target)
    launch = call(
        _cross_entropy_bwd_kernel,
        (shape.batch * cdiv(shape.positions, tile.rows) * cdiv(shape.classes, tile.cols),),
        logits, target, weight, stats, dloss, denominator, dz, dt,
        smoothing, ignore_index,
        shape.positions, shape.classes, shape.rows,
        *shape.strides, *stride_t, 0 if weight is None else weight.stride(0),
        *((0, 0) if dloss.dim() == 0 else row_strides(dloss)), *stride_d,
        PROBS=probs, SMOOTH=smooth,
        ALIGN=alignment(shape, shape.strides, stride_d, *([stride_t] if probs else [])),
        BLOCK_M=tile.rows, BLOCK_C=tile.cols, num_warps=tile.num_warps,
    )  # fmt: skip
    return Launches([launch], [new for new in (dz, dt) if new is not None])


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    denominator: Tensor | None = None,
    want_dz: bool = True,
    want_dt: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward pass: (dZ, dTarget), each None unless wanted; dTarget for probabilities only.

    ``dloss`` is the upstream gradient, read on the device: 0-d, or [M] or [N, S] with any strides (expanded too).
    """
    made = iter(
        _launch_bwd(
            (logits, target, weight, stats, dloss, denominator),
            (ignore_index, smoothing != 0.0, want_dz, want_dt),
            (float(smoothing),),
        )
    )
    return next(made) if want_dz else None, next(made) if want_dt else None
