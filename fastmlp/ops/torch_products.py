"""The three matrix products of a linear layer on plain torch, for modules and functions.

``fastmlp.cpu`` makes large products on a CPU by the faster library. It also says which 16 bits the processor cannot
multiply; such operands are widened to float32. (A training step plans its products ahead, on buffers; the functions
here ask at every call.) aten makes the products that are small or not contiguous, and those that somebody else observes
(torch.compile, a transform of torch.func, a dispatch mode, a subclass of Tensor), because all observers know aten's
operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from ..activations import ACTIVATIONS
from ..backend import functorch_active, watched

#: Multiplications of a product that repay asking which library is faster: 64 rows and a layer of 256 x 256.
_LARGE = 1 << 22


def _unseen(a: Tensor, b: Tensor) -> bool:
    """Whether nobody else observes which operators run on these tensors of a CPU."""
    return a.device.type == "cpu" and not (watched(a, b) or functorch_active())


def wide_dtype(a: Tensor, b: Tensor) -> torch.dtype | None:
    """float32 for 16 bits that the processor cannot multiply, where nobody observes it; else None."""
    if not _unseen(a, b):
        return None
    wide = cpu.product_dtype(a.dtype, a.device)
    return None if wide == a.dtype else wide


def _may_choose(multiplications: int, a: Tensor, b: Tensor) -> bool:
    """Whether ``fastmlp.cpu`` makes the product."""
    return multiplications >= _LARGE and _unseen(a, b) and a.is_contiguous() and b.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """f(X W^T + b), new memory; ``activation`` is one that oneDNN has (``Activation.epilogue``)."""
    if weight.dtype.itemsize == 2 and (wide := wide_dtype(x, weight)) is not None:
        wide_b = None if bias is None else bias.to(wide)
        return linear(x.to(wide), weight.to(wide), wide_b, activation).to(weight.dtype)
    if _may_choose(x.size(0) * weight.numel(), x, weight):
        return cpu.linear(x.size(0), weight, bias, activation)(x)
    return ACTIVATIONS[activation].overwrite(torch.nn.functional.linear(x, weight, bias))


def dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dZ W, new memory."""
    if weight.dtype.itemsize == 2 and (wide := wide_dtype(dz, weight)) is not None:
        return dgrad(dz.to(wide), weight.to(wide)).to(weight.dtype)
    if _may_choose(dz.size(0) * weight.numel(), dz, weight):
        return cpu.dgrad(dz.size(0), weight)(dz)
    return torch.mm(dz, weight)


def wgrad(dz: Tensor, x: Tensor) -> Tensor:
    """dZ^T X, new memory."""
    if dz.dtype.itemsize == 2 and (wide := wide_dtype(dz, x)) is not None:
        return wgrad(dz.to(wide), x.to(wide)).to(dz.dtype)
    if x.size(0) == 1:  # one product per element, which BLAS computes several times as slowly
        return torch.outer(dz[0], x[0])  # contiguous also where N or K is 1, unlike dz.t() * x
    if _may_choose(dz.size(1) * x.numel(), dz, x):
        return cpu.wgrad(x.size(0), dz.size(1), x.size(1), dz.dtype)(dz, x)
    return torch.mm(dz.t(), x)
