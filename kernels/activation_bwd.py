"""dZ = dA * f': the elementwise gradient of one activation, for layers that stand alone.

Inside an MLP this product is the epilogue of ``linear_dgrad`` and costs nothing. A single ``fastmlp.Linear`` gets
its dA from outside and needs a pass of its own.

Shapes: dA, saved, dZ [M, N]; any strides for dA (expanded ones too), saved and dZ contiguous.
Dtypes: float32, float16, bfloat16; computed in float32. Bytes: reads dA and saved, writes dZ: 3 M N items.
Source: dL/dZ = f'(Z) * dL/dA, the diagonal Jacobian of lecture notes 7.X.22.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_grad
from .configs import cdiv
from .dependent import wait_for_previous
from .launch import Call, call, remembered

__all__ = ["activation_bwd"]

BLOCK = 1024


@triton.jit
def _activation_bwd_kernel(
    da_ptr, saved_ptr, dz_ptr, total, N, stride_am, stride_an,
    ACTIVATION: tl.constexpr, HAS_SAVED: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
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
    dz = activation_grad(da, saved, ACTIVATION)
    tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@remembered
def _launch(da: Tensor, saved: Tensor | None, dz: Tensor, activation: str) -> Call:
    total = dz.numel()
    return call(
        _activation_bwd_kernel, (cdiv(total, BLOCK),),
        da, saved, dz, total, da.shape[1], da.stride(0), da.stride(1),
        ACTIVATION=activation, HAS_SAVED=saved is not None, DENSE=da.is_contiguous(), BLOCK=BLOCK,
    )  # fmt: skip


def activation_bwd(da: Tensor, saved: Tensor | None, activation: str, *, dz: Tensor | None = None) -> Tensor:
    """Launch dZ = dA * f'; returns dZ, contiguous."""
    if dz is None:
        dz = torch.empty(da.shape, dtype=da.dtype, device=da.device)
    if dz.numel():
        _launch((da, saved, dz), (activation,))
    return dz
