"""The kernel launches as torch operators ``fastmlp::*``, for torch.compile and torch.export.

A compiler that traces a Triton launch would have to trace the launcher too, with its questions to the driver. As
operators the launches are opaque to it: it knows the shapes of their results, keeps them in its graph without a
break, and calls them. Outside the compilers ``fastmlp.ops.triton_ops`` calls the launchers directly, which is a few
microseconds faster.

Operators return tensors only: where a launcher returns None, the operator returns an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["activation_bwd", "linear_dgrad", "linear_fwd", "linear_wgrad"]


@torch.library.custom_op("fastmlp::linear_fwd", mutates_args=())
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_z: bool) -> tuple[Tensor, Tensor]:
    """(A, Z or empty) of A = f(X W^T + b)."""
    from .. import backend
    from . import triton_ops

    backend.check_kernels_run_on(x)
    a, z = triton_ops.linear_fwd(x, weight, bias, activation, save_z=save_z)
    return a, a.new_empty(0) if z is None else z


@linear_fwd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_z: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape if save_z else 0)


@torch.library.custom_op("fastmlp::linear_dgrad", mutates_args=())
def linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DX = (dZ W) * f'."""
    from . import triton_ops

    return triton_ops.linear_dgrad(dz, weight, saved, activation)


@linear_dgrad.register_fake
def _(dz: Tensor, weight: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    return weight.new_empty(dz.shape[0], weight.shape[1])


@torch.library.custom_op("fastmlp::linear_wgrad", mutates_args=())
def linear_wgrad(dz: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """(dW, db or empty)."""
    from . import triton_ops

    dw, db = triton_ops.linear_wgrad(dz, x, bias=bias)
    return dw, dw.new_empty(0) if db is None else db


@linear_wgrad.register_fake
def _(dz: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return dz.new_empty(dz.shape[1], x.shape[1]), dz.new_empty(dz.shape[1] if bias else 0)


@torch.library.custom_op("fastmlp::activation_bwd", mutates_args=())
def activation_bwd(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """DZ = dA * f'."""
    from . import triton_ops

    return triton_ops.activation_bwd(da, saved, activation)


@activation_bwd.register_fake
def _(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    return da.new_empty(da.shape)
