"""oneDNN's operators: linear layers with a fused activation, and weight gradients. Results are new tensors."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

#: Rows of dZ that are transposed at a time, so that they stay in the caches, and the least number of rows that two
#: threads transpose, half of them each.
_TRANSPOSED_ROWS, _LEAST_ROWS = 4096, 1024
#: Elements of a dZ from which on the vector code of a shuffle makes up for the cost of calling it.
_LEAST_SHUFFLED = 1 << 14


def available() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep freed blocks of up to 32 MiB instead of giving them back to the kernel.

    oneDNN allocates its result anew at every call. Mapping the pages of a result again costs more than a small product.
    glibc's thresholds rise to the largest block freed so far (mallopt(3), "dynamic mmap threshold", up to 32 MiB), so
    it is enough to free one block that was never touched. Other C libraries are not affected.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str | None) -> Tensor:
    """f(X W^T + b); ``epilogue`` is ``Activation.epilogue``."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, epilogue, [], ""))


def wgrad(dz: Tensor, x: Tensor) -> Tensor:
    """dZ^T X for dZ [M, N], X [M, K]. oneDNN's linear wants its first operand contiguous."""
    m = dz.shape[0]
    if dz.dtype != torch.float32 or not dz.is_contiguous() or dz.numel() < _LEAST_SHUFFLED:
        return linear(dz.t(), x.t(), None, "none")
    if m < _LEAST_ROWS or m % 2:
        return linear(_transposed(dz, 1)[0], x.t(), None, "none")
    total = None
    for some_dz, some_x in zip(dz.split(_TRANSPOSED_ROWS), x.split(_TRANSPOSED_ROWS), strict=True):
        half = some_dz.shape[0] // 2
        for dz_t, rows in zip(_transposed(some_dz, 2), some_x.split(half), strict=True):
            if total is None:
                total = linear(dz_t, rows.t(), None, "none")
            else:
                total = cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(dz_t, total, rows.t(), None, "add"))
    assert total is not None
    return total


def _transposed(dz: Tensor, blocks: int) -> Tensor:
    """dZ [M, N] as [blocks, N, M/blocks]: the transposes of blocks of rows, one thread per block.

    torch transposes a matrix with one thread, element by element. A shuffle of the channels of an image with
    M/blocks x N channels and one pixel per block uses vector registers, and one thread per block.
    """
    m, n = dz.shape
    rows = m // blocks
    pixels = dz.view(1, blocks, 1, rows * n).permute(0, 3, 1, 2)
    return torch.native_channel_shuffle(pixels, rows).permute(0, 2, 3, 1).view(blocks, n, rows)
