"""The three matrix products of a linear layer on plain torch, for modules and functions.

On a CPU the library that is faster at a shape multiplies, aten's BLAS or oneDNN, and 16 bits that the processor cannot
multiply are widened to float32: ``fastmlp.cpu_gemm`` knows both. (A training step plans with it ahead, on buffers; the
functions here ask at every call.) What is small, not contiguous, or seen by somebody else (torch.compile, a transform
of torch.func, a dispatch mode, a subclass of Tensor) goes to aten, whose operators all of them know.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cpu_gemm
from .backend import functorch_active

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


def _product_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """``cpu_gemm.product_dtype`` where it is this function's to choose, else the operands' own."""
    return cpu_gemm.product_dtype(a.dtype) if a.dtype.itemsize == 2 and _unseen(a, b) else a.dtype


def _may_choose(work: int, a: Tensor, b: Tensor) -> bool:
    """Whether it is worth asking for the faster library, with ``work`` multiplications."""
    return work >= _LARGE and _unseen(a, b) and a.is_contiguous() and b.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """f(X W^T + b), new memory; ``activation`` is one of ``cpu_gemm.EPILOGUES``."""
    wide = _product_dtype(x, weight)
    if wide != weight.dtype:
        wide_b = None if bias is None else bias.to(wide)
        return linear(x.to(wide), weight.to(wide), wide_b, activation).to(weight.dtype)
    epilogue = cpu_gemm.EPILOGUES[activation]
    if _may_choose(x.shape[0] * weight.numel(), x, weight):
        library = cpu_gemm.linear_library(x.shape[0], weight, bias, epilogue)
        cpu_gemm.keep_choices()
        if library == "onednn":
            return cpu_gemm.onednn_linear(x, weight, bias, epilogue)
    z = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return cpu_gemm.finished(z, epilogue)


def dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dZ W, new memory."""
    wide = _product_dtype(dz, weight)
    if wide != weight.dtype:
        return dgrad(dz.to(wide), weight.to(wide)).to(weight.dtype)
    if _may_choose(dz.shape[0] * weight.numel(), dz, weight):
        library = cpu_gemm.dgrad_library(dz.shape[0], weight)
        cpu_gemm.keep_choices()
        if library == "onednn":
            return cpu_gemm.onednn_linear(dz, weight.t(), None, "none")
    return torch.mm(dz, weight)


def wgrad(dz: Tensor, x: Tensor) -> Tensor:
    """dZ^T X, new memory."""
    wide = _product_dtype(dz, x)
    if wide != dz.dtype:
        return wgrad(dz.to(wide), x.to(wide)).to(dz.dtype)
    (m, n), k = dz.shape, x.shape[1]
    if _may_choose(m * n * k, dz, x):
        library = cpu_gemm.wgrad_library(m, k, n, dz.dtype)
        cpu_gemm.keep_choices()
        if library == "onednn":
            return cpu_gemm.onednn_wgrad(dz, x)
    return torch.mm(dz.t(), x)
