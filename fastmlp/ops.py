"""The fused operations without autograd: each sends its tensors to the Triton kernel or to plain torch.

While torch.compile traces, the kernels are the operators of ``fastmlp.library``.

``backend`` is what ``fastmlp.backend.resolve`` returned for the operation's input. A backward pass is given the
backend of its forward pass, because it runs on another thread and possibly outside the ``use_backend`` block.
Arguments were validated by the callers in ``fastmlp.functional``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import library, torch_backend
from .backend import Resolved

__all__ = ["activation_bwd", "linear_dgrad", "linear_fwd", "linear_wgrad"]


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, torch operations on their tensors': make them the same."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _dense(saved: Tensor | None) -> Tensor | None:
    """The kernels address a saved tensor as contiguous; saved_tensors_hooks may have returned any strides."""
    return None if saved is None else saved.contiguous()


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, save_z: bool, backend: Resolved
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b)."""
    if backend == "torch":
        return torch_backend.linear_fwd(x, weight, bias, activation, save_z=save_z)
    if torch.compiler.is_compiling():
        a, z = library.linear_fwd(x, weight, bias, activation, save_z)
        return a, z if save_z else None
    from .kernels import linear_fwd as launch

    with _device_of(x):
        return launch(x, weight, bias, activation, save_z=save_z)


def linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str, *, backend: Resolved) -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below and ``saved`` what its derivative needs."""
    if backend == "torch":
        return torch_backend.linear_dgrad(dz, weight, saved, activation)
    if torch.compiler.is_compiling():
        return library.linear_dgrad(dz, weight, saved, activation)
    from .kernels import linear_dgrad as launch

    with _device_of(dz):
        return launch(dz, weight, _dense(saved), activation)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool, backend: Resolved) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None) of a linear layer with input X."""
    if backend == "torch":
        return torch_backend.linear_wgrad(dz, x, bias=bias)
    if torch.compiler.is_compiling():
        dw, db = library.linear_wgrad(dz, x, bias)
        return dw, db if bias else None
    from .kernels import linear_wgrad as launch

    with _device_of(dz):
        return launch(dz, x, bias=bias)


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str, *, backend: Resolved) -> Tensor:
    """DZ = dA * f'."""
    if activation == "identity":
        return da
    if backend == "torch":
        return torch_backend.activation_bwd(da, saved, activation)
    if torch.compiler.is_compiling():
        return library.activation_bwd(da, saved, activation)
    from .kernels import activation_bwd as launch

    with _device_of(da):
        return launch(da, _dense(saved), activation)
