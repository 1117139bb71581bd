"""The three matrix products of a linear layer on plain torch, for modules and functions.

On a CPU the library that is faster at a shape multiplies, aten's BLAS or oneDNN, and 16 bits that the processor cannot
multiply are widened to float32: ``fastmlp.cpu.gemm`` knows both. (A training step plans with it ahead, on buffers; the
functions here ask at every call.) What is small, not contiguous, or seen by somebody else (torch.compile, a transform
of torch.func, a dispatch mode, a subclass of Tensor) goes to aten, whose operators all of them know.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from ..activations import ACTIVATIONS
from ..backend import functorch_active
from ..cpu import gemm

__all__ = ["dgrad", "linear", "wgrad"]

#: Multiplications of a product that repay asking which library is faster: 64 rows and a layer of 256 x 256.
_LARGE = 1 << 22
_PLAIN = (Tensor, Parameter)


def _unseen(a: Tensor, b: Tensor) -> bool:
    """Whether the operators that run on these tensors are this function's own business."""
    return (
        not torch.compiler.is_compiling()
        and a.device.type == "cpu"
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not functorch_active()
    )


def _wide(a: Tensor, b: Tensor) -> torch.dtype | None:
    """float32 for 16 bits that the processor cannot multiply, where that is this function's to choose; else None."""
    if not _unseen(a, b):
        return None
    wide = gemm.product_dtype(a.dtype, a.device)
    return None if wide == a.dtype else wide


def _may_choose(a: Tensor, b: Tensor) -> bool:
    """Whether the library is this function's to choose, for a product that is large enough."""
    return _unseen(a, b) and a.is_contiguous() and b.is_contiguous()


def _chosen(library: gemm.Library) -> gemm.Library:
    """What was measured to find out is kept for later processes."""
    gemm.keep_choices()
    return library


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """f(X W^T + b), new memory; ``activation`` is one that oneDNN has (``Activation.epilogue``)."""
    if weight.dtype.itemsize == 2 and (wide := _wide(x, weight)) is not None:
        wide_b = None if bias is None else bias.to(wide)
        return linear(x.to(wide), weight.to(wide), wide_b, activation).to(weight.dtype)
    f = ACTIVATIONS[activation]
    if (
        x.size(0) * weight.numel() >= _LARGE
        and _may_choose(x, weight)
        and _chosen(gemm.linear_library(x.size(0), weight, bias, activation)) == "onednn"
    ):
        return gemm.onednn_linear(x, weight, bias, f.epilogue or "none")
    return f.overwrite(torch.nn.functional.linear(x, weight, bias))


def dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dZ W, new memory."""
    if weight.dtype.itemsize == 2 and (wide := _wide(dz, weight)) is not None:
        return dgrad(dz.to(wide), weight.to(wide)).to(weight.dtype)
    if (
        dz.size(0) * weight.numel() >= _LARGE
        and _may_choose(dz, weight)
        and _chosen(gemm.dgrad_library(dz.size(0), weight)) == "onednn"
    ):
        return gemm.onednn_linear(dz, weight.t(), None, "none")
    return torch.mm(dz, weight)


def wgrad(dz: Tensor, x: Tensor) -> Tensor:
    """dZ^T X, new memory."""
    if dz.dtype.itemsize == 2 and (wide := _wide(dz, x)) is not None:
        return wgrad(dz.to(wide), x.to(wide)).to(dz.dtype)
    m = x.size(0)
    if m == 1:  # one product an element, which BLAS computes several times as slowly
        return torch.mul(dz.t(), x)
    if (
        dz.size(1) * x.numel() >= _LARGE
        and _may_choose(dz, x)
        and _chosen(gemm.wgrad_library(m, x.size(1), dz.size(1), dz.dtype)) == "onednn"
    ):
        return gemm.onednn_wgrad(dz, x)
    return torch.mm(dz.t(), x)
