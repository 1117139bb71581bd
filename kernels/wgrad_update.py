"""dW, db and the optimizer's update of every layer of an MLP in one launch, and the mean loss on the side.

    dW_l = dZ_l^T A_{l-1},  db_l = sum over the batch of dZ_l,  (W_l, b_l) <- optimizer(W_l, b_l, dW_l, db_l)

One program computes one tile of one layer's dW and applies the update in its epilogue: gradients never reach memory.
The layers come as tuples of tensors; a program finds its layer by its number and selects the tensors at run time, so
that all layers but the first (whose input may be uint8 pixels gathered by ``rows``) share one copy of the code. One
more program averages the loss rows, in a fixed order.

When the batch is long and the tiles are few, each tile's batch is split over S programs. They write float32 partial
sums, and ``reduce_update`` adds the S slices in their order and applies the update: one launch more, no atomics, two
runs bitwise equal. ``reduce_update`` also serves for plain gradients (optimizer "none") and, with one slice, for an
update from gradients that were clipped or accumulated.

The optimizer's state, gradients and partial sums of all parameters lie in flat float32 buffers with one layout: a
segment for each parameter, W_0, b_0, W_1, ..., each padded to a multiple of ``SEGMENT`` elements (``Layout``).
Bytes of a step: reads dZ_l and A_{l-1}; reads and writes W_l and its state once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Tile, cdiv, gemm_tile, splits
from .device import current_device, input_precision
from .linear_wgrad import sum_slices, wgrad_tile
from .optimizer import update_block
from .tiling import grouped_tile

__all__ = ["SEGMENT", "Hyper", "Layer", "Layout", "reduce_update", "wgrad_update", "workspace"]

SEGMENT = 1024
GROUP_N = 8
LOSS_BLOCK = 1024


@triton.jit
def _wgrad_layer(
    dz_ptr, x_ptr, rows_ptr, w_ptr, b_ptr, low_w_ptr, low_b_ptr, m_ptr, v_ptr, partial_ptr, hyper_ptr, scale_ptr,
    pid, split, M, N, K, has_bias, w_segment, b_segment, m_per_split, stride_split,
    stride_zm, stride_xm,
    momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps,
    OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr, HAS_LOW: tl.constexpr, DIRECT: tl.constexpr,
    SCALED: tl.constexpr, GATHER: tl.constexpr, PIXELS: tl.constexpr, EVEN_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Tile number ``pid`` of one layer: gradient of the split's samples, then update or partial sums."""
    pid_n, pid_k = grouped_tile(pid, tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
    m_begin = split * m_per_split
    m_end = tl.minimum(m_begin + m_per_split, M)
    dw, db = wgrad_tile(
        dz_ptr, x_ptr, rows_ptr, N, K, m_begin, m_end, pid_n, pid_k, stride_zm, 1, stride_xm, 1,
        True, GATHER, PIXELS, EVEN_M, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_w = mask_n[:, None] & (offs_k < K)[None, :]
    offs_w = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    if DIRECT:
        if SCALED:
            dw = dw * tl.load(scale_ptr)
            db = db * tl.load(scale_ptr)
        update_block(
            dw, w_ptr, low_w_ptr, m_ptr, v_ptr, offs_w, w_segment + offs_w, mask_w, hyper_ptr,
            momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps, OPTIMIZER, NESTEROV, HAS_LOW,
        )  # fmt: skip
        if has_bias * (pid_k == 0):
            update_block(
                db, b_ptr, low_b_ptr, m_ptr, v_ptr, offs_n, b_segment + offs_n, mask_n, hyper_ptr,
                momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps, OPTIMIZER, NESTEROV, HAS_LOW,
            )  # fmt: skip
    else:
        slice_ptr = partial_ptr + split.to(tl.int64) * stride_split
        tl.store(slice_ptr + w_segment + offs_w, dw, mask=mask_w)
        if has_bias * (pid_k == 0):
            tl.store(slice_ptr + b_segment + offs_n, db, mask=mask_n)


@triton.jit
def _mean_loss(loss_rows_ptr, loss_ptr, count, BLOCK: tl.constexpr):
    """loss = mean of ``count`` values, blocks added in order."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, count, BLOCK):
        total += tl.load(loss_rows_ptr + i + offs, mask=i + offs < count, other=0.0)
    tl.store(loss_ptr, tl.sum(total, axis=0) / count)


@triton.jit
def _wgrad_update_kernel(
    dz_ptrs, x_ptrs, rows_ptr, w_ptrs, b_ptrs, low_w_ptrs, low_b_ptrs, m_ptr, v_ptr, partial_ptr, hyper_ptr,
    scale_ptr, loss_rows_ptr, loss_ptr,
    M, loss_count, Ns, Ks, has_biases, w_segments, b_segments, first_tiles, stride_xs, tiles, m_per_split, stride_split,
    momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps,
    LAYERS: tl.constexpr, OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr, HAS_LOW: tl.constexpr,
    DIRECT: tl.constexpr, SCALED: tl.constexpr, HAS_LOSS: tl.constexpr,
    GATHER: tl.constexpr, PIXELS: tl.constexpr, EVEN_M: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    LOSS_BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if LAYERS == 1:
        tiles_first = tiles
    else:
        tiles_first = first_tiles[1]
    if pid < tiles_first:
        _wgrad_layer(
            dz_ptrs[0], x_ptrs[0], rows_ptr, w_ptrs[0], b_ptrs[0], low_w_ptrs[0], low_b_ptrs[0], m_ptr, v_ptr,
            partial_ptr, hyper_ptr, scale_ptr,
            pid, split, M, Ns[0], Ks[0], has_biases[0], w_segments[0], b_segments[0], m_per_split, stride_split,
            Ns[0], stride_xs[0], momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps,
            OPTIMIZER, NESTEROV, HAS_LOW, DIRECT, SCALED, GATHER, PIXELS, EVEN_M, INPUT_PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_N,
        )  # fmt: skip
    elif pid < tiles:
        if LAYERS > 1:
            dz_ptr = dz_ptrs[1]
            x_ptr = x_ptrs[1]
            w_ptr = w_ptrs[1]
            b_ptr = b_ptrs[1]
            low_w_ptr = low_w_ptrs[1]
            low_b_ptr = low_b_ptrs[1]
            N = Ns[1]
            K = Ks[1]
            has_bias = has_biases[1]
            w_segment = w_segments[1]
            b_segment = b_segments[1]
            first_tile = first_tiles[1]
            stride_xm = stride_xs[1]
            for i in tl.static_range(2, LAYERS):
                if pid >= first_tiles[i]:
                    dz_ptr = dz_ptrs[i]
                    x_ptr = x_ptrs[i]
                    w_ptr = w_ptrs[i]
                    b_ptr = b_ptrs[i]
                    low_w_ptr = low_w_ptrs[i]
                    low_b_ptr = low_b_ptrs[i]
                    N = Ns[i]
                    K = Ks[i]
                    has_bias = has_biases[i]
                    w_segment = w_segments[i]
                    b_segment = b_segments[i]
                    first_tile = first_tiles[i]
                    stride_xm = stride_xs[i]
            _wgrad_layer(
                dz_ptr, x_ptr, rows_ptr, w_ptr, b_ptr, low_w_ptr, low_b_ptr, m_ptr, v_ptr,
                partial_ptr, hyper_ptr, scale_ptr,
                pid - first_tile, split, M, N, K, has_bias, w_segment, b_segment, m_per_split, stride_split,
                N, stride_xm, momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps,
                OPTIMIZER, NESTEROV, HAS_LOW, DIRECT, SCALED, False, False, EVEN_M, INPUT_PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_N,
            )  # fmt: skip
    elif HAS_LOSS:
        if split == 0:
            _mean_loss(loss_rows_ptr, loss_ptr, loss_count, LOSS_BLOCK)


@triton.jit
def _reduce_update_kernel(
    partial_ptr, w_ptrs, low_ptrs, grad_ptr, m_ptr, v_ptr, hyper_ptr, scale_ptr, skip_ptr, first_blocks, numels,
    n_splits, stride_split, momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps,
    PARAMS: tl.constexpr, OPTIMIZER: tl.constexpr, NESTEROV: tl.constexpr, HAS_LOW: tl.constexpr,
    SCALED: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    w_ptr = w_ptrs[0]
    low_ptr = low_ptrs[0]
    first_block = first_blocks[0]
    numel = numels[0]
    for i in tl.static_range(1, PARAMS):
        if pid >= first_blocks[i]:
            w_ptr = w_ptrs[i]
            low_ptr = low_ptrs[i]
            first_block = first_blocks[i]
            numel = numels[i]
    offs = (pid - first_block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    flat = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    g = sum_slices(partial_ptr, flat, mask, n_splits, stride_split)
    if SCALED:
        g = g * tl.load(scale_ptr)
    if OPTIMIZER == "none":
        if ACCUMULATE:
            g += tl.load(grad_ptr + flat, mask=mask, other=0.0)
        tl.store(grad_ptr + flat, g, mask=mask)
    else:
        if skip_ptr is not None:
            mask = mask & (tl.load(skip_ptr).to(tl.int32) == 0)
        update_block(
            g, w_ptr, low_ptr, m_ptr, v_ptr, offs, flat, mask, hyper_ptr,
            momentum, weight_decay, one_minus_beta1, beta2, one_minus_beta2, eps, OPTIMIZER, NESTEROV, HAS_LOW,
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One trained layer: float32 masters and, where products read 16-bit copies, those."""

    weight: Tensor  #: [N, K], contiguous
    bias: Tensor | None  #: [N], or None where there is none to train
    low_weight: Tensor | None = None
    low_bias: Tensor | None = None


@dataclass(frozen=True)
class Hyper:
    """Optimizer constants; what changes from step to step comes as a row of ``optimizer.HYPER_COLUMNS`` floats."""

    optimizer: str  #: "sgd", "momentum", "adamw" or "none"
    nesterov: bool = False
    momentum: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    @property
    def scalars(self) -> tuple[float, ...]:
        """In the order of the kernels' arguments."""
        return self.momentum, self.weight_decay, 1 - self.beta1, self.beta2, 1 - self.beta2, self.eps


class Layout:
    """Where each parameter of some layers lies in a flat buffer, and the tuples that the kernels take."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.params: list[Tensor] = []
        self.low: list[Tensor] = []
        self.starts: list[int] = []
        self.w_segments: list[int] = []
        self.b_segments: list[int] = []
        self.total = 0
        for layer in self.layers:
            self.w_segments.append(self._add(layer.weight, layer.low_weight))
            has_bias = layer.bias is not None
            self.b_segments.append(self._add(layer.bias, layer.low_bias) if layer.bias is not None else 0)
            assert has_bias or layer.low_bias is None

    def _add(self, param: Tensor, low: Tensor | None) -> int:
        start = self.total
        self.params.append(param)
        self.low.append(param if low is None else low)
        self.starts.append(start)
        self.total += cdiv(param.numel(), SEGMENT) * SEGMENT
        return start

    @property
    def has_low(self) -> bool:
        """Whether products read 16-bit copies, which an update must write too."""
        return self.layers[0].low_weight is not None

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes as views into a flat buffer of ``total`` elements."""
        return [flat[s : s + p.numel()].view(p.shape) for s, p in zip(self.starts, self.params, strict=True)]


def _plan(layout: Layout, m: int, dtype: torch.dtype) -> tuple[Tile, int, int]:
    """(tile, splits, samples a split): the tile that suits the largest layer, splits for all tiles together."""
    device = current_device()
    largest = max((layer.weight for layer in layout.layers), key=lambda w: w.numel())
    n, k = largest.shape
    tile = gemm_tile("update", n, k, m, dtype, device, wide=False)
    rows = sum(cdiv(w.weight.shape[0], tile.rows) * cdiv(w.weight.shape[1], tile.cols) for w in layout.layers)
    wanted = splits(tile, rows * tile.rows, tile.cols, m, device)
    m_per_split = cdiv(cdiv(m, tile.depth), wanted) * tile.depth
    return tile, max(1, cdiv(m, m_per_split)), m_per_split


def workspace(layout: Layout, m: int, dtype: torch.dtype, device: torch.device, *, direct: bool) -> Tensor | None:
    """The partial sums' buffer for batches of ``m``; None where the update is ``direct`` and the batch not split."""
    _, n_splits, _ = _plan(layout, m, dtype)
    if n_splits == 1 and direct:
        return None
    return torch.empty((n_splits, layout.total), dtype=torch.float32, device=device)


def wgrad_update(
    layout: Layout,
    dzs: Sequence[Tensor],
    xs: Sequence[Tensor],
    hyper: Hyper,
    hyper_row: Tensor,
    *,
    m_state: Tensor | None = None,
    v_state: Tensor | None = None,
    rows: Tensor | None = None,
    unscale: Tensor | None = None,
    loss_rows: Tensor | None = None,
    loss: Tensor | None = None,
    partial: Tensor | None = None,
    grads: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """Launch gradient and update of every layer: dzs[l] [M, N_l] and xs[l] [M, K_l], inner stride 1, dZ contiguous.

    ``rows`` (int64, any stride) gathers rows of xs[0] only, which may be uint8. ``unscale`` is a 0-d float32 factor of
    all gradients.
    With ``hyper.optimizer == "none"`` the gradients go to ``grads`` (flat, ``layout.total`` float32), added to what is
    there if ``accumulate``. ``partial`` is float32 workspace to reuse, [splits, layout.total].
    """
    m = dzs[0].shape[0]
    dtype = dzs[0].dtype
    tile, n_splits, m_per_split = _plan(layout, m, dtype)
    direct = n_splits == 1 and hyper.optimizer != "none"
    if not direct and partial is None:
        partial = torch.empty((n_splits, layout.total), dtype=torch.float32, device=dzs[0].device)
    if rows is not None:
        rows = rows.contiguous()
    layers = layout.layers
    first_tiles, tiles = [], 0
    for layer in layers:
        first_tiles.append(tiles)
        tiles += cdiv(layer.weight.shape[0], tile.rows) * cdiv(layer.weight.shape[1], tile.cols)
    weights = tuple(layer.weight for layer in layers)
    biases = tuple(layer.weight if layer.bias is None else layer.bias for layer in layers)
    low_weights = tuple(layer.weight if layer.low_weight is None else layer.low_weight for layer in layers)
    low_biases = tuple(
        low if layer.low_bias is None else layer.low_bias for layer, low in zip(layers, low_weights, strict=True)
    )
    has_loss = loss is not None
    _wgrad_update_kernel[(tiles + has_loss, n_splits)](
        tuple(dzs), tuple(xs), rows, weights, biases, low_weights, low_biases, m_state, v_state, partial, hyper_row,
        unscale, loss_rows, loss,
        m, 0 if loss_rows is None else loss_rows.numel(),
        tuple(w.shape[0] for w in weights), tuple(w.shape[1] for w in weights),
        tuple(int(layer.bias is not None) for layer in layers), tuple(layout.w_segments), tuple(layout.b_segments),
        tuple(first_tiles), tuple(x.stride(0) for x in xs), tiles, m_per_split, layout.total, *hyper.scalars,
        LAYERS=len(layers), OPTIMIZER=hyper.optimizer, NESTEROV=hyper.nesterov, HAS_LOW=layout.has_low,
        DIRECT=direct, SCALED=unscale is not None, HAS_LOSS=has_loss,
        GATHER=rows is not None, PIXELS=xs[0].dtype == torch.uint8, EVEN_M=m % tile.depth == 0,
        INPUT_PRECISION=input_precision(current_device(), dtype),
        BLOCK_M=tile.depth, BLOCK_N=tile.rows, BLOCK_K=tile.cols, GROUP_N=GROUP_N, LOSS_BLOCK=LOSS_BLOCK,
        **tile.compile_options,
    )  # fmt: skip
    if not direct:
        assert partial is not None
        reduce_update(
            layout, partial, n_splits, hyper, hyper_row,
            m_state=m_state, v_state=v_state, unscale=unscale, grads=grads, accumulate=accumulate,
        )  # fmt: skip


def reduce_update(
    layout: Layout,
    partial: Tensor,
    n_splits: int,
    hyper: Hyper,
    hyper_row: Tensor,
    *,
    m_state: Tensor | None = None,
    v_state: Tensor | None = None,
    unscale: Tensor | None = None,
    grads: Tensor | None = None,
    skip: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """Launch g = sum of the slices of ``partial``, times ``unscale``, then the update (or store g in ``grads``).

    ``skip`` is a 0-d float32: nothing is updated unless it is 0.
    """
    _reduce_update_kernel[(layout.total // SEGMENT,)](
        partial, tuple(layout.params), tuple(layout.low), grads, m_state, v_state, hyper_row, unscale, skip,
        tuple(start // SEGMENT for start in layout.starts), tuple(p.numel() for p in layout.params),
        n_splits, layout.total, *hyper.scalars,
        PARAMS=len(layout.params), OPTIMIZER=hyper.optimizer, NESTEROV=hyper.nesterov, HAS_LOW=layout.has_low,
        SCALED=unscale is not None, ACCUMULATE=accumulate, BLOCK=SEGMENT,
    )  # fmt: skip
