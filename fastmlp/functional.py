"""Differentiable fused operations as functions; ``fastmlp.nn`` has the same as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference
from .autograd.elementwise import bce_loss, bce_with_logits, huber_loss, l1_loss, mse_loss, multiclass_nll
from .autograd.linear import LinearAct, MLPFunction
from .autograd.softmax import softmax, softmax_squared_error
from .autograd.transforms import transformed
from .backend import on_tape, runs
from .base.arguments import (
    check_activation,
    check_batch,
    check_input,
    check_layer,
    check_members,
    check_members_input,
    check_network,
    check_tensor,
)
from .base.compat import is_autocast_enabled
from .losses import cross_entropy

__all__ = [
    "bce_loss",
    "bce_with_logits",
    "cross_entropy",
    "huber_loss",
    "l1_loss",
    "linear_act",
    "mlp",
    "mse_loss",
    "multiclass_nll",
    "softmax",
    "softmax_squared_error",
]

for _name in __all__:
    torch.fx.wrap(_name)  # a call is one node of a graph of torch.fx.symbolic_trace


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks matrix products on x's device to run in, or None outside autocast."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if is_autocast_enabled(device_type) else None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Under autocast every floating-point operand but float64 takes the autocast dtype."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """A = f(x W^T + b): linear layer and activation in one kernel, gradients derived by hand.

    Args:
        x: [*, in_features], of weight's dtype, or uint8 pixels, which are scaled by 1/255 inside the kernel.
        weight: [out_features, in_features], as torch.nn.functional.linear's; any strides.
        bias: [out_features] or None.
        activation: a name of ``fastmlp.activations.LAYER_ACTIVATIONS``: "identity" (default), another elementwise one,
            or "softmax" over the features, which is a pass of its own after the kernel.

    Returns:
        [*, out_features] in weight's dtype (in the autocast dtype under torch.autocast).

    Differentiable with respect to x, weight and bias, twice with ``create_graph=True``. The kernels run on CUDA and
    HIP tensors in float32 (multiplied as ``torch.backends.cuda.matmul.fp32_precision`` says), float16 and bfloat16.
    Elsewhere plain torch runs: see ``fastmlp.set_backend``. Inside the transforms of torch.func (vmap, grad, jvp, ...),
    for inputs with tangents (``torch.autograd.forward_ad``) and in batched backward passes (``is_grads_batched=True``,
    ``vectorize=True``), the formula runs as plain torch operations, which can be transformed.

    torch.compile and torch.export take the call into one graph for all batch sizes. The graph has torch's own
    operations on plain torch, and operators of ``fastmlp.library`` where the kernels run. A compiled call has first
    derivatives only. Subclasses of Tensor with operations of their own, such as DTensor and quantized weights, run on
    plain torch on every backend.

    torch.jit and torch.fx are not supported beyond this. torch.jit.trace records plain torch operations, and warns of
    our checks of shapes. torch.jit.script compiles what ``MLP.to_torch`` returns, but no single layer or loss.
    torch.fx.symbolic_trace takes a call as one node. Use torch.export, or trace ``MLP.to_torch()``.

    Raises:
        ValueError: unknown activation.
        TypeError: arguments that are not tensors.
        RuntimeError: shapes, dtypes or devices that do not fit, as torch.nn.functional.linear. Forward-mode derivatives
            on backend "triton" or under torch.inference_mode.
    """
    check_activation(activation)
    if activation == "softmax":
        return softmax(linear_act(x, weight, bias))
    check_tensor(x, "the input")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)  # type: ignore[assignment]
    check_layer(weight, bias)
    check_input(x, weight)
    backend = runs(weight.dtype, x, weight, bias)
    if backend == "formula" or transformed(x, weight, bias):
        return reference.linear_act(x, weight, bias, activation)
    # One row per sample. reshape(-1, K) cannot infer the number of rows when K is 0.
    x2d = x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    if torch.is_grad_enabled() and (_needs_grad(x) or _needs_grad(weight) or _needs_grad(bias)) and on_tape(backend):
        a, _ = LinearAct.apply(x2d, weight, bias, activation, backend)
    else:
        a, _ = ops.on(backend).linear_fwd(x2d, weight, bias, activation)
    return a if x.dim() == 2 else a.view(*x.shape[:-1], weight.shape[0])


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    members: int | None = None,
) -> Tensor:
    """A whole multilayer perceptron as one node of the tape: A_l = f_l(A_{l-1} W_l^T + b_l), A_0 = x.

    Args:
        x: [B, in_features] of the weights' dtype, or uint8 pixels, or [B, ...], flattened from dimension 1.
        weights: L tensors [n_l, n_{l-1}].
        biases: L tensors [n_l], or None for a layer without one.
        activations: L names as in ``linear_act``; the last one is usually "identity" (logits). A new node of the tape
            begins after a softmax.
        members: None for one network, or the number E of networks of one shape, whose weights are [E, n_l, n_{l-1}] and
            biases [E, n_l]. Then x is [B, in_features], the same for all members, or [E, B, in_features].

    Returns:
        A_L [B, n_L], or [E, B, n_L].

    Gradients, backends and errors as ``linear_act``. In the backward pass the derivative of each layer's activation is
    part of the matrix product above the layer. Layers below the lowest one that needs a gradient cost nothing.

    Raises:
        ValueError: no layers, or not as many weights as biases and activations.
    """
    for activation in activations:
        check_activation(activation)
    check_tensor(x, "the input")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x = _cast(x, dtype)  # type: ignore[assignment]
        weights = [_cast(w, dtype) for w in weights]  # type: ignore[misc]
        biases = [_cast(b, dtype) for b in biases]
    if members is None:
        check_network(weights, biases, activations)
        check_batch(x, weights[0].shape[1])
        x = x.flatten(1) if x.dim() > 2 else x
        check_input(x, weights[0], "weights[0]")
    else:
        check_members(weights, biases, activations, members)
        check_members_input(x, weights[0])
    if "softmax" in activations:
        end = list(activations).index("softmax") + 1
        a = softmax(mlp(x, weights[:end], biases[:end], [*activations[: end - 1], "identity"], members))
        return a if end == len(weights) else mlp(a, weights[end:], biases[end:], activations[end:], members)
    backend = runs(weights[0].dtype, x, *weights, *biases)
    if backend == "formula" or transformed(x, *weights, *biases):
        return reference.mlp(x, weights, biases, activations)
    if members is not None:
        backend = "members" if backend == "torch" else backend
        if x.requires_grad and x.dim() == 2:
            x = x.expand(members, -1, -1)  # whose derivative is the sum over the members
    # Layers below the lowest one that needs a gradient run off the tape and leave nothing behind.
    first = 0
    if not (torch.is_grad_enabled() and on_tape(backend)):
        first = len(weights)
    elif not x.requires_grad:
        while first < len(weights) and not (_needs_grad(weights[first]) or _needs_grad(biases[first])):
            first += 1
    if first:
        for w, b, activation in zip(weights[:first], biases[:first], activations[:first], strict=True):
            x, _ = ops.on(backend).linear_fwd(x, w, b, activation)
        if first == len(weights):
            return x
    params = [p for pair in zip(weights[first:], biases[first:], strict=True) for p in pair]
    a, *_ = MLPFunction.apply(x, tuple(activations[first:]), backend, *params)
    return a
