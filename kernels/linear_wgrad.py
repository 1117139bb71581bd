"""dW = dZ^T X and db = sum over the batch of dZ: the outer-product gradients of a linear layer, in one pass.

Shapes: dZ [M, N], X [M, K], dW [N, K], db [N]; any strides for dZ and X, dW and db contiguous.
Dtypes: dZ and X float32, float16 or bfloat16, alike, accumulated in float32; or X uint8 pixels, which count as
X / 255 (the accumulator is scaled once). ``rows`` int64 [M], any stride, gathers the rows of X inside the kernel.

Members: dZ [E, M, N], dW [E, N, K], db [E, N]; X [M, K] and ``rows`` [M] for all members, or [E, M, K] and [E, M].

The batch is the reduction. When the output has fewer tiles than the GPU has room for, each tile's batch is split over
S programs (``configs.splits``). These write float32 partial sums to a workspace [S, N K + N], with members
[S, E, N K + N], and a second kernel adds the S slices in their order. Programs of their own add the rows of dZ, beside
those of the tiles (``column_sums`` has the order of the sums). There are no atomics, so two runs agree bit by bit.
Bytes: reads dZ once per column of tiles, and once for db; reads X once per row of tiles; writes dW and db. A split
batch also writes and reads S (N K + N) floats.
Source: dL/dW = (dL/dZ)^T A_{l-1}, dL/db = dL/dZ, summed over the batch (np.outer in the first document).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import SUM_COLS, column_sums
from .configs import Tile, cdiv, gemm_tile, loads_wide, splits
from .dependent import wait_for_previous
from .device import current_device, input_precision
from .launch import Call, call, remembered
from .members import count_of, stride_of
from .tiling import EPILOGUE_SIZE, accumulated, accumulator, dot, grouped_tile, halves

__all__ = ["linear_wgrad"]

GROUP_N = 8
#: Four partial sums per thread. Eight, which are 16 bytes of a 16-bit result, would read half a sector at a time.
REDUCE_BLOCK = 512


@triton.jit
def wgrad_tile(
    dz_ptr, x_ptr, rows_ptr,
    N, K, m_begin, m_end, pid_n, pid_k,
    stride_zm, stride_zn, stride_xm, stride_xk,
    GATHER: tl.constexpr, PIXELS: tl.constexpr, EVEN_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The float32 block [BLOCK_N, BLOCK_K] of dW of the samples m_begin <= m < m_end; N columns of dZ may be read."""
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    mask_k = offs_k < K
    # dZ is read as its transpose, [BLOCK_N, BLOCK_M] with the contiguous axis first. If dZ were loaded as [BLOCK_M,
    # BLOCK_N] and transposed in the dot, float32 would be stored to shared memory a second time, with bank conflicts,
    # and 16-bit blocks would lose their asynchronous copies.
    row_m = (m_begin + offs_m).to(tl.int64)
    dz_ptrs = dz_ptr + offs_n.to(tl.int64)[:, None] * stride_zn + row_m[None, :] * stride_zm
    cols_k = x_ptr + offs_k.to(tl.int64)[None, :] * stride_xk
    x_ptrs = cols_k + row_m[:, None] * stride_xm
    step_z = tl.cast(BLOCK_M, tl.int64) * stride_zm
    step_x = tl.cast(BLOCK_M, tl.int64) * stride_xm

    dw = accumulator((BLOCK_N, BLOCK_K), INPUT_PRECISION)
    for m in range(m_begin, m_end, BLOCK_M):
        mask_m = offs_m < m_end - m
        if GATHER:
            row_x = tl.load(rows_ptr + m + offs_m, mask=mask_m, other=0).to(tl.int64)
            x_ptrs = cols_k + row_x[:, None] * stride_xm
        if EVEN_M:
            dz = tl.load(dz_ptrs, mask=mask_n[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        else:
            dz = tl.load(dz_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if PIXELS:
            x = x.to(tl.float32).to(dz.dtype)
        dw = dot(dz, x, dw, INPUT_PRECISION)
        dz_ptrs += step_z
        if not GATHER:
            x_ptrs += step_x
    dw = accumulated(dw, INPUT_PRECISION)
    if PIXELS:
        dw = dw * (1.0 / 255.0)
    return dw


class _Members(NamedTuple):
    """Elements from one member to the next."""

    dz: int
    x: int
    rows: int
    dw: int
    db: int


@triton.jit
def _linear_wgrad_kernel(
    dz_ptr, x_ptr, rows_ptr, dw_ptr, db_ptr, members,
    M, N, K, m_per_split, stride_split,
    stride_zm, stride_zn, stride_xm, stride_xk,
    HAS_BIAS: tl.constexpr, GATHER: tl.constexpr, PIXELS: tl.constexpr,
    EVEN_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    SUM_COLS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        dz_ptr += member * members.dz
        x_ptr += member * members.x
        dw_ptr += member * members.dw
        if GATHER:
            rows_ptr += member * members.rows
        if HAS_BIAS:
            db_ptr += member * members.db
    # With one split the outputs are dW and db themselves (stride_split is 0), otherwise this split's workspace slice.
    split = tl.program_id(1)
    slice_start = split.to(tl.int64) * stride_split
    m_begin = split * m_per_split
    m_end = tl.minimum(m_begin + m_per_split, M)
    pid = tl.program_id(0)
    if HAS_BIAS:
        pid -= tl.cdiv(N, SUM_COLS)
    if pid >= 0:
        pid_n, pid_k = grouped_tile(pid, tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
        dw = wgrad_tile(
            dz_ptr, x_ptr, rows_ptr,
            N, K, m_begin, m_end, pid_n, pid_k,
            stride_zm, stride_zn, stride_xm, stride_xk,
            GATHER, PIXELS, EVEN_M, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_dw(dw, dw_ptr + slice_start, pid_n * BLOCK_N + tl.arange(0, BLOCK_N), pid_k * BLOCK_K, N, K)
    elif HAS_BIAS:
        offs_n = tl.program_id(0) * SUM_COLS + tl.arange(0, SUM_COLS)
        ROWS: tl.constexpr = BLOCK_M * BLOCK_N // SUM_COLS
        db = column_sums(dz_ptr, m_begin, m_end, stride_zm, stride_zn, offs_n, offs_n < N, ROWS)
        tl.store(db_ptr + slice_start + offs_n, db.to(db_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _store_dw(dw, dw_ptr, offs_n, first_k, N, K):
    """The epilogue: store a block of dW. Blocks above ``EPILOGUE_SIZE`` are halved."""
    if dw.numel > EPILOGUE_SIZE:
        left, right = halves(dw)
        _store_dw(left, dw_ptr, offs_n, first_k, N, K)
        _store_dw(right, dw_ptr, offs_n, first_k + left.shape[1], N, K)
    else:
        offs_k = first_k + tl.arange(0, dw.shape[1])
        dw_ptrs = dw_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        tl.store(dw_ptrs, dw.to(dw_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


@triton.jit
def sum_slices(partial_ptr, offs, mask, n_splits, stride_split):
    """Sum over s of partial[s * stride_split + offs], in the order of s: the same result in every run."""
    slice_ptrs = partial_ptr + offs
    total = tl.load(slice_ptrs, mask=mask, other=0.0)
    for _ in range(1, n_splits):
        slice_ptrs += stride_split
        total += tl.load(slice_ptrs, mask=mask, other=0.0)
    return total


@triton.jit
def _wgrad_reduce_kernel(
    partial_ptr, dw_ptr, db_ptr, member_sums, weights, total, n_splits, stride_split,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if member_sums is not None:
        member = tl.program_id(2).to(tl.int64)
        partial_ptr += member * member_sums
        dw_ptr += member * weights
        if HAS_BIAS:
            db_ptr += member * (total - weights)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = sum_slices(partial_ptr, offs, offs < total, n_splits, stride_split)
    tl.store(dw_ptr + offs, grad.to(dw_ptr.dtype.element_ty), mask=offs < weights)
    if HAS_BIAS:
        tl.store(db_ptr + (offs - weights), grad.to(db_ptr.dtype.element_ty), mask=(offs >= weights) & (offs < total))


@remembered
def _launch(
    dz: Tensor, x: Tensor, rows: Tensor | None, out_w: Tensor, out_b: Tensor | None,
    tile: Tile, n_splits: int, m_per_split: int, stride_split: int,
) -> Call:  # fmt: skip
    M, N = dz.shape[-2:]
    K = x.shape[-1]
    programs = cdiv(N, tile.rows) * cdiv(K, tile.cols) + (0 if out_b is None else cdiv(N, SUM_COLS))
    count, members = count_of(dz), None
    if count is not None:
        # Partial sums are [S, E, N K + N], and the part of db lies behind that of dW.
        sums = None if n_splits == 1 else out_w.stride(1)
        dw, db = (N * K, N) if sums is None else (sums, sums)
        members = _Members(*[stride_of(*of) for of in ((dz, 2), (x, 2), (rows, 1))], dw, db)
    return call(
        _linear_wgrad_kernel, (programs, n_splits, count or 1),
        dz, x, rows, out_w, out_b, members,
        M, N, K, m_per_split, stride_split if n_splits > 1 else 0,
        dz.stride(-2), dz.stride(-1), x.stride(-2), x.stride(-1),
        HAS_BIAS=out_b is not None, GATHER=rows is not None, PIXELS=x.dtype == torch.uint8,
        EVEN_M=M % tile.depth == 0, INPUT_PRECISION=input_precision(current_device(), dz.dtype, tile.fma),
        BLOCK_M=tile.depth, BLOCK_N=tile.rows, BLOCK_K=tile.cols, GROUP_N=GROUP_N, SUM_COLS=SUM_COLS,
        **tile.compile_options,
    )  # fmt: skip


@remembered
def _launch_reduce(partial: Tensor, dw: Tensor, db: Tensor | None) -> Call:
    n_splits, stride_split = partial.shape[0], partial.stride(0)
    count = count_of(dw) or 1
    weights = dw.numel() // count
    total = weights + (0 if db is None else db.numel() // count)
    member_sums = None if partial.dim() == 2 else partial.stride(1)
    return call(
        _wgrad_reduce_kernel, (cdiv(total, REDUCE_BLOCK), 1, count),
        partial, dw, db, member_sums, weights, total, n_splits, stride_split,
        HAS_BIAS=db is not None, BLOCK=REDUCE_BLOCK,
    )  # fmt: skip


def linear_wgrad(
    dz: Tensor,
    x: Tensor,
    *,
    bias: bool = True,
    rows: Tensor | None = None,
    dw: Tensor | None = None,
    db: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch dW = dZ^T X and, with ``bias``, db; returns (dW, db or None). ``dw``, ``db``: outputs to reuse."""
    M, N = dz.shape[-2:]
    K, leading = x.shape[-1], dz.shape[:-2]
    if dw is None:
        dw = torch.empty((*leading, N, K), dtype=dz.dtype, device=dz.device)
    if bias and db is None:
        db = torch.empty((*leading, N), dtype=dz.dtype, device=dz.device)
    if N == 0 or K == 0:
        return dw, db if db is None else torch.sum(dz, -2, out=db)
    if rows is not None and rows.stride(-1) != 1:
        rows = rows.contiguous()
    device, members = current_device(), count_of(dz) or 1
    pixels = x.dtype == torch.uint8
    tile = gemm_tile("wgrad", N, K, M, dz.dtype, device, wide=loads_wide(dz, x), members=members, pixels=pixels)
    sum_programs = cdiv(N, SUM_COLS) if bias else 0
    n_splits = splits("wgrad", tile, ((N, K),), M, dz.dtype, device, beside=sum_programs, members=members)
    m_per_split = cdiv(cdiv(M, tile.depth), n_splits) * tile.depth
    n_splits = max(1, cdiv(M, m_per_split)) if M else 1
    total = N * K + (N if bias else 0)
    stride_split = cdiv(total, 32) * 32
    db = db if bias else None
    out_w, out_b = dw, db
    if n_splits > 1:
        partial = torch.empty((n_splits, *leading, stride_split), dtype=torch.float32, device=dz.device)
        out_w, out_b = partial, partial[0, ..., N * K :] if bias else None
        stride_split *= members
    _launch((dz, x, rows, out_w, out_b), (tile, n_splits, m_per_split, stride_split))
    if n_splits > 1:
        _launch_reduce((partial, dw, db))
    return dw, db
