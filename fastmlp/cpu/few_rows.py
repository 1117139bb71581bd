"""A layer's products in a training step on a CPU: Z = X W^T + b, dX = dZ W, and W -= lr dZ^T X or dW = dZ^T X.

For many rows each product by itself goes to the library that is faster at it (``fastmlp.cpu.gemm``). For few, all of
them cost what moving W costs, and that hangs on which core moves which part of it: what one core has just read or
written, another one fetches the slow way. aten's elementwise operations, an optimizer's among them, give every thread
a block of rows; BLAS and oneDNN share W in ways of their own. So for few rows the ways to do all of a layer's products
are measured one after the other as in a step, and the fastest is taken:

    each    every product by the library that is faster at it alone
    rows    Z block by block, dX as the sum of what the blocks contribute, dW block by block: batched products with one
            block of rows of W for a thread
    aten    a single row: BLAS, and an elementwise update
    addmm   a single row: BLAS, and the update as a product of depth 1, shared as BLAS shares its others

The products of 512 x 784 with two threads of an AMD EPYC: a single row 54 us against 99 and 114 in the two other ways;
two rows 58 against 133; 16 rows 168 against 183; 64 rows the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from . import gemm

__all__ = ["FEW_ROWS", "Products", "layer_products", "row_blocks", "sample_way"]

#: Batch sizes up to which the products of a layer are measured together.
FEW_ROWS = 32
#: Elements that aten gives to one thread at least, before it uses a second one (at::internal::GRAIN_SIZE).
_GRAIN = 32_768

Update = Callable[[Tensor, Tensor, float], object]


class Products(NamedTuple):
    """Functions of X [m, K] and dZ [m, N]. Where oneDNN multiplies, results are new tensors."""

    linear: Callable[[Tensor], Tensor]  #: X -> f(X W^T + b), with f if oneDNN has it
    dgrad: Callable[[Tensor], Tensor] | None  #: dZ -> dZ W
    update: Update | None  #: (dZ, X, lr): W -= lr dZ^T X, in place
    wgrad: Callable[[Tensor, Tensor], Tensor] | None  #: (dZ, X) -> dZ^T X

    def in_turn(self, x: Tensor, dz: Tensor, lr: float) -> None:
        """All that there are, one after the other."""
        self.linear(x)
        if self.dgrad is not None:
            self.dgrad(dz)
        if self.update is not None:
            self.update(dz, x, lr)
        if self.wgrad is not None:
            self.wgrad(dz, x)


class _Layer(NamedTuple):
    """What the products of ``m`` rows read and write."""

    m: int
    weight: Tensor  #: [N, K], contiguous
    bias: Tensor | None  #: [N]
    activation: str
    out: Tensor  #: [m, N]
    dx: Tensor | None  #: [m, K], or None: no dgrad
    update: bool  #: whether W is updated in place
    dw: Tensor | None  #: [N, K] in ``gemm.product_dtype``, or None: no wgrad


def layer_products(
    m: int,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    out: Tensor,
    dx: Tensor | None,
    *,
    update: bool = False,
    dw: Tensor | None = None,
) -> Products:
    """The products of ``m`` rows with a contiguous ``weight`` [N, K].

    Args:
        bias: [N] or None.
        activation: applied by ``linear`` if oneDNN has it (``Activation.epilogue``).
        out, dx: [m, N] and [m, K] for the results; without ``dx`` there is no dgrad.
        update: whether ``weight`` is updated in place.
        dw: [N, K] in ``gemm.product_dtype``, for wgrad's result; without it there is none.
    """
    layer = _Layer(m, weight, bias, activation, out, dx, update, dw)
    way: gemm.Library = "each"
    if m == 1:
        way = sample_way(weight, dgrad=dx is not None)
    elif m <= FEW_ROWS:
        way = _few_rows_way(layer)
    if way == "rows":
        return _by_rows(layer, row_blocks(*weight.shape))
    if m > 1 or not update:
        return _each(layer)
    ways = {"addmm": _product_update, "onednn": _onednn_update}
    return _each(layer._replace(update=False))._replace(update=ways.get(way, _elementwise_update)(weight))


def row_blocks(rows: int, columns: int) -> int:
    """Blocks of rows into which threads share a contiguous [rows, columns] matrix in an elementwise operation; 1 where
    they share it in the middle of a row.
    """
    blocks = min(torch.get_num_threads(), -(-rows * columns // _GRAIN))
    return blocks if blocks and rows % blocks == 0 else 1


def sample_way(weight: Tensor, *, dgrad: bool = True) -> gemm.Library:
    """The fastest way for a single row and a contiguous ``weight`` [N, K]: measured, or known, for float32; else
    "aten".
    """
    blocks = row_blocks(*weight.shape)

    def trials(rows: int) -> dict[gemm.Library, Callable[[], object]]:
        layer, x, dz = _scratch(weight, rows, "identity", dgrad=dgrad, stored=False)
        w = layer.weight
        ways: dict[gemm.Library, Products] = {
            "aten": _by_blas(layer, _elementwise_update(w)),
            "addmm": _by_blas(layer, _product_update(w)),
        }
        if blocks > 1:
            ways["rows"] = _by_rows(layer, blocks)
        return _in_turn(ways, x, dz)

    if weight.dtype != torch.float32:
        return "aten"
    n, k = weight.shape
    way = gemm.choose("sample" if dgrad else "sample without dgrad", 1, k, n, weight.dtype, trials, 0)
    return "aten" if way == "rows" and blocks == 1 else way


def _few_rows_way(layer: _Layer) -> gemm.Library:
    """ "rows" or "each"; what has no rows to share, or another dtype than float32, is not measured."""
    weight, dgrad, stored = layer.weight, layer.dx is not None, layer.dw is not None
    blocks = row_blocks(*weight.shape)
    if weight.dtype != torch.float32 or blocks == 1:
        return "each"

    def trials(rows: int) -> dict[gemm.Library, Callable[[], object]]:
        scratch, x, dz = _scratch(weight, rows, layer.activation, dgrad=dgrad, stored=stored)
        return _in_turn({"each": _each(scratch), "rows": _by_rows(scratch, blocks)}, x, dz)

    kind = f"few rows{'' if dgrad else ' without dgrad'}{' stored' if stored else ''}"
    n, k = weight.shape
    return gemm.choose(kind, layer.m, k, n, weight.dtype, trials, 0)


def _scratch(weight: Tensor, rows: int, activation: str, *, dgrad: bool, stored: bool) -> tuple[_Layer, Tensor, Tensor]:
    """A layer of the shape of ``weight`` to measure with, X and dZ."""
    n, k = weight.shape
    x, dz, w = weight.new_ones((rows, k)), weight.new_ones((rows, n)), weight.new_zeros((n, k))
    dx, dw = torch.empty_like(x) if dgrad else None, torch.empty_like(w) if stored else None
    return _Layer(rows, w, None, activation, torch.empty_like(dz), dx, not stored, dw), x, dz


def _in_turn(ways: dict[gemm.Library, Products], x: Tensor, dz: Tensor) -> dict[gemm.Library, Callable[[], object]]:
    # Not with lr = 0, for which BLAS would not multiply at all.
    return {name: partial(products.in_turn, x, dz, 1e-3) for name, products in ways.items()}


def _each(layer: _Layer) -> Products:
    m, weight = layer.m, layer.weight
    return Products(
        gemm.linear(m, weight, layer.bias, layer.activation, layer.out),
        None if layer.dx is None else gemm.dgrad(m, weight, layer.dx),
        gemm.wgrad_update(m, weight) if layer.update else None,
        None if layer.dw is None else gemm.wgrad(m, layer.dw, weight.dtype),
    )


def _by_blas(layer: _Layer, update: Update) -> Products:
    w, z, dx = layer.weight, layer.out, layer.dx
    w_t = w.t()
    dgrad = None if dx is None else lambda dz: torch.mm(dz, w, out=dx)
    return Products(lambda x: torch.mm(x, w_t, out=z), dgrad, update, None)


def _by_rows(layer: _Layer, blocks: int) -> Products:
    m, weight, dw, dx = layer.m, layer.weight, layer.dw, layer.dx
    n, k = weight.shape
    shared, f = weight.view(blocks, n // blocks, k), ACTIVATIONS[layer.activation]
    shared_t = shared.transpose(1, 2)
    # Of a single row the blocks of Z lie one after the other in ``out``; of several they are gathered into it.
    out, out_blocks = layer.out, layer.out.view(m, blocks, n // blocks).transpose(0, 1)
    z = out_blocks if m == 1 else weight.new_empty((blocks, m, n // blocks))
    b = None if layer.bias is None else layer.bias.view(blocks, 1, n // blocks)
    parts = None if dx is None else weight.new_empty((blocks, m, k))

    def linear(x: Tensor) -> Tensor:
        if b is None:
            torch.bmm(x.expand(blocks, m, k), shared_t, out=z)
        else:
            torch.baddbmm(b, x.expand(blocks, m, k), shared_t, out=z)
        if m == 1:
            return f.overwrite(out)
        f.into(z, out_blocks)
        return out

    def dgrad(dz: Tensor) -> Tensor:
        assert parts is not None
        torch.bmm(dz.view(m, blocks, n // blocks).transpose(0, 1), shared, out=parts)
        return torch.sum(parts, 0, out=dx)

    def update(dz: Tensor, x: Tensor, lr: float) -> object:
        dz_t = dz.view(m, blocks, n // blocks).permute(1, 2, 0)
        return shared.baddbmm_(dz_t, x.expand(blocks, m, k), alpha=-lr)

    def wgrad(dz: Tensor, x: Tensor) -> Tensor:
        assert dw is not None
        dz_t = dz.view(m, blocks, n // blocks).permute(1, 2, 0)
        torch.bmm(dz_t, x.expand(blocks, m, k), out=dw.view(blocks, n // blocks, k))
        return dw

    return Products(
        linear,
        None if dx is None else dgrad,
        None if not layer.update else _elementwise_update(weight) if m == 1 else update,
        None if dw is None else gemm.wgrad(m, dw, weight.dtype) if m == 1 else wgrad,
    )


def _elementwise_update(w: Tensor) -> Update:
    return lambda dz, x, lr: w.addcmul_(dz.t(), x, value=-lr)


def _product_update(w: Tensor) -> Update:
    return lambda dz, x, lr: w.addmm_(dz.t(), x, alpha=-lr)


def _onednn_update(w: Tensor) -> Update:
    return lambda dz, x, lr: w.add_(gemm.onednn_wgrad(dz, x), alpha=-lr)
