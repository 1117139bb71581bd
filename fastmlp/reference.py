"""Plain-torch twins of every fused operation: the oracle of the tests and the baseline of the benchmarks.

Nothing here is fast, fused or clever. Each function is one formula, in the notation of the whole project
(M batch, K inputs, N outputs; X [M, K], W [N, K], b [N], Z and A [M, N]), made of differentiable torch
operations only, so that autograd can differentiate it once or twice. The tests call these functions in
float64; ``fastmlp`` itself calls them in the working dtype where torch must see every operation (second derivatives,
the transforms of torch.func).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS, LEAKY_SLOPE

__all__ = [
    "activate",
    "activation_grad",
    "activation_grad_from_output",
    "linear_act",
    "linear_act_backward",
    "linear_dgrad",
    "linear_wgrad",
    "mlp",
    "mlp_backward",
    "pixels",
]


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input as the first layer sees it: uint8 pixels become ``x / 255`` in ``dtype``, all else is unchanged."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x


def activate(z: Tensor, activation: str) -> Tensor:
    """A = f(Z), elementwise."""
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
            return torch.nn.functional.leaky_relu(z, LEAKY_SLOPE)
        case "gelu":
            return torch.nn.functional.gelu(z)
        case "silu":
            return torch.nn.functional.silu(z)
    raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def activation_grad(z: Tensor, activation: str) -> Tensor:
    """f'(Z), elementwise, from the pre-activation; at the kinks of relu and leaky_relu torch's value."""
    match activation:
        case "identity":
            return torch.ones_like(z)
        case "sigmoid":
            s = torch.sigmoid(z)
            return s * (1 - s)
        case "relu":
            return (z > 0).to(z.dtype)
        case "tanh":
            return 1 - torch.tanh(z) ** 2
        case "step":
            return torch.zeros_like(z)
        case "leaky_relu":
            return torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE)
        case "gelu":
            cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            return cdf + z * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
    raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def activation_grad_from_output(a: Tensor, activation: str) -> Tensor:
    """f'(Z) from the output A, for the activations whose output determines it."""
    match activation:
        case "sigmoid":
            return a * (1 - a)
        case "tanh":
            return 1 - a**2
        case "relu":
            return (a > 0).to(a.dtype)
        case "leaky_relu":
            return torch.where(a > 0, torch.ones_like(a), LEAKY_SLOPE)
    raise ValueError(f"the derivative of {activation!r} is not a function of its output")


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """A = f(X W^T + b)."""
    z = pixels(x, weight.dtype) @ weight.t()
    return activate(z if bias is None else z + bias, activation)


def linear_dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dX = dZ W."""
    return dz @ weight


def linear_wgrad(dz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """DW = dZ^T X and db = sum over the batch of dZ."""
    return dz.t() @ pixels(x, dz.dtype), dz.sum(0)


def linear_act_backward(
    da: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of ``linear_act`` for the upstream gradient dA: dZ = dA * f'(Z), then the two products."""
    z = linear_act(x, weight, bias)
    dz = da * activation_grad(z, activation)
    return linear_dgrad(dz, weight), *linear_wgrad(dz, x)


def mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]) -> Tensor:
    """The whole network: A_l = f_l(A_{l-1} W_l^T + b_l), A_0 = X; returns A_L."""
    a = pixels(x, weights[0].dtype)
    for w, b, activation in zip(weights, biases, activations, strict=True):
        a = linear_act(a, w, b, activation)
    return a


def mlp_backward(
    da: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dX, [dW_l], [db_l]) of ``mlp`` for the upstream gradient dA of its output."""
    inputs = [pixels(x, weights[0].dtype)]
    for w, b, activation in zip(weights[:-1], biases[:-1], activations[:-1], strict=True):
        inputs.append(linear_act(inputs[-1], w, b, activation))
    dws: list[Tensor] = []
    dbs: list[Tensor] = []
    for a, w, b, activation in reversed(list(zip(inputs, weights, biases, activations, strict=True))):
        da, dw, db = linear_act_backward(da, a, w, b, activation)
        dws.insert(0, dw)
        dbs.insert(0, db)
    return da, dws, dbs
