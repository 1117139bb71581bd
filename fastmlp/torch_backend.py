"""The fused operations on plain torch, for CPUs and for dtypes that the kernels do not compute in.

The same formulas as the kernels, in place wherever a buffer is ours, and never on the autograd tape: callers run
them inside torch.autograd.Function. ``fastmlp.reference`` has the same operations written for reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_products
from .activations import LEAKY_SLOPE
from .cpu_gemm import EPILOGUES

__all__ = ["activation_bwd", "linear_dgrad", "linear_fwd", "linear_wgrad"]


def _scaled(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    return pixels.to(dtype).div_(255)


def _activate(z: Tensor, activation: str, *, keep_z: bool) -> Tensor:
    """f(Z), in place where torch can, unless Z must be kept. (``torch_products.linear`` applies sigmoid, relu and tanh
    itself otherwise.)
    """
    match activation:
        case "identity":
            return z
        case "sigmoid":
            return torch.sigmoid(z)
        case "relu":
            return torch.relu(z)
        case "tanh":
            return torch.tanh(z)
        case "step":
            return (z >= 0).to(z.dtype)
        case "leaky_relu":
            return torch.nn.functional.leaky_relu(z, LEAKY_SLOPE, inplace=not keep_z)
        case "gelu":
            return torch.nn.functional.gelu(z)
        case _:
            return torch.nn.functional.silu(z, inplace=not keep_z)


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, save_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b); X [M, K], W [N, K], b [N]."""
    if x.dtype == torch.uint8:
        x = _scaled(x, weight.dtype)
    if not save_z and activation in EPILOGUES:
        return torch_products.linear(x, weight, bias, activation), None
    z = torch_products.linear(x, weight, bias, "identity")
    return _activate(z, activation, keep_z=save_z), z if save_z else None


#: The overloads by name: torch would look for the one with ``grad_input`` three times as long as it takes to run.
_BACKWARD = {
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
    "relu": torch.ops.aten.threshold_backward,
    "leaky_relu": torch.ops.aten.leaky_relu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "silu": torch.ops.aten.silu_backward,
}
_NEW = {name: packet.default for name, packet in _BACKWARD.items()}
_INPLACE = {name: packet.grad_input for name, packet in _BACKWARD.items()}
#: What the operators take after (dA, saved): relu's threshold; leaky_relu's slope, and that ``saved`` is the output.
_SETTINGS: dict[str, tuple[object, ...]] = {"relu": (0,), "leaky_relu": (LEAKY_SLOPE, True)}


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str, *, inplace: bool = False) -> Tensor:
    """DZ = dA * f'; ``saved`` is A, Z for gelu and silu, or None. ``inplace`` may overwrite dA."""
    if activation == "identity":
        return da
    if activation == "step":
        return da.zero_() if inplace else torch.zeros_like(da, memory_format=torch.contiguous_format)
    settings = _SETTINGS.get(activation, ())
    if inplace:
        return _INPLACE[activation](da, saved, *settings, grad_input=da)
    return _NEW[activation](da, saved, *settings)


def linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None = None, activation: str = "identity") -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below."""
    da = torch_products.dgrad(dz, weight)
    return da if activation == "identity" else activation_bwd(da, saved, activation, inplace=True)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None): dW = dZ^T X, db = sum over the batch of dZ."""
    if x.dtype == torch.uint8:
        x = _scaled(x, dz.dtype)
    return torch_products.wgrad(dz, x), dz.sum(0) if bias else None
