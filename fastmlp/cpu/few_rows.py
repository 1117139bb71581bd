"""A layer's products in a training step on a CPU: Z = X W^T + b, dX = dZ W, and W -= lr dZ^T X or dW = dZ^T X.

For many rows each product by itself goes to the library that is faster at it (``fastmlp.cpu.products``). For few rows,
most of the time goes into moving W, and depends on which core moves which part of W: a core is slow to fetch what
another core has just read or written. aten's elementwise operations, an optimizer's among them, give every thread a
block of rows. BLAS and oneDNN share W in ways of their own. So the ways to do all products of a layer with few rows are
measured one product after the other, as in a step, and the fastest way is taken:

    each    every product by the library that is faster at it alone
    rows    Z block by block, dX as the sum of what the blocks contribute, dW block by block: batched products with one
            block of rows of W per thread
    aten    a single row: BLAS, and an elementwise update
    addmm   a single row: BLAS, and the update as a product of depth 1, shared as BLAS shares its others

The products of 512 x 784 with two threads of an AMD EPYC take 54 us for a single row by "rows", and 99 and 114 us in
the two other ways; 58 instead of 133 us for two rows; 168 instead of 183 us for 16 rows; the same time for 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from . import choose, products
from .choose import Choice
from .products import Update
from .widened import wide_update, wide_wgrad

#: Batch sizes up to which the products of a layer are measured together.
FEW_ROWS = 32
#: Elements that aten gives to one thread at least, before it uses a second one (at::internal::GRAIN_SIZE).
_GRAIN = 32_768


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
    """What the products of ``m`` rows read and write; ``update`` says whether W is updated in place."""

    m: int
    weight: Tensor
    bias: Tensor | None
    activation: str
    out: Tensor
    dx: Tensor | None
    update: bool
    dw: Tensor | None


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
    wide: Tensor | None = None,
) -> Products:
    """The products of ``m`` rows with a contiguous ``weight`` [N, K].

    Args:
        bias: [N] or None.
        activation: applied by ``linear``; one that oneDNN has (``Activation.epilogue``).
        out, dx: [m, N] and [m, K] for the results; without ``dx`` there is no dgrad.
        update: whether ``weight`` is updated in place.
        dw: [N, K] in ``product_dtype``, for wgrad's result; without ``dw`` there is no wgrad.
        wide: [N, K] in a wider dtype, where ``weight`` is a rounded copy: its master, which is then updated in place of
            it, or, without ``update``, the tensor for wgrad's result where the product is faster in the wider dtype.
    """
    widened = wide is not None and wide_wgrad(m, wide, weight.dtype, update=update)
    if widened and not update:
        dw = wide
    layer = _Layer(m, weight, bias, activation, out, dx, update and wide is None, dw)
    way = _way(layer) if m <= FEW_ROWS else "each"
    if way == "rows":
        chosen = _by_rows(layer, row_blocks(*weight.shape))
    elif way in _SAMPLE_UPDATES and m == 1 and layer.update:
        chosen = _each(layer._replace(update=False))._replace(update=_SAMPLE_UPDATES[way](weight))
    else:
        chosen = _each(layer)
    if wide is None or not update:
        return chosen
    return chosen._replace(update=wide_update(m, wide) if widened else _rounded_update(chosen, wide))


def row_blocks(rows: int, columns: int) -> int:
    """The number of blocks of rows into which threads share a contiguous [rows, columns] matrix in an elementwise
    operation; 1 where a block would end in the middle of a row.
    """
    blocks = min(torch.get_num_threads(), -(-rows * columns // _GRAIN))
    return blocks if blocks and rows % blocks == 0 else 1


def sample_blocks(weight: Tensor) -> int:
    """``row_blocks`` of a weight for which "rows" is the fastest way to do the products of a single row, else 0."""
    way = _way(_Layer(1, weight, None, "identity", weight, weight, True, None))
    return row_blocks(*weight.shape) if way == "rows" else 0


def _way(layer: _Layer) -> Choice:
    """The fastest way, measured or known, for float32; else "aten" for a single row, "each" for more rows.

    More rows than one are not measured where there are no blocks to share.
    """
    m, weight, sample = layer.m, layer.weight, layer.m == 1
    (n, k), blocks = weight.shape, row_blocks(*weight.shape)
    unmeasured: Choice = "aten" if sample else "each"
    if weight.dtype != torch.float32 or (blocks == 1 and not sample):
        return unmeasured
    stored = layer.dw is not None and not sample

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        x, dz, w = weight.new_ones((rows, k)), weight.new_ones((rows, n)), weight.new_zeros((n, k))
        dx, dw = None if layer.dx is None else torch.empty_like(x), torch.empty_like(w) if stored else None
        f = "identity" if sample else layer.activation
        scratch = _Layer(rows, w, None, f, torch.empty_like(dz), dx, not stored, dw)
        if sample:
            with choose.only_aten():
                blas = _each(scratch._replace(update=False))
            ways = {way: blas._replace(update=update(w)) for way, update in _SAMPLE_UPDATES.items()}
        else:
            ways = {"each": _each(scratch)}
        if blocks > 1:
            ways["rows"] = _by_rows(scratch, blocks)
        # Not with lr = 0, for which BLAS would not multiply at all.
        return {way: partial(products_of_way.in_turn, x, dz, 1e-3) for way, products_of_way in ways.items()}

    kind = f"{'sample' if sample else 'few rows'}{' without dgrad' if layer.dx is None else ''}"
    kind += " stored" if stored else ""
    way = choose.choose(kind, m, k, n, weight.dtype, trials, whatever_size=True)
    return unmeasured if way == "rows" and blocks == 1 else way


def _each(layer: _Layer) -> Products:
    m, weight, (n, k) = layer.m, layer.weight, layer.weight.shape
    return Products(
        products.linear(m, weight, layer.bias, layer.activation, layer.out),
        None if layer.dx is None else products.dgrad(m, weight, layer.dx),
        products.update(m, weight) if layer.update else None,
        None if layer.dw is None else products.wgrad(m, n, k, weight.dtype, layer.dw),
    )


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
        None if not layer.update else _SAMPLE_UPDATES["aten"](weight) if m == 1 else update,
        None if dw is None else products.wgrad(m, n, k, weight.dtype, dw) if m == 1 else wgrad,
    )


#: How a single row updates W, by the choice.
_SAMPLE_UPDATES: dict[Choice, Callable[[Tensor], Update]] = {
    "aten": lambda w: lambda dz, x, lr: w.addcmul_(dz.t(), x, value=-lr),
    "addmm": lambda w: lambda dz, x, lr: w.addmm_(dz.t(), x, alpha=-lr),
}


def _rounded_update(chosen: Products, master: Tensor) -> Update:
    """The update of a master by a gradient that is rounded to the dtype of the products."""
    wgrad = chosen.wgrad
    assert wgrad is not None
    return lambda dz, x, lr: master.add_(wgrad(dz, x).to(master.dtype), alpha=-lr)
