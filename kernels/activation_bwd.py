"""dZ = dA * f': the elementwise gradient of one activation, for layers that stand alone.

Inside an MLP this product is the epilogue of ``linear_dgrad`` and costs nothing. A single ``fastmlp.Linear`` gets
its dA from outside and needs a pass of its own.

Shapes: dA, saved, dZ [M, N]; any strides for dA (expanded ones too), saved and dZ contiguous.
Members: dA, saved and dZ have an axis E in front.
Optional: ``dropout``, dZ = dA * F * f' (see ``dropout``).
Dtypes: float32, float16, bfloat16; computed in float32. Bytes: reads dA and saved, writes dZ: 3 M N items.
Source: dL/dZ = f'(Z) * dL/dA, the diagonal Jacobian of lecture notes 7.X.22.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_grad
from .configs import cdiv
from .dependent import wait_for_previous
from .dropout import GROUP, Dropout, arguments_of, dropout_key, factor_of_groups, grad_of_dropped
from .launch import Call, call, remembered, with_active, with_dropout
from .members import inactive

__all__ = ["activation_bwd"]

BLOCK = 1024


class _Members(NamedTuple):
    """Elements from one member to the next."""

    da: int


@triton.jit(do_not_specialize=["dropout"])
def _activation_bwd_kernel(
    da_ptr, saved_ptr, dz_ptr, members, active_ptr, dropout, total, N, stride_am, stride_an,
    ACTIVATION: tl.constexpr, HAS_SAVED: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        da_ptr += member * members.da
        dz_ptr += member * total
        if HAS_SAVED:
            saved_ptr += member * total
    if dropout is not None:
        # Groups of random numbers in place of elements, a group per row of the block; the last of a row may be shorter.
        # 2^32 groups are more than a GPU's memory has room for, and numbers of 64 bits take long to divide.
        groups = tl.cast(tl.cdiv(N, GROUP), tl.uint32)
        group = tl.program_id(0).to(tl.uint32) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        col = (group % groups).to(tl.int32)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        offs = (group // groups).to(tl.int64)[:, None] * N + col
        mask = (col < N) & (offs < total)
        group = group.to(tl.int64)
        if members is not None:
            group += member * (total // N * tl.cdiv(N, GROUP))
        factor = factor_of_groups(dropout, dropout_key(dropout), group)
    else:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < total
    if DENSE:
        da_ptrs = da_ptr + offs
    else:
        da_ptrs = da_ptr + (offs // N) * stride_am + (offs % N) * stride_an
    da = tl.load(da_ptrs, mask=mask, other=0.0).to(tl.float32)
    saved = da
    if HAS_SAVED:
        saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if dropout is not None:
        dz = grad_of_dropped(dropout, da, saved, factor, ACTIVATION)
    else:
        dz = activation_grad(da, saved, ACTIVATION)
    tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _plan(
    da: Tensor, saved: Tensor | None, dz: Tensor, activation: str, active: Tensor | None = None,
    dropout: tuple[Any, ...] | None = None,
) -> Call:  # fmt: skip
    total, count, members, dense = dz.numel(), 1, None, da.is_contiguous()
    # Contiguous members are one long row, unless a part of them is left out.
    if da.dim() == 3 and not (dense and active is None):
        count = da.shape[0]
        total //= count
        members = _Members(da.stride(0))
        dense = da[0].is_contiguous()
    blocks = cdiv(total, BLOCK)
    if dropout is not None:
        columns = GROUP.value
        blocks = cdiv(total // da.shape[-1] * cdiv(da.shape[-1], columns), BLOCK // columns)
    return call(
        _activation_bwd_kernel, (blocks, 1, count),
        da, saved, dz, members, active, arguments_of(dropout), total, da.shape[-1], da.stride(-2), da.stride(-1),
        ACTIVATION=activation, HAS_SAVED=saved is not None, DENSE=dense, BLOCK=BLOCK,
    )  # fmt: skip


_launch = remembered(_plan)
_launch_active = remembered(with_active(_plan))
_launch_dropping = remembered(with_dropout(_plan))


def activation_bwd(
    da: Tensor,
    saved: Tensor | None,
    activation: str,
    *,
    dz: Tensor | None = None,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Launch dZ = dA * f'; returns dZ, contiguous. ``active``: a bool per member; dZ of others is not written.

    ``dropout`` is that of A. dA is then the gradient of A after dropout, and ``saved`` is A after dropout, or Z.
    """
    if dz is None:
        dz = torch.empty(da.shape, dtype=da.dtype, device=da.device)
    if not dz.numel():
        return dz
    if dropout is not None:
        state, *drawn = dropout
        _launch_dropping((state, active, da, saved, dz), (activation, tuple(drawn)))
    elif active is None:
        _launch((da, saved, dz), (activation,))
    else:
        _launch_active((active, da, saved, dz), (activation,))
    return dz
