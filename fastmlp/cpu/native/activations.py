"""The activations and their derivatives, computed in float64 and rounded once.

All functions are without branches, so that LLVM computes several elements at once. e^x is 2^n (1 + p) with
p = e^r - 1 by its series, |r| <= log(2) / 2. The normal distribution's tail comes from a polynomial for
e^(y^2) erfc(y) in t = (y - C) / (y + C).
"""

from __future__ import annotations

import math
from typing import Any

from .erfcx import CENTER, COEFFICIENTS
from .pointers import inlined, number, power_of_two

_LOG2_E = 1 / math.log(2)
#: log(2) as a number with few digits, whose products with small integers are exact, and the rest.
_LOG_2, _LOG_2_REST = 0.693147180369123816490, 1.90821492927058770002e-10
#: Added to a small number, it leaves the nearest integer in the last digits.
_ROUNDS = 6755399441055744.0
_LARGEST, _SMALLEST = 709.782712893384, -708.3964185322641
_INFINITY = math.inf
_SLOPE = 0.01
_ROOT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
(_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13) = (1 / math.factorial(i) for i in range(2, 14))


@inlined
def exp_parts(x: float) -> tuple[float, float]:
    """2^n and p, with e^x = 2^n (1 + p), for ``_SMALLEST`` <= x <= ``_LARGEST``."""
    shifted = x * _LOG2_E + _ROUNDS
    n = shifted - _ROUNDS
    r = (x - n * _LOG_2) - n * _LOG_2_REST
    p = _C12 + r * _C13
    p = _C11 + r * p
    p = _C10 + r * p
    p = _C9 + r * p
    p = _C8 + r * p
    p = _C7 + r * p
    p = _C6 + r * p
    p = _C5 + r * p
    p = _C4 + r * p
    p = _C3 + r * p
    p = _C2 + r * p
    return power_of_two(shifted), r + r * r * p


@inlined
def exp(x: float) -> float:
    """e^x; results below the smallest normal number are 0."""
    inside = _LARGEST if x > _LARGEST else x
    inside = _SMALLEST if inside < _SMALLEST else inside
    power, p = exp_parts(inside)
    value = power + power * p
    value = _INFINITY if x > _LARGEST else value
    return 0.0 if x < _SMALLEST else value


@inlined
def logistic(z: float) -> float:
    """1 / (1 + e^-z)."""
    return 1.0 / (1.0 + exp(-z))


@inlined
def hyperbolic_tangent(z: float) -> float:
    """(e^2|z| - 1) / (e^2|z| + 1) with the sign of z."""
    x = -z if z < 0.0 else z
    x = 20.0 if x > 20.0 else x
    power, p = exp_parts(x + x)
    less_one = (power - 1.0) + power * p
    value = less_one / (less_one + 2.0)
    return -value if z < 0.0 else value


@inlined
def normal(z: float) -> tuple[float, float]:
    """The normal distribution below z, and e^(-z^2 / 2)."""
    y = (-z if z < 0.0 else z) * _ROOT_HALF
    y = 40.0 if y > 40.0 else y
    t = (y - CENTER) / (y + CENTER)
    tail = 0.0
    for c in COEFFICIENTS:
        tail = tail * t + c
    density = exp(-0.5 * z * z)
    tail = 0.5 * density * tail
    return (tail if z < 0.0 else 1.0 - tail), density


# f: a[i] = f(z[i]) for all i < count. a and z are the same memory, unless f' needs Z.


def sigmoid(z: Any, a: Any, count: int) -> None:
    """A = 1 / (1 + e^-Z)."""
    for i in range(count):
        a[i] = logistic(z[i])


def relu(z: Any, a: Any, count: int) -> None:
    """A = max(Z, 0), NaN where Z is."""
    zero = number(0.0, z)
    for i in range(count):
        a[i] = zero if z[i] <= zero else z[i]


def tanh(z: Any, a: Any, count: int) -> None:
    """A = tanh(Z)."""
    for i in range(count):
        a[i] = hyperbolic_tangent(z[i])


def step(z: Any, a: Any, count: int) -> None:
    """A = 1 where Z >= 0, else 0."""
    for i in range(count):
        a[i] = 1.0 if z[i] >= 0.0 else 0.0


def leaky_relu(z: Any, a: Any, count: int) -> None:
    """A = Z, or a hundredth of it below 0."""
    for i in range(count):
        a[i] = z[i] * (1.0 if z[i] > 0.0 else _SLOPE)


def gelu(z: Any, a: Any, count: int) -> None:
    """A = Z times the normal distribution below Z."""
    for i in range(count):
        x = float(z[i])
        below, _ = normal(x)
        a[i] = x * below


def silu(z: Any, a: Any, count: int) -> None:
    """A = Z / (1 + e^-Z)."""
    for i in range(count):
        x = float(z[i])
        a[i] = x * logistic(x)


# f': da[i] becomes da[i] f', with f' from saved[i], which is Z or A.


def sigmoid_grad(saved: Any, da: Any, count: int) -> None:
    """f' = A (1 - A)."""
    for i in range(count):
        a = float(saved[i])
        da[i] = da[i] * (a * (1.0 - a))


def relu_grad(saved: Any, da: Any, count: int) -> None:
    """f' = 1 where A > 0, else 0."""
    zero = number(0.0, da)
    for i in range(count):
        da[i] = zero if saved[i] <= zero else da[i]


def tanh_grad(saved: Any, da: Any, count: int) -> None:
    """f' = 1 - A^2."""
    for i in range(count):
        a = float(saved[i])
        da[i] = da[i] * (1.0 - a * a)


def step_grad(saved: Any, da: Any, count: int) -> None:
    """f' = 0."""
    for i in range(count):
        da[i] = 0.0


def leaky_relu_grad(saved: Any, da: Any, count: int) -> None:
    """f' = 1, or a hundredth where A <= 0."""
    for i in range(count):
        da[i] = da[i] * (1.0 if saved[i] > 0.0 else _SLOPE)


def gelu_grad(saved: Any, da: Any, count: int) -> None:
    """f' is the normal distribution below Z, plus Z times its density."""
    for i in range(count):
        x = float(saved[i])
        below, density = normal(x)
        da[i] = da[i] * (below + x * (density * _DENSITY))


def silu_grad(saved: Any, da: Any, count: int) -> None:
    """f' = s (1 + Z (1 - s)) with s = 1 / (1 + e^-Z)."""
    for i in range(count):
        x = float(saved[i])
        s = logistic(x)
        da[i] = da[i] * (s * (1.0 + x * (1.0 - s)))
