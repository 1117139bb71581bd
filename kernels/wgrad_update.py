"""dW, db and the optimizer's update of every layer of an MLP in one launch, and the mean loss on the side.

    dW_l = dZ_l^T A_{l-1},  db_l = sum over the batch of dZ_l,  (W_l, b_l) <- optimizer(W_l, b_l, dW_l, db_l)

One program computes one tile of one layer's dW and applies the update in its epilogue: gradients never reach memory.
The layers come as tuples of named tuples. A program finds its layer by its number and selects the tuple at run time, so
that all layers but the first (whose input may be uint8 pixels gathered by ``rows``) share one copy of the code. The
copy's loads are as wide as every one of these layers allows. dZ may therefore have more columns than the layer, which
are read and lead to nothing: with 16 columns instead of 10 all loads of all layers bring 16 bytes.

The first programs do what takes few instructions and long: one averages the loss rows, in a fixed order, and SUM_COLS
columns of a layer's db take one program each. db is the sum of the rows that the producers of dZ wrote (``sums``), or
of dZ's own rows unless there are such sums for every layer. ``column_sums`` has the order of the sums.

When the batch is long, each tile's batch is split over S programs (``configs.splits``). They write float32 partial
sums, and ``reduce_update`` adds the S slices in their order and applies the update: one launch more, no atomics, two
runs bitwise equal.

Members: dZ_l [E, M, N_l], A_{l-1} [E, M, K_l], W_l [E, N_l, K_l]; X [M, K] and ``rows`` [M] may be the same for all.
Each member has its own row of settings and its own loss. The loss of a member that is not active is NaN, the one number
that its programs write.

States, gradients and partial sums of all parameters lie in flat float32 buffers (``layout.Layout``).
Bytes of a step: reads dZ_l, A_{l-1} and the sums of dZ_l's rows; reads and writes W_l and its state once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .before_update import mark_overflow
from .column_sums import SUM_COLS, ColumnSums, column_sums
from .configs import Shapes, Tile, TileRule, cdiv, gemm_tile, loads_wide, register_limit, splits
from .dependent import wait_for_previous
from .device import current_device, input_precision
from .dropout import next_step
from .launch import Call, call, launch_plainly
from .layout import LayerArguments, Layout
from .linear_wgrad import wgrad_tile
from .members import inactive, stride_of
from .optimizer import update_block
from .reduce_update import reduce_update
from .tiling import grouped_tile, halves

__all__ = ["gradient_call", "update_tile", "wgrad_update", "workspace"]

GROUP_N = 8
LOSS_BLOCK = 1024
#: Elements per warp that an epilogue takes at a time. The optimizer's states lie in registers beside the gradient.
UPDATED_AT_ONCE, STORED_AT_ONCE = 512, 1024
#: The same with more than two states, or with an average.
MANY_AT_ONCE = 128


@triton.jit
def _finish(
    g, w_ptr, low_ptr, segment, offs, mask, states, partial_ptr, slice_start, hyper_ptr, members, first, first_flat,
    OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr,
):  # fmt: skip
    """Update the parameters at ``offs`` of a weight or bias, or store the split's part of their gradient.

    Without an optimizer ("none") and without partial sums the gradient takes the place of the parameters. A member's
    parameters begin at ``first`` of all members', and in flat buffers at ``first_flat``.
    """
    if members is not None:
        w_ptr += first
        if low_ptr is not None:
            low_ptr += first
        segment += first_flat
    if partial_ptr is None:
        if OPTIMIZER == "none":
            tl.store(w_ptr + offs, g.to(w_ptr.dtype.element_ty), mask=mask)
        else:
            update_block(g, w_ptr, low_ptr, states, offs, segment + offs, mask, hyper_ptr, OPTIMIZER, LOW_IS_PARAM)
    else:
        tl.store(partial_ptr + slice_start + segment + offs, g, mask=mask)


@triton.jit
def _finish_tile(
    dw, layer, offs_n, first_k, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr, members, first, first_flat,
    OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """``_finish`` for a block of dW, halved until it has at most AT_ONCE elements."""
    if dw.numel > AT_ONCE:
        left, right = halves(dw)
        _finish_tile(
            left, layer, offs_n, first_k, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,
            members, first, first_flat, OPTIMIZER, LOW_IS_PARAM, AT_ONCE,
        )  # fmt: skip
        _finish_tile(
            right, layer, offs_n, first_k + left.shape[1], states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,
            members, first, first_flat, OPTIMIZER, LOW_IS_PARAM, AT_ONCE,
        )  # fmt: skip
    else:
        offs_k = first_k + tl.arange(0, dw.shape[1])
        offs = offs_n.to(tl.int64)[:, None] * layer.K + offs_k[None, :]
        mask = (offs_n < layer.N)[:, None] & (offs_k < layer.K)[None, :]
        _finish(
            dw, layer.w_ptr, layer.low_w_ptr, layer.w_segment, offs, mask, states, partial_ptr, slice_start, hyper_ptr,
            members, first, first_flat, OPTIMIZER, LOW_IS_PARAM,
        )  # fmt: skip
        if overflow_ptr is not None:
            # An element of dZ that is infinite or NaN makes a whole row of dW so, and db cannot overflow float32.
            mark_overflow(dw, mask, overflow_ptr)


@triton.jit
def _wgrad_layer(
    operands, layer, rows_ptr, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr, members, member, first_flat,
    pid, split, M, m_per_split,
    OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr, EVEN_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Tile number ``pid`` of one layer: gradient of the split's samples, then update or partial sums."""
    K = layer.K
    if layer.w_settings is not None:
        hyper_ptr += layer.w_settings
    pid_n, pid_k = grouped_tile(pid, tl.cdiv(layer.N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
    m_begin = split * m_per_split
    m_end = tl.minimum(m_begin + m_per_split, M)
    PIXELS: tl.constexpr = operands.x_ptr.dtype.element_ty == tl.uint8
    dz_ptr, x_ptr = operands.dz_ptr, operands.x_ptr
    first = 0
    if members is not None:
        dz_ptr += member * operands.dz_member
        x_ptr += member * operands.x_member
        first = member * layer.N * K
    dw = wgrad_tile(
        dz_ptr, x_ptr, rows_ptr, operands.stride_zm, K, m_begin, m_end, pid_n, pid_k,
        operands.stride_zm, 1, operands.stride_xm, 1,
        rows_ptr is not None, PIXELS, EVEN_M, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _finish_tile(
        dw, layer, pid_n * BLOCK_N + tl.arange(0, BLOCK_N), pid_k * BLOCK_K, states, partial_ptr, slice_start,
        overflow_ptr, hyper_ptr, members, first, first_flat, OPTIMIZER, LOW_IS_PARAM, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _bias_layer(
    sums, layer, states, partial_ptr, slice_start, hyper_ptr, members, member, first_flat, pid, split, n_splits,
    OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr, ROWS: tl.constexpr, SUM_COLS: tl.constexpr,
):  # fmt: skip
    """Columns number ``pid`` of one layer's db, of the split's share of the rows: update or partial sums."""
    offs = pid * SUM_COLS + tl.arange(0, SUM_COLS)
    if layer.b_settings is not None:
        hyper_ptr += layer.b_settings
    per_split = tl.cdiv(sums.rows, n_splits)
    first = split * per_split
    end = tl.minimum(first + per_split, sums.rows)
    ptr = sums.ptr
    first_bias = 0
    if members is not None:
        ptr += member * sums.member
        first_bias = member * layer.N
    db = column_sums(ptr, first, end, sums.stride, 1, offs, offs < sums.stride, ROWS)
    _finish(
        db, layer.b_ptr, layer.low_b_ptr, layer.b_segment, offs, offs < layer.N, states, partial_ptr, slice_start,
        hyper_ptr, members, first_bias, first_flat, OPTIMIZER, LOW_IS_PARAM,
    )  # fmt: skip


@triton.jit
def _mean_loss(loss_rows_ptr, loss_ptr, divisor_ptr, count, BLOCK: tl.constexpr):
    """loss = sum of ``count`` values, blocks added in order, divided by ``count`` or by what the divisor is."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, count, BLOCK):
        total += tl.load(loss_rows_ptr + i + offs, mask=i + offs < count, other=0.0)
    if divisor_ptr is not None:
        tl.store(loss_ptr, tl.sum(total, axis=0) / tl.load(divisor_ptr))
    else:
        tl.store(loss_ptr, tl.sum(total, axis=0) / count)


class _Operands(NamedTuple):
    """The factors of a layer's dW, and the number of its first tile."""

    dz_ptr: Tensor
    x_ptr: Tensor
    stride_zm: int
    stride_xm: int
    first_tile: int
    dz_member: int | None  #: elements from one member to the next; None for a single model
    x_member: int | None


class _Sums(NamedTuple):
    """The matrix whose rows add up to a layer's db, and the number of the first program that adds them."""

    ptr: Tensor
    rows: int
    stride: int
    first_program: int
    member: int | None  #: elements from one member to the next


class _Members(NamedTuple):
    """Elements from one member to the next."""

    rows: int
    flat: int
    hyper: int


@triton.jit
def _wgrad_update_kernel(
    operands, sums, layers, rows_ptr, states, partial_ptr, overflow_ptr, hyper_ptr, loss_rows_ptr, loss_ptr,
    divisor_ptr, members, active_ptr, updates_ptr, dropout_ptr,
    M, loss_count, sum_programs, tiles, m_per_split, stride_split,
    LAYERS: tl.constexpr, OPTIMIZER: tl.constexpr, LOW_IS_PARAM: tl.constexpr, EVEN_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    LOSS_BLOCK: tl.constexpr, SUM_COLS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if dropout_ptr is not None:
        # Also where the member of the first program is not active.
        next_step(dropout_ptr)
    split = tl.program_id(1)
    slice_start = split.to(tl.int64) * stride_split
    member = 0
    first_flat = 0
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        first_flat = member * members.flat
        if loss_ptr is not None:
            loss_ptr += member
            loss_rows_ptr += member * loss_count
            if divisor_ptr is not None:
                divisor_ptr += member
        if inactive(active_ptr, member):
            if loss_ptr is not None:
                tl.store(loss_ptr, float("nan"), mask=(tl.program_id(0) == 0) & (split == 0))
            return
        if rows_ptr is not None:
            rows_ptr += member * members.rows
        if hyper_ptr is not None:
            hyper_ptr += member * members.hyper
        if overflow_ptr is not None:
            overflow_ptr += member
    # Tiles have the numbers from 0 on, before them come the columns of db, and before these the loss.
    pid = tl.program_id(0) - sum_programs
    if loss_ptr is not None:
        pid -= 1
    # Gathered rows and pixels, which only the first layer can have, take code of their own.
    APART: tl.constexpr = rows_ptr is not None or operands[0].x_ptr.dtype != operands[0].dz_ptr.dtype
    if pid >= 0:
        if APART and LAYERS > 1:
            if pid < operands[1].first_tile:
                _wgrad_layer(
                    operands[0], layers[0], rows_ptr, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,
                    members, member, first_flat, pid, split, M, m_per_split,
                    OPTIMIZER, LOW_IS_PARAM, EVEN_M, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_N,
                    AT_ONCE,
                )  # fmt: skip
                # If both copies of the code ended alike, the compiler would merge their ends. Products of wgmma would
                # then wait for each other, and the shared memory of both copies would be live at the same time.
                tl.debug_barrier()
            else:
                factors = operands[1]
                layer = layers[1]
                for i in tl.static_range(2, LAYERS):
                    if pid >= operands[i].first_tile:
                        factors = operands[i]
                        layer = layers[i]
                _wgrad_layer(
                    factors, layer, None, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,
                    members, member, first_flat, pid - factors.first_tile, split, M, m_per_split,
                    OPTIMIZER, LOW_IS_PARAM, EVEN_M, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_N,
                    AT_ONCE,
                )  # fmt: skip
        else:
            factors = operands[0]
            layer = layers[0]
            for i in tl.static_range(1, LAYERS):
                if pid >= operands[i].first_tile:
                    factors = operands[i]
                    layer = layers[i]
            _wgrad_layer(
                factors, layer, rows_ptr, states, partial_ptr, slice_start, overflow_ptr, hyper_ptr,
                members, member, first_flat, pid - factors.first_tile, split, M, m_per_split,
                OPTIMIZER, LOW_IS_PARAM, EVEN_M, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_N,
                AT_ONCE,
            )  # fmt: skip
    elif pid >= -sum_programs:
        pid += sum_programs
        of = sums[0]
        layer = layers[0]
        for i in tl.static_range(1, LAYERS):
            if pid >= sums[i].first_program:
                of = sums[i]
                layer = layers[i]
        _bias_layer(
            of, layer, states, partial_ptr, slice_start, hyper_ptr, members, member, first_flat,
            pid - of.first_program, split, tl.num_programs(1),
            OPTIMIZER, LOW_IS_PARAM, BLOCK_M * BLOCK_N // SUM_COLS, SUM_COLS,
        )  # fmt: skip
    elif loss_ptr is not None:
        if split == 0:
            _mean_loss(loss_rows_ptr, loss_ptr, divisor_ptr, loss_count, LOSS_BLOCK)
            if members is not None:
                if updates_ptr is not None:
                    tl.store(updates_ptr + member, tl.load(updates_ptr + member) + 1)


def update_tile(
    layers: Sequence[LayerArguments], m: int, dtype: torch.dtype, rule: TileRule, *, wide: bool, summed: bool,
    members: int = 1, pixels: bool = False, tf32: bool | None = None,
) -> tuple[Tile, Shapes, int]:  # fmt: skip
    """(tile, shapes, programs for db beside the tiles) of all layers. Without sums, db takes as long as a tile."""
    shapes = tuple([(layer.N, layer.K) for layer in layers])
    n, k = max(shapes, key=lambda shape: shape[0] * shape[1])
    beside = 0 if summed else sum(cdiv(layer.N, SUM_COLS) for layer in layers if layer.b_segment >= 0)
    tile = rule(
        "update", n, k, m, dtype, current_device(), wide=wide, layers=shapes, beside=beside, members=members,
        pixels=pixels, tf32=tf32,
    )  # fmt: skip
    return tile, shapes, beside


def _plan(
    layout: Layout, m: int, dtype: torch.dtype, *, wide: bool, summed: bool, pixels: bool = False,
    tf32: bool | None = None,
) -> tuple[Tile, int, int]:  # fmt: skip
    """(tile, splits, samples per split) for all layers together."""
    members = layout.members or 1
    tile, shapes, beside = update_tile(
        layout.of_layers, m, dtype, gemm_tile, wide=wide, summed=summed, members=members, pixels=pixels, tf32=tf32
    )  # fmt: skip
    n_splits = splits("update", tile, shapes, m, dtype, current_device(), beside=beside, members=members)
    m_per_split = cdiv(cdiv(m, tile.depth), n_splits) * tile.depth
    return tile, max(1, cdiv(m, m_per_split)), m_per_split


def workspace(layout: Layout, m: int, dtype: torch.dtype, device: torch.device, *, direct: bool) -> Tensor | None:
    """The partial sums' buffer for batches of ``m``; None where the update is ``direct`` and the batch not split.

    The buffer suffices for operands of any alignment, with and without sums, and for any setting of torch's precision.
    """
    ways = [
        dict(zip(("wide", "summed", "pixels", "tf32"), way, strict=True)) for way in product((True, False), repeat=4)
    ]
    n_splits = max(_plan(layout, m, dtype, **way)[1] for way in ways)
    if n_splits == 1 and direct:
        return None
    return torch.empty((n_splits, *layout.flat_shape), dtype=torch.float32, device=device)


def _made(layers: Sequence[LayerArguments], sums: Sequence[ColumnSums | None]) -> Tensor | None:
    """Sums of rows that producers of dZ made; None unless there are such sums for every layer with a bias."""
    if any(of is None and layer.b_segment >= 0 for of, layer in zip(sums, layers, strict=False)):
        return None
    return next((of.values for of in sums if of is not None), None)


def gradient_call(
    layers: Sequence[LayerArguments],
    dzs: Sequence[Tensor],
    xs: Sequence[Tensor],
    tile: Tile,
    split: tuple[int, int, int],
    optimizer: str,
    *,
    low_is_param: bool = False,
    hyper_row: Tensor | None = None,
    states: Sequence[Tensor] = (),
    rows: Tensor | None = None,
    partial: Tensor | None = None,
    overflow: Tensor | None = None,
    loss_rows: Tensor | None = None,
    loss: Tensor | None = None,
    divisor: Tensor | None = None,
    sums: Sequence[ColumnSums | None] = (),
    count: int | None = None,
    active: Tensor | None = None,
    updates: Tensor | None = None,
    dropout_state: Tensor | None = None,
) -> Call:
    """The launch of ``wgrad_update`` for a tile and ``split``: (splits, samples per split, elements of partial sums).

    Without ``partial`` and with the optimizer "none" the gradients take the place of the layers' parameters. ``count``
    is the number of members, None for a single model.
    """
    m = dzs[0].shape[-2]
    n_splits, m_per_split, stride_split = split
    made = _made(layers, sums)
    operands, added, tiles, sum_programs = [], [], 0, 0
    for i, (layer, dz, x) in enumerate(zip(layers, dzs, xs, strict=True)):
        strides = (None, None) if count is None else (stride_of(dz, 2), stride_of(x, 2))
        operands.append(_Operands(dz, x, dz.stride(-2), x.stride(-2), tiles, *strides))
        if made is None:
            matrix, blocks = dz, m
        else:
            of = sums[i]
            matrix, blocks = (made, 0) if of is None else (of.values, of.blocks)
        stride = None if count is None else stride_of(matrix, 2)
        added.append(_Sums(matrix, blocks, matrix.stride(-2), sum_programs, stride))
        tiles += cdiv(layer.N, tile.rows) * cdiv(layer.K, tile.cols)
        sum_programs += cdiv(layer.N, SUM_COLS) if layer.b_segment >= 0 else 0
    at_once = STORED_AT_ONCE if optimizer == "none" or partial is not None else UPDATED_AT_ONCE
    if partial is None and (len(states) > 2 or "ema" in optimizer.split()):
        at_once = MANY_AT_ONCE
    options = tile.compile_options
    if low_is_param and optimizer.startswith("rmsprop"):
        # Of its own accord ptxas takes 128 registers and spills one, where 146 hold everything.
        most = 65536 // (32 * tile.num_warps * tile.resident)
        options = register_limit(min(255, most), current_device()) | options
    members = None
    if count is not None:
        of_flat = next((t for t in (partial, *states) if t is not None), None)
        flat = 0 if of_flat is None else of_flat.stride(-2)
        members = _Members(stride_of(rows, 1), flat, stride_of(hyper_row, 1))
    return call(
        _wgrad_update_kernel, ((loss is not None) + sum_programs + tiles, n_splits, count or 1),
        tuple(operands), tuple(added), tuple(layers), rows, tuple(states), partial, overflow, hyper_row, loss_rows,
        loss, divisor, members, active, updates, dropout_state,
        m, 0 if loss_rows is None else loss_rows.numel() // (count or 1), sum_programs, tiles, m_per_split,
        stride_split,
        LAYERS=len(operands), OPTIMIZER=optimizer, LOW_IS_PARAM=low_is_param, EVEN_M=m % tile.depth == 0,
        INPUT_PRECISION=input_precision(current_device(), dzs[0].dtype, tile.fma),
        BLOCK_M=tile.depth, BLOCK_N=tile.rows, BLOCK_K=tile.cols, GROUP_N=GROUP_N, LOSS_BLOCK=LOSS_BLOCK,
        SUM_COLS=SUM_COLS, AT_ONCE=at_once * tile.num_warps, **options,
    )  # fmt: skip


def wgrad_update(
    layout: Layout,
    dzs: Sequence[Tensor],
    xs: Sequence[Tensor],
    optimizer: str,
    hyper_row: Tensor,
    *,
    states: Sequence[Tensor] = (),
    rows: Tensor | None = None,
    unscale: Tensor | None = None,
    loss_rows: Tensor | None = None,
    loss: Tensor | None = None,
    divisor: Tensor | None = None,
    partial: Tensor | None = None,
    grads: Tensor | None = None,
    accumulate: bool = False,
    squares: Tensor | None = None,
    overflow: Tensor | None = None,
    sums: Sequence[ColumnSums | None] = (),
    active: Tensor | None = None,
    updates: Tensor | None = None,
    dropout_state: Tensor | None = None,
) -> None:
    """Launch gradient and update of every layer: dzs[l] [M, N_l] and xs[l] [M, K_l], inner stride 1, dZ contiguous.

    dzs[l] may have more than N_l columns, which count for nothing. ``sums[l]`` are the sums of its rows, as its
    producer wrote them, or None; they are used if every layer with a bias has them.
    ``loss`` becomes the sum of ``loss_rows``, divided by ``divisor`` (0-d float32) or by their number.
    ``rows`` (int64, any stride) gathers rows of xs[0] only, which may be uint8. ``unscale`` is a 0-d float32 factor of
    all gradients.
    ``optimizer`` is a rule of ``kernels/optimizer.py``, and ``hyper_row`` has its settings for this step, float32, or
    the settings of all param groups, contiguous [G, columns]. With ``optimizer == "none"`` the gradients go to
    ``grads`` (flat, ``layout.total`` float32), added to what is there if ``accumulate``; without ``grads`` they stay
    partial sums, not multiplied by ``unscale``. ``partial`` is float32 workspace to reuse, [splits, layout.total].
    ``squares``, which needs ``grads``, and ``overflow`` are outputs as ``reduce_update`` has them.
    With members every tensor has an axis of members in front, behind that of the splits in ``partial``; xs[0] and
    ``rows`` may do without. ``hyper_row`` [8] is that of all members. ``active`` is a bool per member, and ``updates``
    int32 numbers that grow by 1 for each active member.
    ``dropout_state`` is int64 [2], seed and step of ``dropout``, whose step grows by 1.
    """
    m = dzs[0].shape[-2]
    dtype = dzs[0].dtype
    made = _made(layout.of_layers, sums) is not None
    tile, n_splits, m_per_split = _plan(
        layout, m, dtype, wide=loads_wide(*dzs, *xs), summed=made, pixels=xs[0].dtype == torch.uint8
    )  # fmt: skip
    direct = n_splits == 1 and optimizer != "none" and unscale is None
    if not direct and partial is None:
        partial = torch.empty((n_splits, *layout.flat_shape), dtype=torch.float32, device=dzs[0].device)
    if rows is not None and rows.stride(-1) != 1:
        rows = rows.contiguous()
    launch = gradient_call(
        layout.of_layers, dzs, xs, tile, (n_splits, m_per_split, math.prod(layout.flat_shape)), optimizer,
        low_is_param=layout.low_is_param, hyper_row=hyper_row, states=states, rows=rows,
        partial=None if direct else partial, overflow=overflow if grads is None else None,
        loss_rows=loss_rows, loss=loss, divisor=divisor, sums=sums, count=layout.members, active=active,
        updates=updates, dropout_state=dropout_state,
    )  # fmt: skip
    launch_plainly(launch)
    if not direct and (grads is not None or optimizer != "none"):
        assert partial is not None
        reduce_update(
            layout, partial, n_splits, optimizer, hyper_row,
            states=states, unscale=unscale, grads=grads, accumulate=accumulate, squares=squares, overflow=overflow,
            active=active,
        )  # fmt: skip
