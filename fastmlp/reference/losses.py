"""The elementwise losses and squared error on softmax probabilities in plain torch: formulas to read.

As in ``fastmlp.reference.linear``, the formulas use differentiable torch operations only. Tests call them in float64,
and second derivatives in the working dtype. A is a network's output and Y its target, of the same shape. The caller
reduces.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base.losses import LOSSES

#: mse (A - Y)^2, l1 |A - Y|, huber: (A - Y)^2 / 2 near 0, binary_cross_entropy: NLL of probabilities, bce_with_logits:
#: NLL of sigmoid(A), nllm: -Y log A.
ELEMENTWISE_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.kernel == "elementwise_loss")
#: torch's lower bounds for probabilities of exactly 0 or 1: of the logarithms, and of a (1 - a) in the gradient.
LOG_MIN, VARIANCE_MIN = -100.0, 1e-12


def _unknown(loss: str) -> ValueError:
    return ValueError(f"unknown loss {loss!r}; expected one of {', '.join(ELEMENTWISE_LOSSES)}")


def _where_counted(a: Tensor, y: Tensor) -> Tensor:
    """A of ``nllm``, but 1 where the term of y = 0 would not be 0. Other terms of y = 0 keep their derivatives in y."""
    return torch.where((y == 0) & ~((a > 0) & (a < math.inf)), 1.0, a)


def elementwise_loss(a: Tensor, y: Tensor, loss: str, delta: float = 1.0) -> Tensor:
    """The loss of every element; huber is squared to a distance of ``delta`` and absolute beyond."""
    match loss:
        case "mse":
            return (a - y) ** 2
        case "l1":
            return (a - y).abs()
        case "huber":
            near = (a - y).clamp(-delta, delta)
            return near * (a - y - near / 2)
        case "binary_cross_entropy":
            return torch.nn.functional.binary_cross_entropy(a, y, reduction="none")
        case "bce_with_logits":
            # Two terms of one sign: no digits cancel, and the derivative at 0 is sigmoid(0) - y.
            logsigmoid = torch.nn.functional.logsigmoid
            return -y * logsigmoid(a) - (1 - y) * logsigmoid(-a)
        case "nllm":
            return -y * torch.log(_where_counted(a, y))
    raise _unknown(loss)


def elementwise_loss_grad(a: Tensor, y: Tensor, loss: str, delta: float = 1.0) -> Tensor:
    """dL/dA of every element; 0, torch's value, at the kink of l1."""
    match loss:
        case "mse":
            return 2 * (a - y)
        case "l1":
            return torch.sign(a - y)
        case "huber":
            return (a - y).clamp(-delta, delta)
        case "binary_cross_entropy":
            return (a - y) / (a * (1 - a)).clamp_min(VARIANCE_MIN)
        case "bce_with_logits":
            return torch.sigmoid(a) - y
        case "nllm":
            return -y / _where_counted(a, y)
    raise _unknown(loss)


def elementwise_loss_target_grad(a: Tensor, y: Tensor, loss: str, delta: float = 1.0) -> Tensor:
    """dL/dY of every element."""
    match loss:
        case "mse" | "l1" | "huber":
            return -elementwise_loss_grad(a, y, loss, delta)
        case "binary_cross_entropy":
            return torch.log1p(-a).clamp_min(LOG_MIN) - torch.log(a).clamp_min(LOG_MIN)
        case "bce_with_logits":
            return -a
        case "nllm":
            return -torch.log(a)
    raise _unknown(loss)


def softmax_backward(dp: Tensor, p: Tensor) -> Tensor:
    """dZ = (diag(p) - p p^T) dP = p * (dP - sum_c dP_c p_c) for p = softmax(Z) over the last dimension.

    The Jacobian of softmax is diagonal plus rank one, so its product needs no matrix.
    """
    return p * (dp - (dp * p).sum(-1, keepdim=True))


def softmax_squared_error(z: Tensor, y: Tensor) -> Tensor:
    """|softmax(z) - y|^2 of each row; Z and Y [M, C]."""
    return ((torch.softmax(z, 1) - y) ** 2).sum(1)


def softmax_squared_error_backward(dloss: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(dZ, dY) of ``softmax_squared_error`` for the upstream gradient [M] of its rows, or 0-d for all of them."""
    p = torch.softmax(z, 1)
    dp = 2 * (dloss.unsqueeze(1) if dloss.dim() else dloss) * (p - y)
    return softmax_backward(dp, p), -dp
