"""The kernel launches of the losses as torch operators ``fastmlp::*``; ``fastmlp.ops.compiled`` says why.

The operators take any batch size, also 0. So a program of dynamic shapes asks nothing about the batch size, and has no
limit on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..base.arguments import check_class_target, check_cross_entropy, check_value_target
from ..base.losses import LOSSES
from . import torch_losses, triton_ops
from .operators import check_dtype, check_like, check_shape, derivatives, or_empty, or_none
from .torch_losses import Gradients, Rows, Settings


def _rows_shape(z: Tensor) -> tuple[int, ...]:
    """One value per row of logits [M, C] or [N, C, S]."""
    return (*z.shape[:1], *z.shape[2:])


def _cross_entropy_results(
    z: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized (loss, statistics, denominator or empty), as ``fastmlp.kernels.cross_entropy_fwd`` makes them."""
    shape = _rows_shape(z)
    statistics = 3 if target.is_floating_point() or (weight is not None and smoothing != 0.0) else 2
    rows = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    return (
        z.new_empty(shape if reduction == "none" else (), dtype=dtype),
        z.new_empty((statistics, rows), dtype=torch.float32),
        z.new_empty(() if reduction == "mean" else 0, dtype=torch.float32),
    )


def _check_logits(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> None:
    check_cross_entropy(z, target, weight, ignore_index, reduction, smoothing)
    check_dtype("logits", z)
    torch._check(z.dim() in (2, 3), lambda: f"expected logits [M, C] or [N, C, S], got {list(z.shape)}")


@torch.library.custom_op("fastmlp::cross_entropy_fwd", mutates_args=())
def cross_entropy_fwd_operator(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss in ``dtype``, statistics of each row for the backward pass, denominator of the mean or empty)."""
    _check_logits(z, target, weight, ignore_index, reduction, smoothing)
    backend.check_kernels_run_on(z)
    s = Settings(reduction, ignore_index, smoothing, dtype)
    if z.numel() == 0:
        _, statistics, denominator = _cross_entropy_results(z, target, weight, reduction, smoothing, dtype)
        return torch_losses.cross_entropy_fwd(z, target, weight, s)[0], statistics.zero_(), denominator.zero_()
    loss, statistics, found = triton_ops.cross_entropy_fwd(z, target, weight, s)
    return loss, statistics, or_empty(found, statistics)


@cross_entropy_fwd_operator.register_fake
def _(z: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, ignore_index, smoothing, dtype = options
    _check_logits(z, target, weight, ignore_index, reduction, smoothing)
    return _cross_entropy_results(z, target, weight, reduction, smoothing, dtype)


def _save_cross_entropy_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, target, weight, ctx.reduction, ctx.ignore_index, ctx.smoothing, _ = inputs
    _, statistics, denominator = output
    ctx.mark_non_differentiable(statistics, denominator)
    ctx.save_for_backward(z, target, weight, statistics, or_none(denominator, ctx.reduction == "mean"))


def _cross_entropy_fwd_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    z, target, weight, statistics, denominator = ctx.saved_tensors
    need_z, need_target, need_weight = ctx.needs_input_grad[:3]
    options = {"ignore_index": ctx.ignore_index, "smoothing": ctx.smoothing}
    dz, dt = cross_entropy_bwd_operator(
        dloss, z, target, weight, statistics, denominator, ctx.ignore_index, ctx.smoothing, need_z, need_target
    )
    (dw,) = derivatives(
        lambda w: (reference.cross_entropy(z, target, w, reduction=ctx.reduction, **options),),
        (weight,),
        (need_weight,),
        (dloss,),
    )
    return or_none(dz, need_z), or_none(dt, need_target), dw, None, None, None, None


cross_entropy_fwd_operator.register_autograd(_cross_entropy_fwd_backward, setup_context=_save_cross_entropy_fwd)


def _reduction(dloss: Tensor, denominator: Tensor | None) -> str:
    """The reduction of a cross-entropy whose backward pass is given these."""
    return "none" if dloss.dim() else "sum" if denominator is None else "mean"


def _check_cross_entropy_bwd(
    dloss: Tensor,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    smoothing: float,
    want_dt: bool,
) -> None:
    reduction = _reduction(dloss, denominator)
    _check_logits(z, target, weight, ignore_index, reduction, smoothing)
    if dloss.dim():
        check_shape("dloss", dloss, _rows_shape(z))
    check_like("dloss", dloss, z, torch.float32, torch.float16, torch.bfloat16)
    _, expected, _ = _cross_entropy_results(z, target, weight, reduction, smoothing, torch.float32)
    check_shape("statistics", statistics, expected.shape)
    check_like("statistics", statistics, expected)
    if denominator is not None:
        check_shape("denominator", denominator, ())
        check_like("denominator", denominator, expected)
    torch._check(
        not want_dt or target.is_floating_point(), lambda: f"labels have no gradient, got a target in {target.dtype}"
    )


@torch.library.custom_op("fastmlp::cross_entropy_bwd", mutates_args=())
def cross_entropy_bwd_operator(
    dloss: Tensor,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    smoothing: float,
    want_dz: bool,
    want_dt: bool,
) -> tuple[Tensor, Tensor]:
    """(dZ, dTarget), each empty unless wanted."""
    _check_cross_entropy_bwd(dloss, z, target, weight, statistics, denominator, ignore_index, smoothing, want_dt)
    backend.check_kernels_run_on(z)
    if z.numel() == 0 or not (want_dz or want_dt):
        return _cross_entropy_gradients(z, target, want_dz, want_dt)
    s = Settings(_reduction(dloss, denominator), ignore_index, smoothing, z.dtype)
    rows = (z, target, weight, statistics, denominator)
    dz, dt = triton_ops.cross_entropy_bwd(dloss, rows, s, (want_dz, want_dt))
    return or_empty(dz, z), or_empty(dt, z)


def _cross_entropy_gradients(z: Tensor, target: Tensor, want_dz: bool, want_dt: bool) -> tuple[Tensor, Tensor]:
    """Uninitialized results of the backward operator."""
    return (
        torch.empty_like(z) if want_dz else z.new_empty(0),
        torch.empty_like(z, dtype=target.dtype) if want_dt else z.new_empty(0),
    )


@cross_entropy_bwd_operator.register_fake
def _(dloss: Tensor, z: Tensor, target: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    weight, statistics, denominator, ignore_index, smoothing, want_dz, want_dt = others
    _check_cross_entropy_bwd(dloss, z, target, weight, statistics, denominator, ignore_index, smoothing, want_dt)
    return _cross_entropy_gradients(z, target, want_dz, want_dt)


def _save_cross_entropy_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dloss, z, target, weight, _, denominator, *options = inputs
    ctx.ignore_index, ctx.smoothing, *ctx.want = options
    ctx.reduction = _reduction(dloss, denominator)
    ctx.save_for_backward(dloss, z, target, weight)


def _cross_entropy_bwd_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    def formula(dloss: Tensor, z: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return reference.cross_entropy_backward(
            dloss,
            z,
            target,
            weight,
            ignore_index=ctx.ignore_index,
            smoothing=ctx.smoothing,
            reduction=ctx.reduction,
        )

    wanted = [g if want else None for g, want in zip(grads, ctx.want, strict=True)]
    return *derivatives(formula, ctx.saved_tensors, ctx.needs_input_grad[:4], wanted), *[None] * 6


cross_entropy_bwd_operator.register_autograd(_cross_entropy_bwd_backward, setup_context=_save_cross_entropy_bwd)


def _check_loss(a: Tensor, y: Tensor, loss: str, reduction: str) -> None:
    known = [name for name, record in LOSSES.items() if record.kernel != "cross_entropy"]
    if loss not in known:
        raise ValueError(f"unknown loss {loss!r}; expected one of {', '.join(known)}")
    check_dtype("the input", a)
    if LOSSES[loss].kernel == "softmax_squared_error":
        torch._check(a.dim() == 2, lambda: f"expected logits [M, C], got {list(a.shape)}")
        (check_value_target if y.is_floating_point() else check_class_target)(a, y, reduction)
    else:
        check_value_target(a, y, reduction)


def _loss_shape(a: Tensor, loss: str, reduction: str) -> Sequence[int]:
    if reduction != "none":
        return ()
    return a.shape[:1] if LOSSES[loss].kernel == "softmax_squared_error" else a.shape


@torch.library.custom_op("fastmlp::loss_fwd", mutates_args=())
def loss_fwd_operator(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    """A loss other than cross-entropy, in a's dtype; ``loss`` is a name of ``fastmlp.base.losses.LOSSES``."""
    _check_loss(a, y, loss, reduction)
    backend.check_kernels_run_on(a)
    return triton_ops.loss_fwd(a, y, loss, reduction, delta)


@loss_fwd_operator.register_fake
def _(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    _check_loss(a, y, loss, reduction)
    return a.new_empty(_loss_shape(a, loss, reduction))


def _save_loss_fwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, y, ctx.loss, ctx.reduction, ctx.delta = inputs
    ctx.save_for_backward(a, y)


def _loss_fwd_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    a, y = ctx.saved_tensors
    return *loss_bwd(g, a, y, ctx.loss, ctx.reduction, ctx.needs_input_grad[:2], ctx.delta), None, None, None


loss_fwd_operator.register_autograd(_loss_fwd_backward, setup_context=_save_loss_fwd)


def _check_loss_bwd(g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want_dy: bool) -> None:
    _check_loss(a, y, loss, reduction)
    check_shape("the upstream gradient", g, _loss_shape(a, loss, reduction))
    check_like("the upstream gradient", g, a)
    torch._check(not want_dy or y.is_floating_point(), lambda: f"labels have no gradient, got a target in {y.dtype}")


@torch.library.custom_op("fastmlp::loss_bwd", mutates_args=())
def loss_bwd_operator(
    g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want_da: bool, want_dy: bool, delta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(dA, dY) for the upstream gradient of ``loss_fwd``, each empty unless wanted."""
    _check_loss_bwd(g, a, y, loss, reduction, want_dy)
    backend.check_kernels_run_on(a)
    da, dy = triton_ops.loss_bwd(g, a, y, loss, reduction, (want_da, want_dy), delta)
    return or_empty(da, a), or_empty(dy, a)


@loss_bwd_operator.register_fake
def _(
    g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want_da: bool, want_dy: bool, delta: float = 1.0
) -> tuple[Tensor, Tensor]:
    _check_loss_bwd(g, a, y, loss, reduction, want_dy)
    return a.new_empty(a.shape if want_da else 0), y.new_empty(y.shape) if want_dy else a.new_empty(0)


def _save_loss_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.loss, ctx.reduction, want_da, want_dy, ctx.delta = inputs
    ctx.want = (want_da, want_dy)
    ctx.save_for_backward(*tensors)


def _loss_bwd_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    def formula(g: Tensor, a: Tensor, y: Tensor) -> Gradients:
        return torch_losses.loss_bwd(g, a, y, ctx.loss, ctx.reduction, ctx.want, ctx.delta)

    return *derivatives(formula, ctx.saved_tensors, ctx.needs_input_grad[:3], grads), *[None] * 5


loss_bwd_operator.register_autograd(_loss_bwd_backward, setup_context=_save_loss_bwd)


def cross_entropy_fwd(
    z: Tensor, target: Tensor, weight: Tensor | None, s: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, maximum and sum of exponentials of each row, denominator of the mean or None)."""
    loss, statistics, denominator = cross_entropy_fwd_operator(
        z, target, weight, s.reduction, s.ignore_index, s.smoothing, s.dtype
    )
    return loss, statistics, or_none(denominator, s.reduction == "mean")


def cross_entropy_bwd(dloss: Tensor, rows: Rows, s: Settings, want: Sequence[bool]) -> Gradients:
    """(dZ, dTarget)."""
    dz, dt = cross_entropy_bwd_operator(dloss, *rows, s.ignore_index, s.smoothing, *want)
    return or_none(dz, want[0]), or_none(dt, want[1])


def loss_fwd(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    """A loss other than cross-entropy, in a's dtype."""
    return loss_fwd_operator(a, y, loss, reduction, delta)


def loss_bwd(
    g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want: Sequence[bool], delta: float = 1.0
) -> Gradients:
    """(dA, dY) for the upstream gradient of ``loss_fwd``."""
    da, dy = loss_bwd_operator(g, a, y, loss, reduction, *want, delta)
    return or_none(da, want[0]), or_none(dy, want[1])
