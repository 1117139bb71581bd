"""Settings of an ensemble: one number per member, with which torch's schedulers compute."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: The settings that may differ between the members of an ensemble.
SETTINGS = frozenset({"lr", "momentum", "weight_decay"})


class PerMember(tuple[float, ...]):
    """One float per member; ``*``, ``/``, ``+``, ``-`` and ``**`` with a number, or as many numbers, go elementwise.

    A scheduler multiplies a learning rate by its factor, and here multiplies each member's. A scheduler that asks for
    one number (``float``) raises TypeError.
    """

    __slots__ = ()

    def _each(self, other: Any, compute: Callable[[float, float], float]) -> PerMember:
        if isinstance(other, Tensor) and other.dim() == 0:
            other = other.item()
        if not isinstance(other, Iterable):
            return PerMember(compute(value, other) for value in self)
        others = tuple(other)
        if len(others) != len(self):
            raise ValueError(f"expected a number, or {len(self)} numbers, one per member, got {len(others)}")
        return PerMember(map(compute, self, others))

    def __mul__(self, other: Any) -> PerMember:
        return self._each(other, operator.mul)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> PerMember:
        return self._each(other, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> PerMember:
        return self._each(other, operator.sub)

    def __rsub__(self, other: Any) -> PerMember:
        return self._each(other, lambda value, first: first - value)

    def __truediv__(self, other: Any) -> PerMember:
        return self._each(other, operator.truediv)

    def __pow__(self, other: Any) -> PerMember:
        return self._each(other, operator.pow)

    def __float__(self) -> float:
        raise TypeError(
            f"expected one learning rate, got one per member: {tuple(self)}; a scheduler that needs one number does "
            "not fit an ensemble with several, one that multiplies does"
        )

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (tuple(self),)


def across(value: Any, like: Tensor) -> Any:
    """A setting in a form that computes with ``like``, whose last dimension is the members: a number or a tensor."""
    if not isinstance(value, PerMember):
        return value
    numbers = torch.tensor(value, dtype=like.dtype, device="cpu")
    return numbers.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else numbers.to(like.device)


def least(value: Any) -> float:
    """The smallest number of a setting."""
    return min(value) if isinstance(value, PerMember) else value
