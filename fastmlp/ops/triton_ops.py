"""The fused operations as launches of the Triton kernels; the torch twin is ``fastmlp.ops.torch_ops``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..base.losses import LOSSES
from .torch_losses import Gradients, Rows, Settings, mean_factor


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, torch operations on their tensors': make them the same."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _dense(saved: Tensor | None) -> Tensor | None:
    """The kernels address a saved tensor as contiguous; saved_tensors_hooks may have returned any strides."""
    return None if saved is None else saved.contiguous()


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, save_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b); X [M, K], W [N, K], b [N]."""
    from ..kernels import linear_fwd as launch

    with device_of(x):
        return launch(x, weight, bias, activation, save_z=save_z)


def linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None = None, activation: str = "identity") -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below and ``saved`` what its derivative needs."""
    from ..kernels import linear_dgrad as launch

    with device_of(dz):
        return launch(dz, weight, _dense(saved), activation)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None) of a linear layer with input X."""
    from ..kernels import linear_wgrad as launch

    with device_of(dz):
        return launch(dz, x, bias=bias)


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DZ = dA * f'."""
    if activation == "identity":
        return da
    from ..kernels import activation_bwd as launch

    with device_of(da):
        return launch(da, _dense(saved), activation)


def cross_entropy_fwd(
    z: Tensor, target: Tensor, weight: Tensor | None, s: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, maximum and sum of exponentials of each row, denominator of the mean or None)."""
    from ..kernels import cross_entropy_fwd as launch

    options = {"ignore_index": s.ignore_index, "smoothing": s.smoothing}
    with device_of(z):
        return launch(z, target, weight=weight, reduction=s.reduction, dtype=s.dtype, **options)


def cross_entropy_bwd(dloss: Tensor, rows: Rows, s: Settings, want: Sequence[bool]) -> Gradients:
    """(dZ, dTarget)."""
    from ..kernels import cross_entropy_bwd as launch

    z, target, weight, kept, denominator = rows
    options = {"weight": weight, "ignore_index": s.ignore_index, "smoothing": s.smoothing, "denominator": denominator}
    with device_of(z):
        return launch(dloss, z, target, kept.contiguous(), want_dz=want[0], want_dt=want[1], **options)


def _rows(t: Tensor) -> Tensor:
    """[M, C] for the kernels."""
    return t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(1, -1)


def loss_fwd(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    """A loss other than cross-entropy, in a's dtype."""
    scale = None if reduction == "none" else mean_factor(loss, a, reduction)
    with device_of(a):
        if LOSSES[loss].kernel == "softmax_squared_error":
            from ..kernels import softmax_squared_error_fwd

            return softmax_squared_error_fwd(a, y, scale=scale)
        from ..kernels import elementwise_loss_fwd

        out = elementwise_loss_fwd(_rows(a), _rows(y), loss, scale=scale, delta=delta)
    return out.view(a.shape) if reduction == "none" else out


def loss_bwd(
    g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want: Sequence[bool], delta: float = 1.0
) -> Gradients:
    """(dA, dY) for the upstream gradient of ``loss_fwd``."""
    scale = mean_factor(loss, a, reduction)
    with device_of(a):
        if LOSSES[loss].kernel == "softmax_squared_error":
            from ..kernels import softmax_squared_error_bwd

            return softmax_squared_error_bwd(g, a, y, scale=scale, want_dz=want[0], want_dy=want[1])
        from ..kernels import elementwise_loss_bwd

        rows = (_rows(g) if g.dim() else g, _rows(a), _rows(y))
        da, dy = elementwise_loss_bwd(*rows, loss, scale=scale, delta=delta, want_da=want[0], want_dy=want[1])
    return None if da is None else da.view(a.shape), None if dy is None else dy.view(y.shape)
