"""A = f(X W^T + b): linear layer, bias and activation in one pass.

Shapes: X [M, K], W [N, K], b [N], A and Z [M, N]; any strides for X and W, A and Z contiguous.
Dtypes: X, W, b float32, float16 or bfloat16, all alike, accumulated in float32; or X uint8 pixels, which count as
X / 255: the integers are exact in every dtype, so they go through the product as they are and the accumulator
is scaled once.
Members: W [E, N, K], b [E, N], A and Z [E, M, N]; X [M, K] and ``rows`` [M] for all members, or [E, M, K] and [E, M].
Optional: ``rows`` int64 [M], any stride, gathers the rows of X inside the kernel (row m of the product is X[rows[m]]);
``save_z`` also writes Z = X W^T + b, for activations whose derivative needs it; ``dropout`` multiplies A (not Z) by F
(see ``dropout``).
Bytes: reads X once per column of tiles and W once per row of tiles (neighbours share them in the L2 cache by the
grouped order); reads b; writes A (and Z) once. The least possible: (M K + N K + N + M N) items.
Source: the layer equations of all four source documents, in row-vector form with torch's [out, in] weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .configs import TileRule, cdiv, gemm_tile, loads_wide
from .dependent import wait_for_previous
from .device import current_device, input_precision
from .dropout import Dropout, arguments_of, dropout_key, factor_of_block
from .launch import Call, call, remembered, with_active, with_dropout
from .members import count_of, inactive, stride_of
from .tiling import EPILOGUE_SIZE, accumulated, accumulator, as_column, dot, grouped_tile, halves, reduced, transposed

__all__ = ["linear_fwd"]

GROUP_M = 8


class _Members(NamedTuple):
    """Elements from one member to the next."""

    x: int
    w: int
    b: int
    a: int
    rows: int


@triton.jit(do_not_specialize=["dropout"])
def _linear_fwd_kernel(
    x_ptr, w_ptr, b_ptr, a_ptr, z_ptr, rows_ptr, members, active_ptr, dropout,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_b,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, GATHER: tl.constexpr, PIXELS: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        x_ptr += member * members.x
        w_ptr += member * members.w
        a_ptr += member * members.a
        if HAS_BIAS:
            b_ptr += member * members.b
        if SAVE_Z:
            z_ptr += member * members.a
        if GATHER:
            rows_ptr += member * members.rows
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = reduced(BLOCK_K, SLICES)
    mask_m = offs_m < M
    mask_n = offs_n < N

    # Offsets are int64: M * stride_xm passes 2^31 for large data sets, K * stride_xk for transposed ones.
    if GATHER:
        row_m = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    else:
        row_m = offs_m.to(tl.int64)
    cols_k = offs_k.to(tl.int64)
    x_ptrs = x_ptr + as_column(row_m, SLICES) * stride_xm + cols_k * stride_xk
    w_ptrs = w_ptr + as_column(offs_n.to(tl.int64), SLICES) * stride_wn + cols_k * stride_wk
    step_x = tl.cast(BLOCK_K, tl.int64) * stride_xk
    step_w = tl.cast(BLOCK_K, tl.int64) * stride_wk

    # 16-bit values made of pixels are the second operand, of W X^T, which goes through shared memory. The first operand
    # of X W^T would stay in registers, where the next step could overwrite what a wgmma reads (triton issue 9433). Only
    # waits that ptxas adds to every product would prevent that.
    TURNED: tl.constexpr = PIXELS and w_ptr.dtype.element_ty != tl.float32
    if TURNED:
        acc = accumulator((SLICES, BLOCK_N, BLOCK_M), INPUT_PRECISION)
    else:
        acc = accumulator((SLICES, BLOCK_M, BLOCK_N), INPUT_PRECISION)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=as_column(mask_m, SLICES), other=0.0)
            w = tl.load(w_ptrs, mask=as_column(mask_n, SLICES), other=0.0)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=as_column(mask_m, SLICES) & mask_k, other=0.0)
            w = tl.load(w_ptrs, mask=as_column(mask_n, SLICES) & mask_k, other=0.0)
        # Both operands are loaded along their rows, and one is transposed in the dot. By the count of the executed code
        # this takes fewer instructions than loading columns.
        if PIXELS:
            x = x.to(tl.float32).to(w.dtype)
        if TURNED:
            acc = dot(w, transposed(x), acc, INPUT_PRECISION)
        else:
            acc = dot(x, transposed(w), acc, INPUT_PRECISION)
        x_ptrs += step_x
        w_ptrs += step_w
    acc = accumulated(acc, INPUT_PRECISION)
    if TURNED:
        acc = tl.trans(acc)

    if PIXELS:
        acc = acc * (1.0 / 255.0)
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n.to(tl.int64) * stride_b, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    key = 0
    if dropout is not None:
        key = dropout_key(dropout)
    _store_a(acc, a_ptr, z_ptr, dropout, key, offs_m, pid_n * BLOCK_N, M, N, ACTIVATION, SAVE_Z)


@triton.jit
def _store_a(z, a_ptr, z_ptr, dropout, key, offs_m, first_n, M, N, ACTIVATION: tl.constexpr, SAVE_Z: tl.constexpr):
    """The epilogue: store a block of A = f(Z), and of Z.

    Blocks above ``EPILOGUE_SIZE`` are halved, with dropout and Z once more, because random numbers take registers.
    """
    if z.numel > EPILOGUE_SIZE or (dropout is not None and SAVE_Z and z.numel > EPILOGUE_SIZE // 2):
        left, right = halves(z)
        _store_a(left, a_ptr, z_ptr, dropout, key, offs_m, first_n, M, N, ACTIVATION, SAVE_Z)
        _store_a(right, a_ptr, z_ptr, dropout, key, offs_m, first_n + left.shape[1], M, N, ACTIVATION, SAVE_Z)
    else:
        offs_n = first_n + tl.arange(0, z.shape[1])
        offs_a = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask_a = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if SAVE_Z:
            tl.store(z_ptr + offs_a, z.to(z_ptr.dtype.element_ty), mask=mask_a)
        a_ptrs = a_ptr + offs_a
        a = activate(z, ACTIVATION)
        if dropout is not None:
            a = a * factor_of_block(dropout, key, offs_m, first_n, M, N, z.shape[1])
        tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=mask_a)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, z: Tensor | None, rows: Tensor | None,
    activation: str, gemm_tile: TileRule, active: Tensor | None = None, dropout: tuple[Any, ...] | None = None,
) -> Call:  # fmt: skip
    """What ``linear_fwd`` launches."""
    M = a.shape[-2]
    N, K = weight.shape[-2:]
    device = current_device()
    count, members = count_of(weight), None
    if count is not None:
        strides = [stride_of(*of) for of in ((x, 2), (weight, 2), (bias, 1), (a, 2), (rows, 1))]
        members = _Members(*strides)
    tile = gemm_tile("fwd", M, N, K, weight.dtype, device, wide=loads_wide(x, weight), members=count or 1)
    return call(
        _linear_fwd_kernel, (cdiv(M, tile.rows) * cdiv(N, tile.cols), 1, count or 1),
        x, weight, bias, a, z, rows, members, active, arguments_of(dropout),
        M, N, K,
        x.stride(-2), x.stride(-1), weight.stride(-2), weight.stride(-1), 0 if bias is None else bias.stride(-1),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None, SAVE_Z=z is not None, GATHER=rows is not None, PIXELS=x.dtype == torch.uint8,
        EVEN_K=K % tile.depth == 0, INPUT_PRECISION=input_precision(device, weight.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.depth, SLICES=tile.slices, GROUP_M=GROUP_M,
        **tile.compile_options,
    )  # fmt: skip


_launch = remembered(plan)
_launch_active = remembered(with_active(plan))
_launch_dropping = remembered(with_dropout(plan))


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    save_z: bool = False,
    rows: Tensor | None = None,
    a: Tensor | None = None,
    z: Tensor | None = None,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch A = f(X W^T + b); returns (A, Z or None). ``a`` and ``z`` are outputs to reuse, contiguous [M, N].

    ``active`` is a bool per member; A of members that are not active is not written. ``dropout`` is that of A; Z is
    never dropped.
    """
    M = x.shape[-2] if rows is None else rows.shape[-1]
    N = weight.shape[-2]
    if a is None:
        a = torch.empty((*weight.shape[:-2], M, N), dtype=weight.dtype, device=x.device)
    if save_z and z is None:
        z = torch.empty_like(a)
    if M == 0 or N == 0:
        return a, z
    if rows is not None and rows.stride(-1) != 1:
        rows = rows.contiguous()
    if dropout is not None:
        state, *drawn = dropout
        _launch_dropping((state, active, x, weight, bias, a, z, rows), (activation, gemm_tile, tuple(drawn)))
    elif active is None:
        _launch((x, weight, bias, a, z, rows), (activation, gemm_tile))
    else:
        _launch_active((active, x, weight, bias, a, z, rows), (activation, gemm_tile))
    return a, z
