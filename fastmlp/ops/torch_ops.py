"""The fused operations on plain torch, for CPUs and for dtypes that the kernels do not compute in.

The same formulas as the kernels, in place wherever a buffer is ours, and never on the autograd tape: callers run
them inside torch.autograd.Function. ``fastmlp.reference`` has the same operations written for reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..base.dropout import Dropout
from . import torch_products
from .dropout import before_dropout, dropped, overwritten
from .torch_losses import cross_entropy_bwd, cross_entropy_fwd, loss_bwd, loss_fwd  # noqa: F401


def _scaled(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return pixels.to(dtype).div_(255)


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    save_z: bool = False,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b); X [M, K], W [N, K], b [N]. ``dropout`` is of this layer's output."""
    if dropout is not None:
        a, z = linear_fwd(x, weight, bias, activation, save_z=save_z)
        return overwritten(a, dropout), z
    if x.dtype == torch.uint8:
        x = _scaled(x, weight.dtype)
    f = ACTIVATIONS[activation]
    if not save_z and f.epilogue:
        return torch_products.linear(x, weight, bias, activation), None
    z = torch_products.linear(x, weight, bias, "identity")
    return (f.new(z), z) if save_z else (f.overwrite(z), None)


def activation_bwd(
    da: Tensor, saved: Tensor | None, activation: str, *, inplace: bool = False, dropout: Dropout | None = None
) -> Tensor:
    """DZ = dA * f'; ``saved`` is what f' needs (``fastmlp.activations``). ``inplace`` may overwrite dA.

    With ``dropout``, dA is the gradient of the layer's output after dropout, and a ``saved`` A is that output.
    """
    if dropout is not None:
        da = overwritten(da, dropout) if inplace else dropped(da, dropout)
        return activation_bwd(da, before_dropout(saved, activation, dropout.p), activation, inplace=True)
    return ACTIVATIONS[activation].backward(da, saved, inplace=inplace)


def linear_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None = None,
    activation: str = "identity",
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below, and ``dropout`` that of its output."""
    da = torch_products.dgrad(dz, weight)
    if activation == "identity" and dropout is None:
        return da
    return activation_bwd(da, saved, activation, inplace=True, dropout=dropout)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None): dW = dZ^T X, db = sum over the batch of dZ."""
    if x.dtype == torch.uint8:
        x = _scaled(x, dz.dtype)
    return torch_products.wgrad(dz, x), dz.sum(0) if bias else None
