"""Losses of an output and a target of the same shape, element by element, with gradients derived by hand.

``mse_loss``, ``l1_loss``, ``bce_loss``, ``bce_with_logits`` give what torch's functions of these names (the last two
are binary_cross_entropy and binary_cross_entropy_with_logits there) give; ``multiclass_nll`` is -sum_c y_c log a_c of
probabilities, which torch has for labels only. Formulas and gradients: ``fastmlp.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import reference
from ..backend import Resolved, functorch_active, resolve
from ..base.arguments import check_same_device, check_tensor
from ..base.compat import is_autocast_enabled
from ..ops.triton_ops import device_of

__all__ = ["ElementwiseLoss", "bce_loss", "bce_with_logits", "l1_loss", "mse_loss", "multiclass_nll"]

REDUCTIONS = ("none", "mean", "sum")
_TORCH: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def check_loss_arguments(input: Tensor, target: Tensor, reduction: str) -> None:
    """TypeError, ValueError or RuntimeError unless both are floating-point, alike, on one device."""
    check_tensor(input, "the input")
    check_tensor(target, "the target")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if input.shape != target.shape:
        raise ValueError(
            f"expected a target of the input's shape {list(input.shape)}, got {list(target.shape)}; use "
            "target.expand_as(input) if it should be repeated"
        )
    for name, tensor in (("input", input), ("target", target)):
        if not tensor.is_floating_point():
            raise RuntimeError(f"expected a floating-point {name}, got {tensor.dtype}; convert it with .float()")
    if input.dtype != target.dtype:
        raise RuntimeError(
            f"expected input and target of the same dtype, got {input.dtype} and {target.dtype}; convert the target "
            f"with .to({input.dtype})"
        )
    check_same_device((("the input", input), ("the target", target)))


def outside_autocast(*tensors: Tensor) -> list[Tensor]:
    """Under torch.autocast these losses are computed in float32, as torch computes its own."""
    if is_autocast_enabled(tensors[0].device.type):
        return [t.float() if t.is_floating_point() and t.itemsize < 4 else t for t in tensors]
    return list(tensors)


def wide(t: Tensor) -> Tensor:
    """16-bit values in float32, in which these losses are computed; others as they are."""
    return t.float() if t.itemsize < 4 else t


def reduced(losses: Tensor, reduction: str, count: int) -> Tensor:
    """The losses, their sum, or their sum divided by ``count``."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count


def _mean_count(a: Tensor, loss: str) -> int:
    """What the mean divides by: elements, or rows for a loss that is a sum over classes."""
    return a.numel() if loss != "nllm" else a.numel() // max(1, a.shape[-1] if a.dim() else 1)


def _scale(a: Tensor, loss: str, reduction: str) -> float:
    if reduction != "mean":
        return 1.0
    count = _mean_count(a, loss)
    return 1 / count if count else math.nan


def _rows(t: Tensor) -> Tensor:
    """[M, C] for the kernels."""
    return t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(1, -1)


class ElementwiseLoss(Function):
    """``apply(a, y, loss, reduction, backend)`` with ``loss`` a name of ``reference.ELEMENTWISE_LOSSES``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, y: Tensor, loss: str, reduction: str, backend: Resolved) -> Tensor:
        """Keep A and Y."""
        ctx.save_for_backward(a, y)
        ctx.loss, ctx.reduction, ctx.backend = loss, reduction, backend
        if backend == "triton":
            from ..kernels import elementwise_loss_fwd as launch

            scale = None if reduction == "none" else _scale(a, loss, reduction)
            with device_of(a):
                out = launch(_rows(a), _rows(y), loss, scale=scale)
            return out.view(a.shape) if reduction == "none" else out
        if loss in _TORCH:
            return _TORCH[loss](a, y, reduction=reduction)
        losses = reference.elementwise_loss(wide(a), wide(y), loss)
        return reduced(losses, reduction, _mean_count(a, loss)).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """DA = g dL/da and dY = g dL/dy, the mean's 1/count in g."""
        (g,) = grads
        a, y = ctx.saved_tensors
        need_a, need_y = ctx.needs_input_grad[:2]
        scale = _scale(a, ctx.loss, ctx.reduction)
        if torch.is_grad_enabled() or ctx.backend == "torch":
            g = wide(g) * scale
            da = (reference.elementwise_loss_grad(wide(a), wide(y), ctx.loss) * g).to(a.dtype) if need_a else None
            dy = (
                (reference.elementwise_loss_target_grad(wide(a), wide(y), ctx.loss) * g).to(y.dtype) if need_y else None
            )
            return da, dy, None, None, None
        from ..kernels import elementwise_loss_bwd as launch

        with device_of(a):
            da, dy = launch(
                _rows(g) if g.dim() else g, _rows(a), _rows(y), ctx.loss, scale=scale, want_da=need_a, want_dy=need_y
            )
        return (
            None if da is None else da.view(a.shape),
            None if dy is None else dy.view(y.shape),
            None,
            None,
            None,
        )


def _apply(input: Tensor, target: Tensor, loss: str, reduction: str) -> Tensor:
    check_loss_arguments(input, target, reduction)
    input, target = outside_autocast(input, target)
    backend = resolve(input)
    if functorch_active():
        return reduced(reference.elementwise_loss(input, target, loss), reduction, _mean_count(input, loss))
    return ElementwiseLoss.apply(input, target, loss, reduction, backend)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error (a - y)^2; gradient 2 (a - y).

    Args:
        input: any shape, floating-point.
        target: of the same shape and dtype (nothing is broadcast).
        reduction: "mean" over the elements (default), "sum", or "none".

    Returns:
        0-d, or of the input's shape for "none"; in the input's dtype.

    Differentiable in both, any number of times. Kernels on GPUs, plain torch elsewhere: see ``fastmlp.set_backend``.

    Raises:
        ValueError: shapes that differ, an unknown reduction.
        TypeError: arguments that are not tensors.
        RuntimeError: dtypes that differ or are not floating-point, two devices.
    """
    return _apply(input, target, "mse", reduction)


def l1_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Absolute error |a - y| ("linear loss"); gradient sign(a - y), 0 at 0. Arguments and errors as ``mse_loss``."""
    return _apply(input, target, "l1", reduction)


def bce_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Binary NLL of probabilities, -(y log a + (1 - y) log(1 - a)); gradient (a - y) / (a (1 - a)).

    Arguments and errors as ``mse_loss``; the logarithms are at least -100 and a (1 - a) at least 1e-12, as torch has
    it. With a sigmoid before it, ``bce_with_logits`` is faster and loses no digits.

    Raises:
        RuntimeError: on a CPU, an input outside [0, 1]. (On a GPU that gives NaN; looking would make the host wait.)
    """
    check_loss_arguments(input, target, reduction)
    if input.device.type == "cpu" and not functorch_active() and input.numel():
        low, high = (v.item() for v in torch.aminmax(input.detach()))
        if low < 0 or high > 1:
            raise RuntimeError(
                f"expected probabilities from 0 to 1, got {low:g} to {high:g}; apply torch.sigmoid, or use "
                "bce_with_logits on the values as they are"
            )
    return _apply(input, target, "bce", reduction)


def bce_with_logits(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Binary NLL of sigmoid(a) in one: max(a, 0) - a y + log(1 + e^-|a|); gradient sigmoid(a) - y.

    Arguments and errors as ``mse_loss``.
    """
    return _apply(input, target, "bce_with_logits", reduction)


def multiclass_nll(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """NLL of probabilities, -sum_c y_c log a_c over the last dimension; gradient -y / a.

    Arguments and errors as ``mse_loss``, but each sum over the last dimension is one loss: "mean" divides by their
    number, and "none" has one dimension less. y = 0 makes a term 0, whatever a is. With a softmax before it,
    ``cross_entropy`` on the logits is faster and loses no digits.

    Raises:
        ValueError: a 0-d input.
    """
    check_loss_arguments(input, target, reduction)
    if input.dim() == 0:
        raise ValueError("expected probabilities [*, classes], got a 0-d tensor")
    if reduction == "none":
        return _apply(input, target, "nllm", "none").sum(-1)
    return _apply(input, target, "nllm", reduction)
