"""Softmax as an activation, and squared error on softmax probabilities, without the softmax's Jacobian as a matrix.

p = softmax(z):   dZ = (diag(p) - p p^T) dP = p * (dP - sum_c p_c dP_c)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..backend import has_values, traced
from ..base.arguments import check_class_target, check_classes, check_tensor, check_values
from .elementwise import apply_loss
from .transforms import differentiable, transformed


class Softmax(Function):
    """``apply(z)``: softmax over the last dimension; keeps the probabilities."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """P, stable for any finite Z: the row's maximum is subtracted first."""
        p = torch.softmax(z, -1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """DZ = p * (dP - sum_c p_c dP_c); P is this node's output, so that it differentiates again."""
        (dp,) = grads
        (p,) = ctx.saved_tensors
        if differentiable(dp):
            return reference.softmax_backward(dp, p)
        return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)


def softmax(z: Tensor) -> Tensor:
    """exp(z_c) / sum_k exp(z_k) over the last dimension; [*, C] to [*, C], differentiable any number of times.

    Raises:
        TypeError: not a tensor.
        RuntimeError: not floating-point, or 0-d.
    """
    check_tensor(z, "the input")
    if not z.is_floating_point() or z.dim() == 0:
        raise RuntimeError(f"expected floating-point values [*, classes], got {z.dtype} {list(z.shape)}")
    return torch.softmax(z, -1) if transformed(z) or traced(z) else Softmax.apply(z)


def softmax_squared_error(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """|softmax(z) - y|^2, forward and gradient each in one pass over the logits.

    Args:
        input: logits [M, C] or [C].
        target: int64 or uint8 labels [M] (or 0-d), y their one-hot rows; or values of the logits' shape.
        reduction: "mean" over the rows (default), "sum", or "none".

    Returns:
        0-d, or [M] for "none" (0-d for logits [C]); in the promoted dtype of logits and values.

    Differentiable in the logits and in a target of values, any number of times. Kernels on GPUs, plain torch
    elsewhere: see ``fastmlp.set_backend``.

    Raises:
        TypeError: arguments that are not tensors.
        ValueError: shapes that do not fit, an unknown reduction.
        RuntimeError: dtypes or devices that do not fit.
        IndexError: on a CPU, a label outside [0, C). (On a GPU it makes its row NaN; looking would make the host wait.)
    """
    check_tensor(input, "the input")
    check_tensor(target, "the target")
    if input.dim() not in (1, 2):
        raise ValueError(f"expected logits [M, C] or [C], got {list(input.shape)}")
    if target.is_floating_point():
        check_values(input, target, reduction)
    else:
        check_class_target(input, target, reduction)
        if target.device.type == "cpu" and has_values(target) and target.numel():
            check_classes(target, input.shape[-1])
    if input.dim() == 2:
        return apply_loss(input, target, "softmax_squared_error", reduction)
    loss = apply_loss(input.unsqueeze(0), target.unsqueeze(0), "softmax_squared_error", reduction)
    return loss.squeeze(0) if reduction == "none" else loss
