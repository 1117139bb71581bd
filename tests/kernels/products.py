"""Every kernel that multiplies matrices, as the product A B^T of A [M, K] and B [N, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmlp.kernels import head, linear_dgrad, linear_fwd, linear_wgrad
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.optimizer import HYPER_COLUMNS
from fastmlp.kernels.wgrad_update import wgrad_update

__all__ = ["PRODUCTS", "draw"]


def draw(*shape: int) -> Tensor:
    """Values far from 0, so that an infinite factor gives an infinite product."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values + values.sign()


def _fwd(lane: torch.device, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    return {"A": linear_fwd(x.to(lane), w.to(lane), None, "identity")[0]}


def _dgrad(lane: torch.device, dz: Tensor, w: Tensor) -> dict[str, Tensor]:
    return {"dX": linear_dgrad(dz.to(lane), w.to(lane).t())}


def _wgrad(lane: torch.device, dz: Tensor, x: Tensor) -> dict[str, Tensor]:
    dw, db = linear_wgrad(dz.t().to(lane), x.t().to(lane))
    assert db is not None
    return {"dW": dw, "db": db}


def _update(lane: torch.device, dz: Tensor, x: Tensor) -> dict[str, Tensor]:
    layer = Layer(torch.zeros(dz.shape[0], x.shape[0]).to(lane), torch.zeros(dz.shape[0]).to(lane))
    layout = Layout([layer])
    grads, hyper_row = torch.empty(layout.total).to(lane), torch.zeros(HYPER_COLUMNS).to(lane)
    dzs, xs = ([t.t().contiguous().to(lane)] for t in (dz, x))
    wgrad_update(layout, dzs, xs, "none", hyper_row, grads=grads)
    return dict(zip(("dW", "db"), layout.views(grads), strict=True))


def _head(lane: torch.device, h: Tensor, w: Tensor) -> dict[str, Tensor]:
    logits, labels = torch.empty(h.shape[0], w.shape[0]).to(lane), torch.zeros(h.shape[0], dtype=torch.long).to(lane)
    _, _, dx = head(h.to(lane), w.to(lane), None, labels, logits=logits)
    assert dx is not None
    return {"Z": logits, "dX": dx}


#: By name, functions of a device, A and B. They return tensors by name: the product first, then everything else that
#: the kernel computes of each row of A.
PRODUCTS = {"fwd": _fwd, "dgrad": _dgrad, "wgrad": _wgrad, "update": _update, "head": _head}
