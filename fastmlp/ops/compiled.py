"""The kernel launches as torch operators ``fastmlp::*``, for torch.compile, torch.export and dispatch modes.

A compiler that traces a Triton launch would have to trace the launcher too, with its questions to the driver. As
operators the launches are opaque to it: it knows the shapes of their results, keeps them in its graph without a
break, and calls them. Outside the compilers the operations are those of ``fastmlp.ops.triton_ops``, which calls the
launchers directly and is a few microseconds faster. ``fastmlp.ops.compiled_losses`` has the operators of the losses.

Members of an ensemble are one dimension more in front: W [E, N, K], b [E, N], dZ [E, M, N], and X [E, M, K] or [M, K].

The operators have autograd formulas, so an exported program can be trained. A model that torch.compile traces does not
need them, because ``fastmlp.autograd`` calls the backward operators itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..activations import ACTIVATIONS, saved_for_grad
from ..base.arguments import check_activation, check_input, check_layer, check_members, check_members_input
from ..base.dropout import Dropout
from . import triton_ops
from .compiled_losses import cross_entropy_bwd, cross_entropy_fwd, loss_bwd, loss_fwd  # noqa: F401
from .dropout import before_dropout, dropped
from .operators import check_dtype, check_like, check_shape, derivatives, or_empty, or_none


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() == 3:
        check_members([weight], [bias], ["identity"], weight.shape[0])
    else:
        check_layer(weight, bias)


def _check_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_activation(activation, ACTIVATIONS)
    _check_weight(weight, bias)
    check_dtype("weight", weight)
    if weight.dim() == 3:
        check_members_input(x, weight)
        return
    torch._check(x.dim() == 2, lambda: f"expected an input of shape [batch, in_features], got {list(x.shape)}")
    check_input(x, weight)


@torch.library.custom_op("fastmlp::linear_fwd", mutates_args=())
def linear_fwd_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_z: bool
) -> tuple[Tensor, Tensor]:
    """(A, Z or empty) of A = f(X W^T + b)."""
    _check_linear_fwd(x, weight, bias, activation)
    backend.check_kernels_run_on(x)
    a, z = triton_ops.linear_fwd(x, weight, bias, activation, save_z=save_z)
    return a, or_empty(z, a)


@linear_fwd_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_z: bool) -> tuple[Tensor, Tensor]:
    _check_linear_fwd(x, weight, bias, activation)
    shape = (*weight.shape[:-2], x.shape[-2], weight.shape[-2])
    return weight.new_empty(shape), weight.new_empty(shape if save_z else 0)


def _save_linear_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.activation, ctx.save_z = inputs
    kind = saved_for_grad(ctx.activation)
    ctx.save_for_backward(x, weight, bias, output[0] if kind == "a" else output[1] if ctx.save_z else None)


def _linear_fwd_backward(ctx: Any, da: Tensor, dz_extra: Tensor) -> tuple[Tensor | None, ...]:
    """DZ = dA * f'(Z), then dX = dZ W, dW = dZ^T X, db = sum_m dZ."""
    x, weight, bias, saved = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if saved is None and saved_for_grad(ctx.activation) == "z":
        saved, _ = linear_fwd_operator(x, weight, bias, "identity", False)
    dz = activation_bwd(da, saved, ctx.activation)
    if ctx.save_z:
        dz = dz + dz_extra
    dx = linear_dgrad(dz, weight) if need_x else None
    if dx is not None and dx.dim() > x.dim():
        dx = dx.sum(0)  # of an input that the members share
    dw, db = linear_wgrad(dz, x, bias=need_bias) if need_weight else (None, dz.sum(-2) if need_bias else None)
    return dx, dw, db, None, None


linear_fwd_operator.register_autograd(_linear_fwd_backward, setup_context=_save_linear_fwd)


def _check_saved(saved: Tensor | None, da: Tensor, shape: tuple[int, ...], activation: str) -> None:
    """RuntimeError unless ``saved`` is what f' needs, of dA's shape."""
    check_activation(activation, ACTIVATIONS)
    kind = saved_for_grad(activation)
    if saved is None:
        torch._check(kind is None, lambda: f"the derivative of {activation!r} needs saved={kind}, got None")
        return
    check_shape("saved", saved, shape)
    check_like("saved", saved, da)


def _times_derivative(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """dA * f' as operations that torch differentiates in both."""
    if saved is not None and (kind := saved_for_grad(activation)) is not None:
        derivative = reference.activation_grad_from_output if kind == "a" else reference.activation_grad
        return da * derivative(saved, activation)
    return da * ACTIVATIONS[activation].derivative


def _check_linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> None:
    _check_weight(weight, None)
    check_dtype("weight", weight)
    lead = (*weight.shape[:-2], dz.shape[-2 if dz.dim() > 1 else 0])
    check_shape("dz", dz, (*lead, weight.shape[-2]))
    check_like("dz", dz, weight)
    _check_saved(saved, dz, (*lead, weight.shape[-1]), activation)


@torch.library.custom_op("fastmlp::linear_dgrad", mutates_args=())
def linear_dgrad_operator(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DX = (dZ W) * f'."""
    _check_linear_dgrad(dz, weight, saved, activation)
    backend.check_kernels_run_on(dz)
    return triton_ops.linear_dgrad(dz, weight, saved, activation)


@linear_dgrad_operator.register_fake
def _(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    _check_linear_dgrad(dz, weight, saved, activation)
    return weight.new_empty(*dz.shape[:-1], weight.shape[-1])


def _save_dgrad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _linear_dgrad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    def formula(dz: Tensor, weight: Tensor, saved: Tensor | None) -> tuple[Tensor]:
        return (_times_derivative(reference.linear_dgrad(dz, weight), saved, ctx.activation),)

    return *derivatives(formula, ctx.saved_tensors, ctx.needs_input_grad[:3], (g,)), None


linear_dgrad_operator.register_autograd(_linear_dgrad_backward, setup_context=_save_dgrad)


def _check_linear_wgrad(dz: Tensor, x: Tensor) -> None:
    torch._check(dz.dim() in (2, 3), lambda: f"expected dz of shape [batch, out_features], got {list(dz.shape)}")
    check_dtype("dz", dz)
    dims = (2,) if dz.dim() == 2 else (2, 3)
    torch._check(x.dim() in dims, lambda: f"expected x of shape [batch, in_features], got {list(x.shape)}")
    check_shape("x", x, (*dz.shape[: x.dim() - 2], dz.shape[-2], x.shape[-1]))
    check_like("x", x, dz, torch.uint8)


@torch.library.custom_op("fastmlp::linear_wgrad", mutates_args=())
def linear_wgrad_operator(dz: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """(dW, db or empty)."""
    _check_linear_wgrad(dz, x)
    backend.check_kernels_run_on(dz)
    dw, db = triton_ops.linear_wgrad(dz, x, bias=bias)
    return dw, or_empty(db, dw)


@linear_wgrad_operator.register_fake
def _(dz: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    _check_linear_wgrad(dz, x)
    *members, _, n = dz.shape
    return dz.new_empty(*members, n, x.shape[-1]), dz.new_empty((*members, n) if bias else 0)


def _save_wgrad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dz, x, ctx.bias = inputs
    ctx.save_for_backward(dz, x)


def _linear_wgrad_backward(ctx: Any, g_dw: Tensor, g_db: Tensor) -> tuple[Tensor | None, ...]:
    grads = derivatives(
        reference.linear_wgrad, ctx.saved_tensors, ctx.needs_input_grad[:2], (g_dw, or_none(g_db, ctx.bias))
    )
    return *grads, None


linear_wgrad_operator.register_autograd(_linear_wgrad_backward, setup_context=_save_wgrad)


def _check_activation_bwd(da: Tensor, saved: Tensor | None, activation: str) -> None:
    torch._check(da.dim() in (2, 3), lambda: f"expected da of shape [batch, out_features], got {list(da.shape)}")
    check_dtype("da", da)
    _check_saved(saved, da, tuple(da.shape), activation)


@torch.library.custom_op("fastmlp::activation_bwd", mutates_args=())
def activation_bwd_operator(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DZ = dA * f', always new memory."""
    _check_activation_bwd(da, saved, activation)
    backend.check_kernels_run_on(da)
    if activation == "identity":
        return da.clone(memory_format=torch.contiguous_format)
    return triton_ops.activation_bwd(da, saved, activation)


@activation_bwd_operator.register_fake
def _(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    _check_activation_bwd(da, saved, activation)
    return da.new_empty(da.shape)


def _activation_bwd_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    def formula(da: Tensor, saved: Tensor | None) -> tuple[Tensor]:
        return (_times_derivative(da, saved, ctx.activation),)

    return *derivatives(formula, ctx.saved_tensors, ctx.needs_input_grad[:2], (g,)), None


activation_bwd_operator.register_autograd(_activation_bwd_backward, setup_context=_save_dgrad)


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    save_z: bool = False,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b); X [M, K], W [N, K], b [N].

    ``dropout`` is of this layer's output. It is a product with a mask beside the operator, which a compiler fuses.
    """
    a, z = linear_fwd_operator(x, weight, bias, activation, save_z)
    return a if dropout is None else dropped(a, dropout), or_none(z, save_z)


def linear_dgrad(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None = None,
    activation: str = "identity",
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below and ``saved`` what its derivative needs."""
    if dropout is not None:
        return activation_bwd(linear_dgrad_operator(dz, weight, None, "identity"), saved, activation, dropout=dropout)
    return linear_dgrad_operator(dz, weight, saved, activation)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None) of a linear layer with input X."""
    dw, db = linear_wgrad_operator(dz, x, bias)
    return dw, or_none(db, bias)


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str, *, dropout: Dropout | None = None) -> Tensor:
    """DZ = dA * f'."""
    if dropout is not None:
        da, saved = dropped(da, dropout), before_dropout(saved, activation, dropout.p)
    return da if activation == "identity" else activation_bwd_operator(da, saved, activation)
