"""The fused operations of an ensemble on plain torch: members are the first axis of W, b, Z and all gradients.

    X [E, M, K], or [M, K] for all members;  W [E, N, K];  b [E, N];  Z, A, dZ [E, M, N]

One batched product takes the place of E products. ``fastmlp.ops.torch_ops`` has the same operations of one network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..base.dropout import Dropout
from . import torch_products
from .dropout import overwritten
from .torch_losses import cross_entropy_bwd, cross_entropy_fwd, loss_bwd, loss_fwd  # noqa: F401
from .torch_ops import activation_bwd


def _own(x: Tensor, members: int, dtype: torch.dtype) -> Tensor:
    """[E, M, K] in a floating-point dtype, without a copy of an input that all members share."""
    if x.dtype == torch.uint8:
        x = x.to(dtype).div_(255)
    return x if x.dim() == 3 else x.expand(members, *x.shape)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """A B + bias for each member, new memory; in float32 where the processor cannot multiply 16 bits."""
    if a.dtype.itemsize == 2 and (wide := torch_products.wide_dtype(a, b)) is not None:
        return _product(a.to(wide), b.to(wide), None if bias is None else bias.to(wide)).to(a.dtype)
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, b)


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    save_z: bool = False,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b). ``dropout`` is of this layer's output."""
    z = _product(_own(x, weight.shape[0], weight.dtype), weight.mT, bias)
    f = ACTIVATIONS[activation]
    a, kept_z = (f.new(z), z) if save_z else (f.overwrite(z), None)
    return a if dropout is None else overwritten(a, dropout), kept_z


def linear_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None = None,
    activation: str = "identity",
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """DX [E, M, K] = (dZ W) * f' with f the activation of the layer below, and ``dropout`` that of its output."""
    da = _product(dz, weight)
    if activation == "identity" and dropout is None:
        return da
    return activation_bwd(da, saved, activation, inplace=True, dropout=dropout)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None): dW = dZ^T X, db = sum over the batch of dZ."""
    return _product(dz.mT, _own(x, dz.shape[0], dz.dtype)), dz.sum(1) if bias else None
