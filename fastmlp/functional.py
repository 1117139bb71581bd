"""Differentiable fused operations as functions; ``fastmlp.nn`` has the same as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .autograd import LinearAct, MLPFunction
from .backend import resolve
from .checks import check_activation, check_linear

__all__ = ["linear_act", "mlp"]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks matrix products on x's device to run in, or None outside autocast."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Under autocast every floating-point operand but float64 takes the autocast dtype."""
    if tensor is None or dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """A = f(x W^T + b): linear layer and activation in one kernel, gradients derived by hand.

    Args:
        x: [*, in_features], of weight's dtype, or uint8 pixels, which are scaled by 1/255 inside the kernel.
        weight: [out_features, in_features], as torch.nn.functional.linear's; any strides.
        bias: [out_features] or None.
        activation: identity, sigmoid, relu, tanh, step, leaky_relu (slope 0.01), gelu (exact) or silu.

    Returns:
        [*, out_features] in weight's dtype (in the autocast dtype under torch.autocast).

    Differentiable with respect to x, weight and bias, twice with ``create_graph=True``. The kernels run on CUDA and
    HIP tensors in float32 (multiplied as ``torch.get_float32_matmul_precision`` says), float16 and bfloat16, plain
    torch runs elsewhere: see ``fastmlp.set_backend``.

    Raises:
        ValueError: unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit, as torch.nn.functional.linear.
    """
    check_activation(activation)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)  # type: ignore[assignment]
    check_linear(x, weight, bias)
    backend = resolve(x, weight.dtype)
    x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if _needs_grad(x, weight, bias):
        a = LinearAct.apply(x2d, weight, bias, activation, backend)
    else:
        a, _ = ops.linear_fwd(x2d, weight, bias, activation, save_z=False, backend=backend)
    return a if x.dim() == 2 else a.view(*x.shape[:-1], weight.shape[0])


def mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]) -> Tensor:
    """A whole multilayer perceptron as one node of the tape: A_l = f_l(A_{l-1} W_l^T + b_l), A_0 = x.

    Args:
        x: [B, in_features] of the weights' dtype, or uint8 pixels, or [B, ...], flattened from dimension 1.
        weights: L tensors [n_l, n_{l-1}].
        biases: L tensors [n_l], or None for a layer without one.
        activations: L names as in ``linear_act``; the last one is usually "identity" (logits).

    Returns:
        A_L [B, n_L].

    Gradients, backends and errors as ``linear_act``. Within the backward pass the derivative of each layer's
    activation is part of the matrix product above it, and layers below the lowest one that needs a gradient cost
    nothing.
    """
    for activation in activations:
        check_activation(activation)
    if not len(weights) == len(biases) == len(activations) or not weights:
        raise ValueError(
            f"expected as many weights as biases and activations, at least one of each, got {len(weights)} weights, "
            f"{len(biases)} biases and {len(activations)} activations"
        )
    if x.dim() < 2:
        raise RuntimeError(
            f"expected an input of shape [batch, {weights[0].shape[-1]}] or [batch, ...], got {list(x.shape)}; "
            "add a batch dimension with x.unsqueeze(0)"
        )
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x = _cast(x, dtype)  # type: ignore[assignment]
        weights = [_cast(w, dtype) for w in weights]  # type: ignore[misc]
        biases = [_cast(b, dtype) for b in biases]
    x = x.flatten(1) if x.dim() > 2 else x
    check_linear(x, weights[0], biases[0])
    for layer in range(1, len(weights)):
        check_linear(weights[layer - 1].t(), weights[layer], biases[layer])
    backend = resolve(x, weights[0].dtype)
    if _needs_grad(x, *weights, *biases):
        params = [p for pair in zip(weights, biases, strict=True) for p in pair]
        return MLPFunction.apply(x, tuple(activations), backend, *params)
    for w, b, activation in zip(weights, biases, activations, strict=True):
        x, _ = ops.linear_fwd(x, w, b, activation, save_z=False, backend=backend)
    return x
