"""dX = (dZ W) * f'(X): gradient of a linear layer's input, times the derivative of the activation below.

The layer's input X is the output A_{l-1} of the layer below. With that layer's f the result is its dZ_{l-1}, so the
chain needs no elementwise pass between layers. With f = identity the result is plain dX.

Shapes: dZ [M, N], W [N, K], dX and ``saved`` [M, K]; any strides for dZ and W, dX and saved contiguous.
``saved`` is what f' is computed from: A_{l-1}, or Z_{l-1}, or None (see ``activations``).
Dtypes: float32, float16 or bfloat16, all alike, accumulated in float32.
Members: W [E, N, K], and dZ, dX and ``saved`` with an axis E in front.
Optional: ``sums`` takes the sums of the rows of dX, a row per block of rows (see ``column_sums``); ``dropout`` of the
layer below multiplies dX by F, and ``saved`` is that layer's output after dropout (see ``dropout``).
Bytes: reads dZ once per column of tiles, W once per row of tiles and saved once; writes dX. The least possible:
(M N + N K + 2 M K) items.
Source: dL/dA_{l-1} = dL/dZ_l W_l and dL/dZ = f'(Z) * dL/dA (lecture notes 7.5; the notebook's g1, g2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_grad
from .column_sums import ColumnSums, store_block_sums
from .configs import Tile, TileRule, cdiv, gemm_tile, loads_wide
from .dependent import wait_for_previous
from .device import current_device, input_precision
from .dropout import Dropout, arguments_of, dropout_key, factor_of_block, grad_of_dropped
from .launch import Call, call, remembered, with_active, with_dropout
from .members import count_of, inactive, stride_of
from .tiling import (
    EPILOGUE_SIZE,
    accumulated,
    accumulator,
    as_column,
    as_row,
    dot,
    grouped_tile,
    halves,
    reduced,
    transposed,
)

__all__ = ["linear_dgrad"]

GROUP_M = 8


class _Members(NamedTuple):
    """Elements from one member to the next."""

    dz: int
    w: int
    dx: int
    sums: int


@triton.jit(do_not_specialize=["dropout"])
def _linear_dgrad_kernel(
    dz_ptr, w_ptr, saved_ptr, dx_ptr, sums_ptr, members, active_ptr, dropout,
    M, N, K,
    stride_zm, stride_zn, stride_wn, stride_wk, stride_sums,
    ACTIVATION: tl.constexpr, HAS_SAVED: tl.constexpr,
    EVEN_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        dz_ptr += member * members.dz
        w_ptr += member * members.w
        dx_ptr += member * members.dx
        if HAS_SAVED:
            saved_ptr += member * members.dx
        if sums_ptr is not None:
            sums_ptr += member * members.sums
    pid_m, pid_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = reduced(BLOCK_N, SLICES)
    rows_n = transposed(offs_n)
    mask_m = offs_m < M
    mask_k = offs_k < K

    dz_ptrs = dz_ptr + as_column(offs_m.to(tl.int64), SLICES) * stride_zm + offs_n.to(tl.int64) * stride_zn
    w_ptrs = w_ptr + rows_n.to(tl.int64) * stride_wn + as_row(offs_k.to(tl.int64), SLICES) * stride_wk
    step_z = tl.cast(BLOCK_N, tl.int64) * stride_zn
    step_w = tl.cast(BLOCK_N, tl.int64) * stride_wn

    acc = accumulator((SLICES, BLOCK_M, BLOCK_K), INPUT_PRECISION)
    for n in range(0, N, BLOCK_N):
        if EVEN_N:
            dz = tl.load(dz_ptrs, mask=as_column(mask_m, SLICES), other=0.0)
            w = tl.load(w_ptrs, mask=as_row(mask_k, SLICES), other=0.0)
        else:
            dz = tl.load(dz_ptrs, mask=as_column(mask_m, SLICES) & (offs_n < N - n), other=0.0)
            w = tl.load(w_ptrs, mask=(rows_n < N - n) & as_row(mask_k, SLICES), other=0.0)
        acc = dot(dz, w, acc, INPUT_PRECISION)
        dz_ptrs += step_z
        w_ptrs += step_w

    acc = accumulated(acc, INPUT_PRECISION)
    row_ptr = sums_ptr
    if sums_ptr is not None:
        row_ptr += pid_m.to(tl.int64) * stride_sums
    key = 0
    if dropout is not None:
        key = dropout_key(dropout)
    _store_dx(acc, saved_ptr, dx_ptr, row_ptr, dropout, key, offs_m, pid_k * BLOCK_K, M, K, ACTIVATION, HAS_SAVED)


@triton.jit
def _store_dx(
    acc, saved_ptr, dx_ptr, row_ptr, dropout, key, offs_m, first_k, M, K,
    ACTIVATION: tl.constexpr, HAS_SAVED: tl.constexpr,
):  # fmt: skip
    """The epilogue: multiply a block of dZ W by f' and store it, and the sums of its rows at row_ptr, if not None.

    Blocks above ``EPILOGUE_SIZE`` are halved. They are halved once more with dropout, because random numbers take
    registers, and where f' is computed from float32 values, which take twice as many as those of 16 bits.
    """
    wide: tl.constexpr = HAS_SAVED and dx_ptr.dtype.element_ty == tl.float32
    if acc.numel > EPILOGUE_SIZE or ((wide or dropout is not None) and acc.numel > EPILOGUE_SIZE // 2):
        left, right = halves(acc)
        _store_dx(left, saved_ptr, dx_ptr, row_ptr, dropout, key, offs_m, first_k, M, K, ACTIVATION, HAS_SAVED)
        first_k += left.shape[1]
        _store_dx(right, saved_ptr, dx_ptr, row_ptr, dropout, key, offs_m, first_k, M, K, ACTIVATION, HAS_SAVED)
    else:
        offs_k = first_k + tl.arange(0, acc.shape[1])
        offs_x = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
        mask_x = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        saved = acc
        if HAS_SAVED:
            saved = tl.load(saved_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
        if dropout is not None:
            factor = factor_of_block(dropout, key, offs_m, first_k, M, K, acc.shape[1])
            dx = grad_of_dropped(dropout, acc, saved, factor, ACTIVATION)
        else:
            dx = activation_grad(acc, saved, ACTIVATION)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offs_x, dx, mask=mask_x)
        if row_ptr is not None:
            store_block_sums(dx, offs_m < M, row_ptr, offs_k, offs_k < K)


def _tile(dz: Tensor, weight: Tensor, gemm_tile: TileRule) -> Tile:
    N, K = weight.shape[-2:]
    wide, members = loads_wide(dz, weight), count_of(weight) or 1
    return gemm_tile("dgrad", dz.shape[-2], K, N, weight.dtype, current_device(), wide=wide, members=members)


def plan(
    dz: Tensor, weight: Tensor, saved: Tensor | None, dx: Tensor, sums: Tensor | None, activation: str,
    gemm_tile: TileRule, active: Tensor | None = None, dropout: tuple[Any, ...] | None = None,
) -> Call:  # fmt: skip
    """What ``linear_dgrad`` launches."""
    M = dz.shape[-2]
    N, K = weight.shape[-2:]
    tile = _tile(dz, weight, gemm_tile)
    count, members = count_of(weight), None
    if count is not None:
        members = _Members(*[stride_of(of, 2) for of in (dz, weight, dx, sums)])
    return call(
        _linear_dgrad_kernel, (cdiv(M, tile.rows) * cdiv(K, tile.cols), 1, count or 1),
        dz, weight, saved, dx, sums, members, active, arguments_of(dropout),
        M, N, K,
        dz.stride(-2), dz.stride(-1), weight.stride(-2), weight.stride(-1), 0 if sums is None else sums.stride(-2),
        ACTIVATION=activation, HAS_SAVED=saved is not None,
        EVEN_N=N % tile.depth == 0, INPUT_PRECISION=input_precision(current_device(), weight.dtype, tile.fma),
        BLOCK_M=tile.rows, BLOCK_N=tile.depth, BLOCK_K=tile.cols, SLICES=tile.slices, GROUP_M=GROUP_M,
        **tile.compile_options,
    )  # fmt: skip


_launch = remembered(plan)
_launch_active = remembered(with_active(plan))
_launch_dropping = remembered(with_dropout(plan))


def linear_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None = None,
    activation: str = "identity",
    *,
    dx: Tensor | None = None,
    sums: ColumnSums | None = None,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Launch dX = (dZ W) * f'; ``activation`` and ``dropout`` are those of the layer below.

    ``dx``: output to reuse, contiguous. ``sums``: takes the sums of the rows of dX. ``active``: a bool per member;
    dX of members that are not active is not written.
    """
    if dx is None:
        dx = torch.empty((*dz.shape[:-1], weight.shape[-1]), dtype=weight.dtype, device=dz.device)
    if dx.numel():
        if sums is not None:
            sums.written(cdiv(dz.shape[-2], _tile(dz, weight, gemm_tile).rows))
        values = None if sums is None else sums.values
        if dropout is not None:
            state, *drawn = dropout
            settings = (activation, gemm_tile, tuple(drawn))
            _launch_dropping((state, active, dz, weight, saved, dx, values), settings)
        elif active is None:
            _launch((dz, weight, saved, dx, values), (activation, gemm_tile))
        else:
            _launch_active((active, dz, weight, saved, dx, values), (activation, gemm_tile))
    return dx
