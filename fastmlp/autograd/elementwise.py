"""Losses of an output and a target of the same shape, element by element, with gradients derived by hand.

``mse_loss``, ``l1_loss``, ``huber_loss``, ``bce_loss``, ``bce_with_logits`` give what torch's functions of these names
give (the last two are binary_cross_entropy and binary_cross_entropy_with_logits there). ``multiclass_nll`` is
-sum_c y_c log a_c of probabilities, which torch has for labels only. Formulas and gradients: ``fastmlp.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..backend import Runs, alone, has_values, on_tape, runs
from ..base.arguments import REDUCTIONS, check_delta, check_factors, check_value_target, check_values
from ..base.compat import is_autocast_enabled
from ..base.losses import LOSSES
from ..ops import torch_losses
from .transforms import differentiable, transformed


class LossFunction(Function):
    """``apply(a, y, loss, reduction, backend, *settings)`` with ``loss`` a name of ``fastmlp.base.losses.LOSSES``.

    For all losses but cross-entropy. ``settings`` is huber's delta, and empty for the others. A and Y have the same
    shape; "softmax_squared_error" takes A [M, C] and Y [M, C] or labels [M].
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, y: Tensor, loss: str, reduction: str, backend: Runs, *settings: float) -> Tensor:
        """Keep A and Y; probabilities of a softmax are computed again where they are needed, one pass over A."""
        ctx.save_for_backward(a, y)
        ctx.loss, ctx.reduction, ctx.backend, ctx.settings = loss, reduction, backend, settings
        return ops.on(backend).loss_fwd(a, y, loss, reduction, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """DA = g dL/da and dY = g dL/dy, the mean's 1/count in g."""
        (g,) = grads
        a, y = ctx.saved_tensors
        # The operations on torch are on the tape themselves.
        do = torch_losses if differentiable(g) else ops.on(ctx.backend)
        needs = ctx.needs_input_grad
        da, dy = do.loss_bwd(g, a, y, ctx.loss, ctx.reduction, needs[:2], *ctx.settings)
        return da, dy, *[None] * (len(needs) - 2)


def apply_loss(a: Tensor, y: Tensor, loss: str, reduction: str, *settings: float) -> Tensor:
    """A loss by name, of arguments that were checked."""
    # Under torch.autocast these losses are computed in float32, as torch computes its own.
    if is_autocast_enabled(a.device.type):
        a, y = torch_losses.widened(a), torch_losses.widened(y) if y.is_floating_point() else y
    if a.dtype != y.dtype and y.is_floating_point():
        if LOSSES[loss].dtype == "equal":
            check_value_target(a, y, reduction)
        return _promoted(a, y, loss, reduction, *settings)
    backend = runs(a.dtype, a, y)
    if backend == "formula":
        return torch_losses.loss_fwd(a, y, loss, reduction, *settings)
    if transformed(a, y):
        return torch_losses.by_formula(a, y, loss, reduction, *settings)
    if not on_tape(backend):
        return ops.on(backend).loss_fwd(a, y, loss, reduction, *settings)
    return LossFunction.apply(a, y, loss, reduction, backend, *settings)


def _promoted(a: Tensor, y: Tensor, loss: str, reduction: str, *settings: float) -> Tensor:
    """The loss of A and Y of different dtypes, computed in the promoted one."""
    wide = torch.promote_types(a.dtype, y.dtype)
    result = apply_loss(a.to(wide), y.to(wide), loss, reduction, *settings)
    match LOSSES[loss].dtype:
        case "input":
            return result.to(a.dtype)
        case "target":
            return result.to(y.dtype)
    return result


def _torchs_own(a: Tensor, y: Tensor, reduction: str) -> bool:
    """Whether torch's own function takes its arguments as they are, on a CPU.

    There it takes half as long as our node, whose gradient is several passes, whatever the size.
    """
    return (
        isinstance(y, Tensor)
        and alone(a, y) == "torch"
        and a.dtype == y.dtype
        and a.dtype in torch_losses.WIDE
        and a.shape == y.shape
        and y.is_cpu
        and reduction in REDUCTIONS
    )


def _of_values(
    a: Tensor, y: Tensor, loss: str, reduction: str, weight: Tensor | None = None, **settings: float
) -> Tensor:
    record = LOSSES[loss]
    if weight is None and _torchs_own(a, y, reduction):
        return torch_losses.loss_fwd(a, y, loss, reduction, *settings.values())
    check_values(a, y, reduction, broadcasts=record.broadcasts)
    if weight is None:
        return apply_loss(a, y, loss, reduction, *settings.values())
    check_factors(a, same_shape=True, weight=weight)
    assert record.torch is not None
    return record.torch(a, y, weight=weight, reduction=reduction, **settings)


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Squared error (a - y)^2; gradient 2 (a - y).

    Args:
        input: any shape, floating-point.
        target: floating-point, of the same shape (nothing is broadcast).
        reduction: "mean" over the elements (default), "sum", or "none".
        weight: a factor for each element, of the input's shape; "mean" divides by the sum of the factors. With it,
            torch's own function runs.

    Returns:
        0-d, or of the input's shape for "none"; in the promoted dtype of input and target, and at least float32 under
        torch.autocast.

    Differentiable in both, any number of times. Kernels on GPUs, plain torch elsewhere: see ``fastmlp.set_backend``.

    Raises:
        ValueError: shapes that differ, an unknown reduction.
        TypeError: arguments that are not tensors.
        RuntimeError: dtypes that are not floating-point, two devices, shapes that torch could not broadcast either.
    """
    return _of_values(input, target, "mse", reduction, weight)


def l1_loss(input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Absolute error |a - y| ("linear loss"); gradient sign(a - y), 0 at 0. Arguments and errors as ``mse_loss``."""
    return _of_values(input, target, "l1", reduction, weight)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Huber's loss, (a - y)^2 / 2 where |a - y| <= delta and delta (|a - y| - delta / 2) beyond.

    The gradient is a - y, between -delta and delta. Arguments and errors as ``mse_loss``, but the result has the
    input's dtype, and "mean" divides by the number of elements also with a weight.

    Raises:
        TypeError: delta that is no number.
        RuntimeError: delta that is not above 0.
    """
    return _of_values(input, target, "huber", reduction, weight, delta=check_delta(delta))


def bce_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Binary NLL of probabilities, -(y log a + (1 - y) log(1 - a)); gradient (a - y) / (a (1 - a)).

    Arguments and errors as ``mse_loss``; the logarithms are at least -100 and a (1 - a) at least 1e-12, as torch has
    it. With a sigmoid before it, ``bce_with_logits`` is faster and loses no digits.

    Raises:
        RuntimeError: dtypes that differ, as with torch, except 16 bits and float32 under torch.autocast.
        RuntimeError: on a CPU, an input outside [0, 1]. (On a GPU that gives NaN; looking would make the host wait.)
    """
    check_values(input, target, reduction)
    if input.device.type == "cpu" and has_values(input) and input.numel():
        low, high = (v.item() for v in torch.aminmax(input.detach()))
        if low < 0 or high > 1:
            raise RuntimeError(
                f"expected probabilities from 0 to 1, got {low:g} to {high:g}; apply torch.sigmoid, or use "
                "bce_with_logits on the values as they are"
            )
    return apply_loss(input, target, "binary_cross_entropy", reduction)


def bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | str | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary NLL of sigmoid(a) in one: max(a, 0) - a y + log(1 + e^-|a|); gradient sigmoid(a) - y.

    Args:
        input, target, reduction: as ``mse_loss``. The reduction may also be the third argument, where it was before
            there were weights.
        weight: a factor for each element, of a shape that broadcasts to the input's; "mean" divides by the number of
            elements.
        pos_weight: a factor of the terms with y, of a shape that broadcasts to the input's, usually [C]: above 1, a
            positive target that was missed costs more. With either weight, torch's own function runs.

    Returns:
        As ``mse_loss``, but where input and target have different dtypes the result has the target's, as with torch.

    Raises:
        As ``mse_loss``; ValueError for any shapes that differ.
    """
    if isinstance(weight, str):
        reduction, weight = weight, None
    if weight is None and pos_weight is None:
        return _of_values(input, target, "bce_with_logits", reduction)
    check_values(input, target, reduction)
    check_factors(input, same_shape=False, weight=weight, pos_weight=pos_weight)
    return torch.nn.functional.binary_cross_entropy_with_logits(
        input, target, weight, reduction=reduction, pos_weight=pos_weight
    )


def multiclass_nll(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """NLL of probabilities, -sum_c y_c log a_c over the last dimension; gradient -y / a.

    Arguments and errors as ``mse_loss``, but each sum over the last dimension is one loss: "mean" divides by their
    number, and "none" has one dimension less. y = 0 makes a term 0, whatever a is. With a softmax before it,
    ``cross_entropy`` on the logits is faster and loses no digits.

    Raises:
        ValueError: a 0-d input.
    """
    check_values(input, target, reduction)
    if input.dim() == 0:
        raise ValueError("expected probabilities [*, classes], got a 0-d tensor")
    loss = apply_loss(input, target, "nllm", reduction)
    return loss.sum(-1) if reduction == "none" else loss
