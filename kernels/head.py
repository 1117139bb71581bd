"""Last linear layer, softmax cross-entropy and their backward pass in one kernel, for up to MAX_CLASSES classes.

    Z_L       = H W^T + b
    loss_i    = softmax cross-entropy of row i (``cross_entropy`` has the formula and what labels do)
    dZ_L      = scale dloss/dZ_L                 = (softmax(Z_L) - onehot) scale without weights and smoothing
                                                 divided by the weight of the batch on demand (``row_weights``)
    dZ_{L-1}  = (dZ_L W) * f'_{L-1}              optional: a network of one layer, or frozen layers below, has none
                                                 times F with dropout of the layer below (``dropout``)

Shapes: H [M, K] (the output A_{L-1} of the layer below), W [C, K], b [C]; dZ_L and Z_L [M, C], dZ_{L-1} and
``saved`` [M, K]; loss [M]. Any strides for H, W, b and saved; outputs contiguous; dZ_L may have more columns.
Dtypes: H and W float32, float16 or bfloat16, alike; or H uint8 pixels (X / 255, as ``linear_fwd``), without dZ_{L-1}.
Members: W [E, C, K], b [E, C], and an axis E in front of saved, the outputs and the sums; H, labels and ``rows`` may be
the same for all members or have the axis too. ``factor`` is [E].
Accumulated in float32; the loss is that of the float32 logits, and dZ_L is rounded before it is multiplied by W.
``saved`` is what f'_{L-1} is computed from: A_{L-1}, which is H itself, or Z_{L-1}, or None (see ``activations``).
Optional: the sums of the rows of dZ_L and of dZ_{L-1}, a row per block of rows (see ``column_sums``).
Bytes: reads H (and saved) and writes dZ_{L-1} once; reads W once per block of rows, from the L2 cache. ``saved`` that
is H is still in the cache from the product.

A block of rows has all classes (padded to a power of two, at least 16), so softmax stays in registers. When there are
few blocks of rows, several programs share a block. Each computes the same dZ_L, which is cheap, and writes its own
columns of dZ_{L-1}; the first also writes everything else. There are no atomics: two runs are bitwise equal.
Launches: 1, in place of 3 (linear, cross-entropy, dgrad); 2 with a divisor of many rows (``row_weights``).
Source: delta_L = p - y and delta_{L-1} = (W^T delta_L) f'(Z_{L-1}) (notes 7.5), in row-vector form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_grad
from .column_sums import ColumnSums, store_block_sums
from .configs import cdiv
from .dependent import wait_for_previous
from .device import Device, current_device, input_precision
from .dropout import Dropout, arguments_of, dropout_key, factor_of_block, grad_of_dropped
from .launch import Call, call, remembered, with_active, with_dropout
from .members import count_of, inactive, stride_of
from .row_weights import batch_weight, load_sample_weights, summed_block, total_weight
from .softmax import load_labels, rows_grad, target_block, whole_rows_loss
from .tiling import accumulated, accumulator, dot

__all__ = ["MAX_CLASSES", "head"]

#: More classes than this do not fit one program beside a block of W; ``cross_entropy`` takes them.
MAX_CLASSES = 64


class _Members(NamedTuple):
    """Elements from one member to the next."""

    h: int
    w: int
    b: int
    target: int
    rows: int
    sample: int
    saved: int
    dz: int
    sums: int
    prev_sums: int


@triton.jit(do_not_specialize=["ignore_index", "M", "dropout"])
def _head_kernel(
    h_ptr, w_ptr, b_ptr, target_ptr, rows_ptr, class_weight_ptr, sample_ptr, divisor_ptr, saved_ptr, scale_ptr,
    loss_ptr, dz_ptr, dz_prev_ptr, z_ptr, correct_ptr, sums_ptr, prev_sums_ptr, members, active_ptr,
    dropout, scale, smoothing, ignore_index: tl.int64,
    M, C, K,
    stride_hm, stride_hk, stride_wc, stride_wk, stride_b, stride_t, stride_tc, stride_cw, stride_s, stride_sm,
    stride_sk, stride_zm, stride_sums, stride_prev_sums,
    ACTIVATION: tl.constexpr, PROBS: tl.constexpr, SMOOTH: tl.constexpr, SUM: tl.constexpr, GATHER_H: tl.constexpr,
    PIXELS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_COLS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr,
    COLS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        h_ptr += member * members.h
        w_ptr += member * members.w
        target_ptr += member * members.target
        loss_ptr += member * M
        dz_ptr += member * members.dz
        if b_ptr is not None:
            b_ptr += member * members.b
        if rows_ptr is not None:
            rows_ptr += member * members.rows
        if sample_ptr is not None:
            sample_ptr += member * members.sample
        if divisor_ptr is not None:
            divisor_ptr += member
        if saved_ptr is not None:
            saved_ptr += member * members.saved
        if scale_ptr is not None:
            scale_ptr += member
        if dz_prev_ptr is not None:
            dz_prev_ptr += member * M * K
        if z_ptr is not None:
            z_ptr += member * M * C
        if correct_ptr is not None:
            correct_ptr += member * M
        if sums_ptr is not None:
            sums_ptr += member * members.sums
        if prev_sums_ptr is not None:
            prev_sums_ptr += member * members.prev_sums
    pid_m = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    mask = mask_m[:, None] & mask_c[None, :]
    row_m = offs_m.to(tl.int64)
    row_t = row_m
    if rows_ptr is not None:
        row_t = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    row_h = row_t if GATHER_H else row_m
    HAS_Q: tl.constexpr = PROBS or SMOOTH
    if sample_ptr is not None:
        sample = load_sample_weights(sample_ptr, row_t * stride_s, mask_m)
    if PROBS:
        y = tl.full((BLOCK_M,), -1, tl.int32)
        ignored = offs_m < 0
        hot = tl.zeros((BLOCK_M,), tl.float32)
    else:
        y, w_y, ignored = load_labels(
            target_ptr, row_t * stride_t, mask_m, class_weight_ptr, stride_cw, C, ignore_index
        )  # fmt: skip
        if sample_ptr is not None:
            w_y *= sample
        hot = w_y * (1.0 - smoothing) if SMOOTH else w_y
    g = scale
    if scale_ptr is not None:
        g *= tl.load(scale_ptr).to(tl.float32)
    if divisor_ptr is not None:
        g = g / batch_weight(
            divisor_ptr, target_ptr, rows_ptr, class_weight_ptr, sample_ptr, stride_t, stride_cw, stride_s,
            1.0, M, C, ignore_index, not PROBS, SUM,
        )  # fmt: skip

    # Z has so few columns that its product would occupy only one warp. K is therefore cut into slices with a product
    # each, [SLICES, BLOCK_M, BLOCK_C] in all, which the compiler gives to SLICES warps.
    BLOCK_K: tl.constexpr = SLICES * DEPTH
    k_sd = tl.arange(0, SLICES)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    h_ptrs = h_ptr + row_h[None, :, None] * stride_hm + k_sd.to(tl.int64) * stride_hk
    w_ptrs = w_ptr + offs_c.to(tl.int64)[None, :, None] * stride_wc + k_sd.to(tl.int64) * stride_wk
    step_h = tl.cast(BLOCK_K, tl.int64) * stride_hk
    step_w = tl.cast(BLOCK_K, tl.int64) * stride_wk
    acc = accumulator((SLICES, BLOCK_M, BLOCK_C), INPUT_PRECISION)
    for k in range(0, K, BLOCK_K):
        mask_h = mask_m[None, :, None]
        mask_w = mask_c[None, :, None]
        if not EVEN_K:
            mask_h = mask_h & (k_sd < K - k)
            mask_w = mask_w & (k_sd < K - k)
        h = tl.load(h_ptrs, mask=mask_h, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        if PIXELS:
            h = h.to(tl.float32).to(w.dtype)
        acc = dot(h, tl.permute(w, (0, 2, 1)), acc, INPUT_PRECISION)
        h_ptrs += step_h
        w_ptrs += step_w
    z = accumulated(acc, INPUT_PRECISION)
    if PIXELS:
        z = z * (1.0 / 255.0)
    if b_ptr is not None:
        z += tl.load(b_ptr + offs_c.to(tl.int64) * stride_b, mask=mask_c, other=0.0).to(tl.float32)[None, :]

    w_rows = w_ptr + offs_c.to(tl.int64)[:, None] * stride_wc
    offs_z = row_m[:, None] * C + offs_c[None, :]
    # Of the programs that share these rows only the first writes what all of them compute.
    once_m = offs_m < tl.where(split == 0, M, 0)
    once = once_m[:, None] & mask_c[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offs_z, z.to(z_ptr.dtype.element_ty), mask=once)
    z = tl.where(mask_c[None, :], z, float("-inf"))
    q = z
    if HAS_Q:
        t_ptrs = w_rows
        if PROBS:
            t_ptrs = target_ptr + (row_t * stride_t)[:, None] + (offs_c.to(tl.int64) * stride_tc)[None, :]
        q = target_block(t_ptrs, mask, class_weight_ptr, stride_cw, offs_c, C, smoothing, PROBS, SMOOTH)
        if sample_ptr is not None:
            q *= sample[:, None]
    picked = offs_c[None, :] == y[:, None]
    loss, mass, _top, shift, e, total = whole_rows_loss(z, q, hot, picked, mask, HAS_Q, PROBS)
    dz = rows_grad(e, total, mass, q, hot, picked, ignored, g, HAS_Q, PROBS, divisor_ptr is not None)
    dz = dz.to(dz_ptr.dtype.element_ty)
    tl.store(loss_ptr + row_m, tl.where(ignored, 0.0, loss).to(loss_ptr.dtype.element_ty), mask=once_m)
    tl.store(dz_ptr + row_m[:, None] * stride_zm + offs_c[None, :], dz, mask=once)
    if sums_ptr is not None:
        row_ptr = sums_ptr + pid_m.to(tl.int64) * stride_sums
        store_block_sums(dz, mask_m, row_ptr, offs_c, offs_c < tl.where(split == 0, C, 0))
    if correct_ptr is not None:
        best = tl.min(tl.where(shift == 0.0, offs_c[None, :], BLOCK_C), 1)
        tl.store(correct_ptr + row_m, (best == y).to(correct_ptr.dtype.element_ty), mask=once_m)

    if dz_prev_ptr is not None:
        # Padded classes and rows beyond the last must add 0, even where their p is NaN.
        dz = tl.where(mask, dz, 0.0).to(dz_ptr.dtype.element_ty)
        for k in range(split * COLS, K, SPLITS * COLS):
            cols = k + tl.arange(0, COLS)
            mask_w = mask_c[:, None]
            mask_p = mask_m[:, None]
            if not EVEN_COLS:
                mask_w = mask_w & (cols < K)[None, :]
                mask_p = mask_p & (cols < K)[None, :]
            cols = cols.to(tl.int64)[None, :]
            w = tl.load(w_rows + cols * stride_wk, mask=mask_w, other=0.0)
            da = dot(dz, w, accumulator((BLOCK_M, COLS), INPUT_PRECISION), INPUT_PRECISION)
            da = accumulated(da, INPUT_PRECISION)
            saved = da
            if saved_ptr is not None:
                saved_ptrs = saved_ptr + row_m[:, None] * stride_sm + cols * stride_sk
                saved = tl.load(saved_ptrs, mask=mask_p, other=0.0).to(tl.float32)
            if dropout is not None:
                # Read in every round, since the products leave no registers to keep the key in.
                factor = factor_of_block(dropout, dropout_key(dropout), offs_m, k, M, K, COLS)
                dz_prev = grad_of_dropped(dropout, da, saved, factor, ACTIVATION)
            else:
                dz_prev = activation_grad(da, saved, ACTIVATION)
            dz_prev = dz_prev.to(dz_prev_ptr.dtype.element_ty)
            tl.store(dz_prev_ptr + row_m[:, None] * K + cols, dz_prev, mask=mask_p)
            if prev_sums_ptr is not None:
                offs_k = k + tl.arange(0, COLS)
                row_ptr = prev_sums_ptr + pid_m.to(tl.int64) * stride_prev_sums
                store_block_sums(dz_prev, mask_m, row_ptr, offs_k, offs_k < K)


class _HeadTile(NamedTuple):
    rows: int
    classes: int
    slices: int
    depth: int
    cols: int
    splits: int
    num_warps: int
    num_stages: int


def _tile(
    M: int, C: int, K: int, itemsize: int, aligned: bool, writes_prev: bool, device: Device, members: int,
    weighted: bool = False, dropping: bool = False,
) -> _HeadTile:  # fmt: skip
    """16 rows per program, or more as long as every multiprocessor gets a program; columns are split when some do not.

    Slices are 256 bytes deep, which the counts of the simulated GPU show to read shared memory without bank
    conflicts. They are shallower where K or the shared memory ends before, where rows are not aligned (every element
    then has an address of its own), and where products run on few registers instead of matrix units (before
    Ampere; AMD's RDNA). None of these tiles spills in a loop on any target.
    """
    classes = max(16, triton.next_power_of_2(C))
    if device.backend == "interpreter":
        return _HeadTile(32, classes, 2, 16, 32, min(2, cdiv(K, 32)) if writes_prev and K else 1, 1, 1)
    # The rows' weights take registers: blocks of 64 rows would spill.
    rows = 16 if weighted else 1024 // classes
    of_blackwell = str(device.arch).startswith("10")
    if (dropping and device.has_tf32) or (of_blackwell and itemsize == 4):
        # So do random numbers. Blocks of 32 rows and 32 columns would compute some products twice, and on sm_100
        # blocks of 64 rows of float32 would too.
        rows = min(rows, 32 if aligned else 16)
    if members * cdiv(M, rows) < device.multiprocessors or (members > 1 and rows >= 2 * M):
        rows = 16
    slices, depth, cols, num_warps, num_stages = 4, 256 // itemsize, 64, 4, 2
    if not (device.has_tf32 or str(device.arch).startswith("gfx9")):
        depth, cols, num_warps, num_stages = 16, 32, 4 if classes < 64 else 8, 1
    elif not aligned:
        depth, cols = 16, 32
    if aligned and classes > 32 and itemsize == 4 and device.has_tf32:
        if device.arch == 80 or (of_blackwell and weighted):
            depth, cols = 16, 32  # ptxas spills a register of any larger block, on eight warps too
        else:
            num_warps = 8
    while depth > 16 and (slices * depth >= 2 * K or slices * depth * (rows + classes) * itemsize > 49152):
        depth //= 2
    splits = 1
    if writes_prev:
        splits = max(1, min(cdiv(K, cols), device.multiprocessors // (members * cdiv(M, rows))))
    return _HeadTile(rows, classes, slices, depth, cols, splits, num_warps, num_stages)


def _tile_of(
    h: Tensor, weight: Tensor, M: int, writes_prev: bool, device: Device, weighted: bool, dropping: bool
) -> _HeadTile:
    C, K = weight.shape[-2:]
    aligned = K % 16 == 0 and all(
        t.stride(-1) == 1 and t.stride(-2) % 16 == 0 and stride_of(t, 2) % 16 == 0 for t in (h, weight)
    )
    members = count_of(weight) or 1
    return _tile(M, C, K, weight.element_size(), aligned, writes_prev, device, members, weighted, dropping)


def _plan(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: Tensor | None, class_weight: Tensor | None,
    sample_weight: Tensor | None, divisor: Tensor | None, saved: Tensor | None, factor: Tensor | None,
    loss: Tensor, dz: Tensor, dz_prev: Tensor | None, logits: Tensor | None, correct: Tensor | None,
    sums: Tensor | None, prev_sums: Tensor | None,
    scale: float, smoothing: float,
    ignore_index: int, activation: str, smooth: bool, summed: int, gather_h: bool, active: Tensor | None = None,
    dropout: tuple[Any, ...] | None = None,
) -> Call:  # fmt: skip
    M = dz.shape[-2]
    C, K = weight.shape[-2:]
    device = current_device()
    tile = _tile_of(h, weight, M, dz_prev is not None, device, divisor is not None, dropout is not None)
    count, members = count_of(weight), None
    probs = target.is_floating_point()
    if count is not None:
        of_members = (
            (h, 2),
            (weight, 2),
            (bias, 1),
            (target, 2 if probs else 1),
            (rows, 1),
            (sample_weight, 1),
            (saved, 2),
            (dz, 2),
            (sums, 2),
            (prev_sums, 2),
        )
        members = _Members(*[stride_of(*of) for of in of_members])
    return call(
        _head_kernel, (cdiv(M, tile.rows) * tile.splits, 1, count or 1),
        h, weight, bias, target, rows, class_weight, sample_weight, divisor, saved, factor,
        loss, dz, dz_prev, logits, correct, sums, prev_sums, members, active,
        arguments_of(dropout), scale, smoothing, ignore_index,
        M, C, K,
        h.stride(-2), h.stride(-1), weight.stride(-2), weight.stride(-1), 0 if bias is None else bias.stride(-1),
        target.stride(-2 if probs else -1), target.stride(-1) if probs else None,
        0 if class_weight is None else class_weight.stride(0),
        None if sample_weight is None else sample_weight.stride(-1),
        *((0, 0) if saved is None else saved.stride()[-2:]),
        dz.stride(-2), *(0 if of is None else of.stride(-2) for of in (sums, prev_sums)),
        ACTIVATION=activation, PROBS=probs, SMOOTH=smooth, SUM=summed, GATHER_H=gather_h, PIXELS=h.dtype == torch.uint8,
        EVEN_K=K % (tile.slices * tile.depth) == 0, EVEN_COLS=K % tile.cols == 0,
        INPUT_PRECISION=input_precision(device, weight.dtype),
        BLOCK_M=tile.rows, BLOCK_C=tile.classes, SLICES=tile.slices, DEPTH=tile.depth,
        COLS=tile.cols, SPLITS=tile.splits,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


_launch = remembered(_plan)
_launch_active = remembered(with_active(_plan))
_launch_dropping = remembered(with_dropout(_plan))


def head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    activation: str = "identity",
    saved: Tensor | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    rows: Tensor | None = None,
    gather_h: bool = False,
    want_dz_prev: bool = True,
    loss: Tensor | None = None,
    dz: Tensor | None = None,
    dz_prev: Tensor | None = None,
    logits: Tensor | None = None,
    correct: Tensor | None = None,
    sums: ColumnSums | None = None,
    prev_sums: ColumnSums | None = None,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the head: (loss of each row, dZ_L, dZ_{L-1} or None).

    Args:
        h: [M, K]; with ``gather_h`` any number of rows, row m of the batch being h[rows[m]].
        weight, bias: [C, K] with C <= MAX_CLASSES, and [C].
        target: labels, int64 or uint8, [M], or probabilities [M, C]; with ``rows`` any number of them.
        activation, saved: of the layer below, for dZ_{L-1}.
        scale, factor: factors of dZ_L: 1/M for the mean over the batch, and a 0-d float32 that the kernel reads.
        class_weight, ignore_index, smoothing: as ``cross_entropy``.
        sample_weight: float [M], any stride: factors of the rows' losses and gradients; any number with ``rows``.
        divisor: float32 0-d, an output: the weight of the batch (``row_weights``), by which dZ is divided.
        rows: int64 [M], contiguous; row m then has the label target[rows[m]] and the weight sample_weight[rows[m]].
        loss, dz, dz_prev: outputs to reuse, contiguous; the loss in any float dtype (default float32), dz and
            dz_prev in weight's dtype. Columns of dz beyond C are not written.
        logits: output [M, C], contiguous, any float dtype; not written unless given.
        correct: output [M], contiguous, any dtype: 1 where the label is the first largest logit, else 0.
        sums, prev_sums: take the sums of the rows of dz and of dz_prev.
        active: a bool per member; nothing is written for members that are not active.
        dropout: of the layer below, for dZ_{L-1}. h, and a ``saved`` A_{L-1}, are A_{L-1} after dropout.
    """
    M = target.shape[-2 if target.is_floating_point() else -1] if rows is None else rows.shape[-1]
    C, K = weight.shape[-2:]
    leading = weight.shape[:-2]
    if loss is None:
        loss = torch.empty((*leading, M), dtype=torch.float32, device=h.device)
    if dz is None:
        dz = torch.empty((*leading, M, C), dtype=weight.dtype, device=h.device)
    if want_dz_prev and dz_prev is None:
        dz_prev = torch.empty((*leading, M, K), dtype=weight.dtype, device=h.device)
    if M == 0:
        return loss, dz, dz_prev
    device = current_device()
    if sums is not None or prev_sums is not None:
        options = dz_prev is not None, device, divisor is not None, dropout is not None and dz_prev is not None
        blocks = cdiv(M, _tile_of(h, weight, M, *options).rows)
        for of in (sums, prev_sums):
            if of is not None:
                of.written(blocks)
    summed = 0 if divisor is None else summed_block(M)
    if divisor is not None and not summed:
        of_labels = {} if target.is_floating_point() else {"target": target, "classes": C, "class_weight": class_weight}
        total_weight(divisor, M, ignore_index=ignore_index, sample_weight=sample_weight, rows=rows, **of_labels)
    tensors = (
        h, weight, bias, target, rows, class_weight, sample_weight, divisor, saved, factor, loss, dz, dz_prev,
        logits, correct, *[None if of is None else of.values for of in (sums, prev_sums)],
    )  # fmt: skip
    settings = ignore_index, activation, smoothing != 0.0, summed, gather_h
    numbers = float(scale), float(smoothing)
    if dropout is not None and dz_prev is not None:
        state, *drawn = dropout
        _launch_dropping((state, active, *tensors), (*settings, tuple(drawn)), numbers)
    elif active is None:
        _launch(tensors, settings, numbers)
    else:
        _launch_active((active, *tensors), settings, numbers)
    return loss, dz, dz_prev
