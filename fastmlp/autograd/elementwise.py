"""Losses of an output and a target of the same shape, element by element, with gradients derived by hand.

``mse_loss``, ``l1_loss``, ``bce_loss``, ``bce_with_logits`` give what torch's functions of these names give (the last
two are binary_cross_entropy and binary_cross_entropy_with_logits there). ``multiclass_nll`` is -sum_c y_c log a_c of
probabilities, which torch has for labels only. Formulas and gradients: ``fastmlp.reference``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops
from ..backend import Runs, functorch_active, has_values, on_tape, runs
from ..base.arguments import check_value_target
from ..base.compat import is_autocast_enabled
from ..ops import torch_losses


class LossFunction(Function):
    """``apply(a, y, loss, reduction, backend)`` with ``loss`` a name of ``fastmlp.base.losses.LOSSES``.

    For all losses but cross-entropy. A and Y have the same shape; "softmax_squared_error" takes A [M, C] and Y [M, C]
    or labels [M].
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, y: Tensor, loss: str, reduction: str, backend: Runs) -> Tensor:
        """Keep A and Y; probabilities of a softmax are computed again where they are needed, one pass over A."""
        ctx.save_for_backward(a, y)
        ctx.loss, ctx.reduction, ctx.backend = loss, reduction, backend
        return ops.on(backend).loss_fwd(a, y, loss, reduction)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """DA = g dL/da and dY = g dL/dy, the mean's 1/count in g."""
        (g,) = grads
        a, y = ctx.saved_tensors
        # The operations on torch are on the tape themselves.
        do = torch_losses if torch.is_grad_enabled() else ops.on(ctx.backend)
        return *do.loss_bwd(g, a, y, ctx.loss, ctx.reduction, ctx.needs_input_grad[:2]), None, None, None


def apply_loss(a: Tensor, y: Tensor, loss: str, reduction: str) -> Tensor:
    """A loss by name, of arguments that were checked."""
    # Under torch.autocast these losses are computed in float32, as torch computes its own.
    if is_autocast_enabled(a.device.type):
        a, y = torch_losses.widened(a), torch_losses.widened(y) if y.is_floating_point() else y
    backend = runs(a.dtype, a, y)
    if backend == "formula":
        return torch_losses.loss_fwd(a, y, loss, reduction)
    if functorch_active():
        return torch_losses.by_formula(a, y, loss, reduction)
    if not on_tape(backend):
        return ops.on(backend).loss_fwd(a, y, loss, reduction)
    return LossFunction.apply(a, y, loss, reduction, backend)


def _of_values(a: Tensor, y: Tensor, loss: str, reduction: str) -> Tensor:
    check_value_target(a, y, reduction)
    return apply_loss(a, y, loss, reduction)


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
    return _of_values(input, target, "mse", reduction)


def l1_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Absolute error |a - y| ("linear loss"); gradient sign(a - y), 0 at 0. Arguments and errors as ``mse_loss``."""
    return _of_values(input, target, "l1", reduction)


def bce_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Binary NLL of probabilities, -(y log a + (1 - y) log(1 - a)); gradient (a - y) / (a (1 - a)).

    Arguments and errors as ``mse_loss``; the logarithms are at least -100 and a (1 - a) at least 1e-12, as torch has
    it. With a sigmoid before it, ``bce_with_logits`` is faster and loses no digits.

    Raises:
        RuntimeError: on a CPU, an input outside [0, 1]. (On a GPU that gives NaN; looking would make the host wait.)
    """
    check_value_target(input, target, reduction)
    if input.device.type == "cpu" and has_values(input) and input.numel():
        low, high = (v.item() for v in torch.aminmax(input.detach()))
        if low < 0 or high > 1:
            raise RuntimeError(
                f"expected probabilities from 0 to 1, got {low:g} to {high:g}; apply torch.sigmoid, or use "
                "bce_with_logits on the values as they are"
            )
    return apply_loss(input, target, "binary_cross_entropy", reduction)


def bce_with_logits(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Binary NLL of sigmoid(a) in one: max(a, 0) - a y + log(1 + e^-|a|); gradient sigmoid(a) - y.

    Arguments and errors as ``mse_loss``.
    """
    return _of_values(input, target, "bce_with_logits", reduction)


def multiclass_nll(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """NLL of probabilities, -sum_c y_c log a_c over the last dimension; gradient -y / a.

    Arguments and errors as ``mse_loss``, but each sum over the last dimension is one loss: "mean" divides by their
    number, and "none" has one dimension less. y = 0 makes a term 0, whatever a is. With a softmax before it,
    ``cross_entropy`` on the logits is faster and loses no digits.

    Raises:
        ValueError: a 0-d input.
    """
    check_value_target(input, target, reduction)
    if input.dim() == 0:
        raise ValueError("expected probabilities [*, classes], got a 0-d tensor")
    loss = apply_loss(input, target, "nllm", reduction)
    return loss.sum(-1) if reduction == "none" else loss
