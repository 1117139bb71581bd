"""The fused operations as launches of the Triton kernels; the torch twin is ``fastmlp.ops.torch_ops``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["activation_bwd", "device_of", "linear_dgrad", "linear_fwd", "linear_wgrad"]


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
