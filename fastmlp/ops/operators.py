"""What the operators ``fastmlp::*`` of ``compiled`` and ``compiled_losses`` share.

An operator returns tensors only: where a launcher returns None, the operator returns an empty tensor. It checks its
arguments, also when a compiler asks for the shapes of its results, because a program that was loaded from a file calls
it without ``fastmlp.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backend import KERNEL_DTYPES

__all__ = ["check_dtype", "check_like", "check_shape", "derivatives", "or_empty", "or_none"]


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns for a tensor or None."""
    return like.new_empty(0) if t is None else t


def or_none(t: Tensor, wanted: bool) -> Tensor | None:
    """What ``or_empty`` was given."""
    return t if wanted else None


def check_dtype(name: str, t: Tensor) -> None:
    """RuntimeError unless the kernels compute in the tensor's dtype."""
    torch._check(
        t.dtype in KERNEL_DTYPES,
        lambda: f"expected {name} in float32, float16 or bfloat16, got {t.dtype}; convert it with .float()",
    )


def check_shape(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """RuntimeError unless the tensor has the shape."""
    torch._check(
        t.dim() == len(shape), lambda: f"expected {name} of {len(shape)} dimensions {list(shape)}, got {list(t.shape)}"
    )
    for got, expected in zip(t.shape, shape, strict=True):
        torch._check(got == expected, lambda: f"expected {name} of shape {list(shape)}, got {list(t.shape)}")


def check_like(name: str, t: Tensor, other: Tensor, *dtypes: torch.dtype) -> None:
    """RuntimeError unless the tensor is on the device of ``other`` and in its dtype, or one of ``dtypes``."""
    torch._check(
        t.device == other.device, lambda: f"expected {name} on {other.device} like the other tensors, got {t.device}"
    )
    torch._check(
        t.dtype == other.dtype or t.dtype in dtypes, lambda: f"expected {name} in {other.dtype}, got {t.dtype}"
    )


def derivatives(
    formula: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of those inputs of a formula that need one; torch differentiates the formula.

    The formula is in plain torch. With ``create_graph=True`` the gradients can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Two inputs may be one tensor, and each gets the gradient of its own place.
        own = [None if t is None else t.view_as(t) for t in inputs]
        pairs = [
            (out, g)
            for out, g in zip(formula(*own), grads, strict=True)
            if out is not None and g is not None and out.requires_grad
        ]
    wanted = [t if need else None for t, need in zip(own, needs, strict=True)]
    asked = [t for t in wanted if t is not None]
    if not pairs or not asked:
        return [None] * len(own)
    outputs, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, asked, upstream, create_graph=again, allow_unused=True))
    return [None if t is None else next(found) for t in wanted]
