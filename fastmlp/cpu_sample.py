"""A layer's three products for a single sample on a CPU: z = W a + b, da = W^T dz, W -= lr dz a^T.

Each of them uses a weight once and so costs what moving W costs, and that hangs on which core moves which part of it:
what one core has just read or written, another one fetches the slow way. aten's elementwise update gives every thread
a block of rows; BLAS shares W in ways of its own. Of the ways to do the three,

    aten    BLAS, and an elementwise update
    addmm   BLAS, and the update as a product of depth 1, which BLAS shares in the same way as its other products
    rows    z block by block and da as the sum of what the blocks contribute, both as batched products with one block
            of rows for a thread, and the elementwise update, which has the same blocks

the fastest is measured, the three products one after the other as in a step (``fastmlp.cpu_gemm``). 512 x 784, two
threads of an AMD EPYC: 114, 99 and 54 us.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_gemm

__all__ = ["SampleProducts", "row_blocks", "sample_products", "sample_way"]

#: Elements that aten gives to one thread at least, before it uses a second one (at::internal::GRAIN_SIZE).
_GRAIN = 32_768

Update = Callable[[Tensor, Tensor, float], object]


class SampleProducts(NamedTuple):
    """Functions of a [1, K] and dz [1, N]."""

    linear: Callable[[Tensor], Tensor]  #: a -> f(a W^T + b), with f if it is one of ``cpu_gemm.EPILOGUES``
    dgrad: Callable[[Tensor], Tensor] | None  #: dz -> dz W
    update: Update  #: (dz, a, lr): W -= lr dz^T a, in place

    def in_turn(self, a: Tensor, dz: Tensor, lr: float) -> None:
        """All three, one after the other."""
        self.linear(a)
        if self.dgrad is not None:
            self.dgrad(dz)
        self.update(dz, a, lr)


def row_blocks(rows: int, columns: int) -> int:
    """Blocks of rows into which threads share a contiguous [rows, columns] matrix in an elementwise operation; 1 where
    they share it in the middle of a row.
    """
    blocks = min(torch.get_num_threads(), -(-rows * columns // _GRAIN))
    return blocks if blocks and rows % blocks == 0 else 1


def sample_way(weight: Tensor, *, dgrad: bool = True) -> cpu_gemm.Library:
    """The fastest way for a contiguous ``weight`` [N, K]: measured, or known, for float32; else "aten"."""
    n, k = weight.shape
    blocks = row_blocks(n, k)

    def trials(rows: int) -> dict[cpu_gemm.Library, Callable[[], object]]:
        a, dz, w = weight.new_ones((rows, k)), weight.new_ones((rows, n)), weight.new_zeros((n, k))
        z, da = torch.empty_like(dz), torch.empty_like(a) if dgrad else None
        ways: dict[cpu_gemm.Library, SampleProducts] = {
            "aten": _by_blas(w, z, da, _elementwise_update(w)),
            "addmm": _by_blas(w, z, da, _product_update(w)),
        }
        if blocks > 1:
            ways["rows"] = _by_rows(w, None, "none", z, da, blocks)
        # Not with lr = 0, for which BLAS would not multiply at all.
        return {name: partial(products.in_turn, a, dz, 1e-3) for name, products in ways.items()}

    if weight.dtype != torch.float32:
        return "aten"
    way = cpu_gemm.choose("sample" if dgrad else "sample without dgrad", 1, k, n, weight.dtype, trials, 0)
    return "aten" if way == "rows" and blocks == 1 else way


def sample_products(
    weight: Tensor, bias: Tensor | None, activation: str, out: Tensor, dx: Tensor | None
) -> SampleProducts:
    """The products for a contiguous ``weight`` [N, K]; results are ``out`` [1, N] and ``dx`` [1, K], or new tensors
    where oneDNN multiplies. Without ``dx`` there is no dgrad.
    """
    way = sample_way(weight, dgrad=dx is not None)
    if way == "rows":
        return _by_rows(weight, bias, cpu_gemm.EPILOGUES[activation], out, dx, row_blocks(*weight.shape))
    update = {"addmm": _product_update, "onednn": _onednn_update}.get(way, _elementwise_update)
    return SampleProducts(
        cpu_gemm.linear(1, weight, bias, activation, out),
        None if dx is None else cpu_gemm.dgrad(1, weight, dx),
        update(weight),
    )


def _by_blas(w: Tensor, z: Tensor, da: Tensor | None, update: Update) -> SampleProducts:
    w_t = w.t()
    dgrad = None if da is None else lambda dz: torch.mm(dz, w, out=da)
    return SampleProducts(lambda a: torch.mm(a, w_t, out=z), dgrad, update)


def _by_rows(
    weight: Tensor, bias: Tensor | None, epilogue: str, out: Tensor, dx: Tensor | None, blocks: int
) -> SampleProducts:
    n, k = weight.shape
    shared = weight.view(blocks, n // blocks, k)
    shared_t, z = shared.transpose(1, 2), out.view(blocks, 1, n // blocks)
    b = None if bias is None else bias.view(blocks, 1, n // blocks)
    parts = weight.new_empty((blocks, 1, k))

    def linear(a: Tensor) -> Tensor:
        if b is None:
            torch.bmm(a.expand(blocks, 1, k), shared_t, out=z)
        else:
            torch.baddbmm(b, a.expand(blocks, 1, k), shared_t, out=z)
        return cpu_gemm.finished(out, epilogue)

    def dgrad(dz: Tensor) -> Tensor:
        torch.bmm(dz.view(blocks, 1, n // blocks), shared, out=parts)
        return torch.sum(parts, 0, out=dx)

    return SampleProducts(linear, None if dx is None else dgrad, _elementwise_update(weight))


def _elementwise_update(w: Tensor) -> Update:
    return lambda dz, a, lr: w.addcmul_(dz.t(), a, value=-lr)


def _product_update(w: Tensor) -> Update:
    return lambda dz, a, lr: w.addmm_(dz.t(), a, alpha=-lr)


def _onednn_update(w: Tensor) -> Update:
    return lambda dz, a, lr: w.add_(cpu_gemm.onednn_wgrad(dz, a), alpha=-lr)
