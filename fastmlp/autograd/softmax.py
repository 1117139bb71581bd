"""Softmax as an activation, and squared error on softmax probabilities, without the softmax's Jacobian as a matrix.

p = softmax(z):   dZ = (diag(p) - p p^T) dP = p * (dP - sum_c p_c dP_c)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from ..backend import Resolved, functorch_active, resolve
from ..base.arguments import check_same_device, check_tensor
from ..ops.torch_losses import LABELS
from ..ops.triton_ops import device_of
from .elementwise import REDUCTIONS, check_loss_arguments, outside_autocast, reduced, wide

__all__ = ["Softmax", "SoftmaxSquaredError", "softmax", "softmax_squared_error"]


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
        if torch.is_grad_enabled():
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
    return torch.softmax(z, -1) if functorch_active() else Softmax.apply(z)


class SoftmaxSquaredError(Function):
    """``apply(z, target, reduction, backend)`` for Z [M, C] and labels [M] or values [M, C]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, reduction: str, backend: Resolved) -> Tensor:
        """Keep Z and the target: the probabilities are made again where they are needed, one pass over Z."""
        ctx.save_for_backward(z, target)
        ctx.reduction, ctx.backend = reduction, backend
        if backend == "triton":
            from ..kernels import softmax_squared_error_fwd as launch

            with device_of(z):
                return launch(z, target, scale=None if reduction == "none" else _scale(z, reduction))
        rows = reference.softmax_squared_error(wide(z), _values(target, wide(z)))
        return reduced(rows, reduction, len(z)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """DZ = 2 g p (d - sum_c p_c d_c) and dY = -2 g d with d = p - y."""
        (g,) = grads
        z, target = ctx.saved_tensors
        need_z, need_y = ctx.needs_input_grad[:2]
        scale = _scale(z, ctx.reduction)
        if torch.is_grad_enabled() or ctx.backend == "torch":
            y = _values(target, wide(z))
            dz, dy = reference.softmax_squared_error_backward(wide(g) * scale, wide(z), y)
            return dz.to(z.dtype) if need_z else None, dy.to(target.dtype) if need_y else None, None, None
        from ..kernels import softmax_squared_error_bwd as launch

        with device_of(z):
            dz_out, dy_out = launch(g, z, target, scale=scale, want_dz=need_z, want_dy=need_y)
        return dz_out, dy_out, None, None


def _scale(z: Tensor, reduction: str) -> float:
    return 1 / len(z) if reduction == "mean" and len(z) else 1.0


def _values(target: Tensor, z: Tensor) -> Tensor:
    """Y [M, C]: the target, or one-hot rows of labels."""
    if target.is_floating_point():
        return wide(target)
    return torch.zeros_like(z).scatter(1, target.long().unsqueeze(1), 1)


def softmax_squared_error(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """|softmax(z) - y|^2, forward and gradient each in one pass over the logits.

    Args:
        input: logits [M, C] or [C].
        target: int64 or uint8 labels [M] (or 0-d), y their one-hot rows; or values of the logits' shape and dtype.
        reduction: "mean" over the rows (default), "sum", or "none".

    Returns:
        0-d, or [M] for "none" (0-d for logits [C]); in the input's dtype.

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
        check_loss_arguments(input, target, reduction)
    else:
        _check_labels(input, target, reduction)
    input, target = outside_autocast(input, target)
    backend = resolve(input)
    z = input if input.dim() == 2 else input.unsqueeze(0)
    y = target if input.dim() == 2 else target.unsqueeze(0)
    if functorch_active():
        loss = reduced(reference.softmax_squared_error(z, _values(y, z)), reduction, len(z))
    else:
        loss = SoftmaxSquaredError.apply(z, y, reduction, backend)
    return loss.squeeze(0) if input.dim() == 1 and reduction == "none" else loss


def _check_labels(input: Tensor, target: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if not input.is_floating_point():
        raise RuntimeError(f"expected floating-point logits, got {input.dtype}; convert them with .float()")
    if target.dtype not in LABELS:
        raise RuntimeError(f"expected labels in int64 or uint8, got {target.dtype}; convert them with .long()")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"expected labels of shape {list(input.shape[:-1])} for logits {list(input.shape)}, or values of shape "
            f"{list(input.shape)} in {input.dtype}, got {list(target.shape)} in {target.dtype}"
        )
    check_same_device((("the input", input), ("the target", target)))
    if target.device.type == "cpu" and target.numel() and not functorch_active():
        low, high = (int(v) for v in torch.aminmax(target))
        if low < 0 or high >= input.shape[-1]:
            raise IndexError(f"expected labels from 0 to {input.shape[-1] - 1}, got {low} to {high}")
