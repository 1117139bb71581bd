"""The fused operations as launches of the Triton kernels; the torch twin is ``fastmlp.ops.torch_ops``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..base.dropout import Dropout
from ..base.losses import LOSSES
from ..base.signature import Signature
from .torch_losses import Gradients, Rows, Settings, mean_factor

_AS_IT_IS = nullcontext()


@functools.cache
def _kernels() -> ModuleType:
    """``fastmlp.kernels``, imported at the first launch, since triton may not be installed."""
    from .. import kernels

    return kernels


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, torch operations on their tensors': make them the same."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _AS_IT_IS


def _dense(saved: Tensor | None) -> Tensor | None:
    """The kernels address a saved tensor as contiguous; saved_tensors_hooks may have returned any strides."""
    return None if saved is None else saved.contiguous()


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
    with device_of(x):
        drops = dropout and dropout[:4]
        return _kernels().linear_fwd(x, weight, bias, activation, save_z=save_z, dropout=drops)


def linear_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None = None,
    activation: str = "identity",
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below and ``saved`` what its derivative needs.

    ``dropout`` is that of the layer below. A ``saved`` A is that layer's output after dropout.
    """
    with device_of(dz):
        return _kernels().linear_dgrad(dz, weight, _dense(saved), activation, dropout=dropout and dropout[:4])


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None) of a linear layer with input X."""
    with device_of(dz):
        return _kernels().linear_wgrad(dz, x, bias=bias)


def network_fwd(
    x: Tensor,
    params: Sequence[Tensor | None],
    activations: tuple[str, ...],
    saves_z: tuple[bool, ...],
    known: Signature | None = None,
    drops: Sequence[Dropout | None] = (),
) -> Sequence[Tensor] | None:
    """A_1, Z_1 if saved, A_2, ... of W_1, b_1, W_2, ...; None where the layers have to be computed one by one.

    ``drops`` is the dropout of each layer's output, with one state; empty: there is none.
    """
    with device_of(x):
        return _kernels().network_fwd(x, params, activations, saves_z, known, **_drawn(drops))


def are_grouped(x: Tensor) -> bool:
    """Whether all layers are launched together for the rows of X, if nothing is kept for a backward pass."""
    return x.shape[-2] <= _kernels().network.GROUPED_ROWS


def network_bwd(
    dz: Tensor,
    tensors: Sequence[Tensor | None],
    activations: tuple[str, ...],
    kinds: tuple[str | None, ...],
    wanted: tuple[bool, ...],
    drops: Sequence[Dropout | None] = (),
) -> Sequence[Tensor] | None:
    """The wanted gradients of X, W_1, b_1, W_2, ... and more; None where the layers have to be computed one by one.

    ``tensors`` are A_0 to A_L, W_1 to W_L and Z_1 to Z_L, and ``kinds`` says what every f' is computed from. ``drops``
    is as in the forward pass; the caller applies the last layer's dropout.
    """
    with device_of(dz):
        return _kernels().network_bwd(dz, tensors, activations, kinds, wanted, **_drawn(drops))


def _drawn(drops: Sequence[Dropout | None]) -> dict[str, Any]:
    """The argument of the kernels; no argument without dropout."""
    state = next((d.state for d in drops if d is not None), None)
    return {} if state is None else {"drops": (state, tuple([d and d[1:4] for d in drops]))}


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str, *, dropout: Dropout | None = None) -> Tensor:
    """DZ = dA * f'."""
    if activation == "identity" and dropout is None:
        return da
    with device_of(da):
        return _kernels().activation_bwd(da, _dense(saved), activation, dropout=dropout and dropout[:4])


def cross_entropy_fwd(
    z: Tensor, target: Tensor, weight: Tensor | None, s: Settings, known: Signature | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, maximum and sum of exponentials of each row, denominator of the mean or None)."""
    reduction, ignore_index, smoothing, dtype, _ = s
    with device_of(z):
        return _kernels().cross_entropy_fwd(
            z, target, weight=weight, ignore_index=ignore_index, smoothing=smoothing, reduction=reduction, dtype=dtype,
            known=known,
        )  # fmt: skip


def cross_entropy_bwd(dloss: Tensor, rows: Rows, s: Settings, want: Sequence[bool]) -> Gradients:
    """(dZ, dTarget)."""
    z, target, weight, kept, denominator = rows
    want_dz, want_dt = want
    with device_of(z):
        return _kernels().cross_entropy_bwd(
            dloss, z, target, kept.contiguous(), weight=weight, ignore_index=s.ignore_index, smoothing=s.smoothing,
            denominator=denominator, want_dz=want_dz, want_dt=want_dt,
        )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """[M, C] for the kernels."""
    # reshape(-1, C) cannot infer the number of rows when C is 0.
    return t.flatten(0, -2) if t.dim() > 1 else t.reshape(1, -1)


def loss_fwd(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    """A loss other than cross-entropy, in a's dtype."""
    scale = None if reduction == "none" else mean_factor(loss, a, reduction)
    with device_of(a):
        if LOSSES[loss].kernel == "softmax_squared_error":
            return _kernels().softmax_squared_error_fwd(a, y, scale=scale)
        out = _kernels().elementwise_loss_fwd(_rows(a), _rows(y), loss, scale=scale, delta=delta)
    return out.view(a.shape) if reduction == "none" else out


def loss_bwd(
    g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want: Sequence[bool], delta: float = 1.0
) -> Gradients:
    """(dA, dY) for the upstream gradient of ``loss_fwd``."""
    scale = mean_factor(loss, a, reduction)
    with device_of(a):
        if LOSSES[loss].kernel == "softmax_squared_error":
            return _kernels().softmax_squared_error_bwd(g, a, y, scale=scale, want_dz=want[0], want_dy=want[1])
        rows = (_rows(g) if g.dim() else g, _rows(a), _rows(y))
        da, dy = _kernels().elementwise_loss_bwd(
            *rows, loss, scale=scale, delta=delta, want_da=want[0], want_dy=want[1]
        )
    return None if da is None else da.view(a.shape), None if dy is None else dy.view(y.shape)
