"""A layer's products in a training step on a CPU: Z = X W^T + b, dX = dZ W, and W -= lr dZ^T X or dW = dZ^T X.

Each product goes to the library that is faster at it (``fastmlp.cpu.products``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import products
from .products import Update
from .widened import wide_update, wide_wgrad


class Products(NamedTuple):
    """Functions of X [m, K] and dZ [m, N]. Where oneDNN multiplies, results are new tensors."""

    linear: Callable[[Tensor], Tensor]  #: X -> f(X W^T + b), with f if oneDNN has it
    dgrad: Callable[[Tensor], Tensor] | None  #: dZ -> dZ W
    update: Update | None  #: (dZ, X, lr): W -= lr dZ^T X, in place
    wgrad: Callable[[Tensor, Tensor], Tensor] | None  #: (dZ, X) -> dZ^T X


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
        wide: [N, K] in a wider dtype, where ``weight`` is a rounded copy. With ``update`` it is the master, which is
            updated in place of the copy. Without, it is the tensor for wgrad's result if the product is faster in the
            wider dtype.
    """
    widened = wide is not None and wide_wgrad(m, wide, weight.dtype, update=update)
    if widened and not update:
        dw = wide
    n, k = weight.shape
    wgrad = None if dw is None else products.wgrad(m, n, k, weight.dtype, dw)
    updates: Update | None = None
    if update and wide is None:
        updates = products.update(m, weight)
    elif update and wide is not None:
        updates = wide_update(m, wide) if widened else _rounded_update(wgrad, wide)
    return Products(
        products.linear(m, weight, bias, activation, out),
        None if dx is None else products.dgrad(m, weight, dx),
        updates,
        wgrad,
    )


def _rounded_update(wgrad: Callable[[Tensor, Tensor], Tensor] | None, master: Tensor) -> Update:
    """The update of a master by a gradient that is rounded to the dtype of the products."""
    assert wgrad is not None
    return lambda dz, x, lr: master.add_(wgrad(dz, x).to(master.dtype), alpha=-lr)
