"""The kernel launches as torch operators ``fastmlp::*``, for torch.compile and torch.export.

A compiler that traces a Triton launch would have to trace the launcher too, with its questions to the driver. As
operators the launches are opaque to it: it knows the shapes of their results, keeps them in its graph without a
break, and calls them. Outside the compilers the operations are those of ``fastmlp.ops.triton_ops``, which calls the
launchers directly and is a few microseconds faster.

Operators return tensors only: where a launcher returns None, the operator returns an empty tensor. The losses are
those of ``fastmlp.ops.triton_ops``: a compiler traces into their launches or breaks its graph there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from . import triton_ops
from .triton_ops import cross_entropy_bwd, cross_entropy_fwd, loss_bwd, loss_fwd  # noqa: F401


@torch.library.custom_op("fastmlp::linear_fwd", mutates_args=())
def linear_fwd_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_z: bool
) -> tuple[Tensor, Tensor]:
    """(A, Z or empty) of A = f(X W^T + b)."""
    backend.check_kernels_run_on(x)
    a, z = triton_ops.linear_fwd(x, weight, bias, activation, save_z=save_z)
    return a, a.new_empty(0) if z is None else z


@linear_fwd_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_z: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape if save_z else 0)


@torch.library.custom_op("fastmlp::linear_dgrad", mutates_args=())
def linear_dgrad_operator(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DX = (dZ W) * f'."""
    return triton_ops.linear_dgrad(dz, weight, saved, activation)


@linear_dgrad_operator.register_fake
def _(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    return weight.new_empty(dz.shape[0], weight.shape[1])


@torch.library.custom_op("fastmlp::linear_wgrad", mutates_args=())
def linear_wgrad_operator(dz: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """(dW, db or empty)."""
    dw, db = triton_ops.linear_wgrad(dz, x, bias=bias)
    return dw, dw.new_empty(0) if db is None else db


@linear_wgrad_operator.register_fake
def _(dz: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return dz.new_empty(dz.shape[1], x.shape[1]), dz.new_empty(dz.shape[1] if bias else 0)


@torch.library.custom_op("fastmlp::activation_bwd", mutates_args=())
def activation_bwd_operator(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DZ = dA * f'."""
    return triton_ops.activation_bwd(da, saved, activation)


@activation_bwd_operator.register_fake
def _(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    return da.new_empty(da.shape)


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, save_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(A, Z or None) of A = f(X W^T + b); X [M, K], W [N, K], b [N]."""
    a, z = linear_fwd_operator(x, weight, bias, activation, save_z)
    return a, z if save_z else None


def linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None = None, activation: str = "identity") -> Tensor:
    """DX = (dZ W) * f' with f the activation of the layer below and ``saved`` what its derivative needs."""
    return linear_dgrad_operator(dz, weight, saved, activation)


def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dW, db or None) of a linear layer with input X."""
    dw, db = linear_wgrad_operator(dz, x, bias)
    return dw, db if bias else None


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DZ = dA * f'."""
    return da if activation == "identity" else activation_bwd_operator(da, saved, activation)
