"""The derivatives of the activations, computed in float64 and rounded once: da[i] becomes da[i] f'.

f' comes from saved[i], which is Z or A. Its memory does not overlap that of da, so that LLVM computes several elements
at once.
"""

from __future__ import annotations

import math
from typing import Any

from .activations import SLOPE, logistic, normal
from .pointers import number

_DENSITY = 1 / math.sqrt(2 * math.pi)


def sigmoid(saved: Any, da: Any, count: int) -> None:
    """f' = A (1 - A)."""
    for i in range(count):
        a = float(saved[i])
        da[i] = da[i] * (a * (1.0 - a))


def relu(saved: Any, da: Any, count: int) -> None:
    """f' = 1 where A > 0, else 0."""
    zero = number(0.0, da)
    for i in range(count):
        da[i] = zero if saved[i] <= zero else da[i]


def tanh(saved: Any, da: Any, count: int) -> None:
    """f' = 1 - A^2."""
    for i in range(count):
        a = float(saved[i])
        da[i] = da[i] * (1.0 - a * a)


def step(saved: Any, da: Any, count: int) -> None:
    """f' = 0."""
    for i in range(count):
        da[i] = 0.0


def leaky_relu(saved: Any, da: Any, count: int) -> None:
    """f' = 1, or a hundredth where A <= 0."""
    for i in range(count):
        da[i] = da[i] * (1.0 if saved[i] > 0.0 else SLOPE)


def gelu(saved: Any, da: Any, count: int) -> None:
    """f' is the normal distribution below Z, plus Z times its density."""
    for i in range(count):
        x = float(saved[i])
        below, density = normal(x)
        da[i] = da[i] * (below + x * (density * _DENSITY))


def silu(saved: Any, da: Any, count: int) -> None:
    """f' = s (1 + Z (1 - s)) with s = 1 / (1 + e^-Z)."""
    for i in range(count):
        x = float(saved[i])
        s = logistic(x)
        da[i] = da[i] * (s * (1.0 + x * (1.0 - s)))
