"""The activations, computed in float64 and rounded once.

No function has a branch, and each activation has one pointer, so that LLVM computes several elements at once. With two
pointers it checks first that their memory does not overlap, and where f is in place, it does. e^x is 2^n (1 + p) with
p = e^r - 1 by its series, |r| <= log(2) / 2. The normal distribution's tail comes from a polynomial for
e^(y^2) erfc(y) in t = (y - C) / (y + C).
"""

from __future__ import annotations

import math
from typing import Any

from .erfcx import CENTER, COEFFICIENTS
from .pointers import inlined, number, polynomial, power_of_two

_LOG2_E = 1 / math.log(2)
#: log(2) as a number with few digits, whose products with small integers are exact, and the rest.
_LOG_2, _LOG_2_REST = 0.693147180369123816490, 1.90821492927058770002e-10
#: Added to a small number, it leaves the nearest integer in the last digits.
_ROUNDS = 6755399441055744.0
_LARGEST, _SMALLEST = 709.782712893384, -708.3964185322641
_INFINITY = math.inf
SLOPE = 0.01
_ROOT_HALF = math.sqrt(0.5)
#: (e^r - 1 - r) / r^2 in r, and e^(y^2) erfc(y) in t.
_series = polynomial([1 / math.factorial(i) for i in range(13, 1, -1)])
_scaled_erfc = polynomial(COEFFICIENTS)


@inlined
def exp_parts(x: float) -> tuple[float, float]:
    """2^n and p, with e^x = 2^n (1 + p), for ``_SMALLEST`` <= x <= ``_LARGEST``."""
    shifted = x * _LOG2_E + _ROUNDS
    n = shifted - _ROUNDS
    r = (x - n * _LOG_2) - n * _LOG_2_REST
    return power_of_two(shifted), r + r * r * _series(r)


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
    density = exp(-0.5 * z * z)
    tail = 0.5 * density * _scaled_erfc(t)
    return (tail if z < 0.0 else 1.0 - tail), density


# f: z[i] becomes f(z[i]) for all i < count.


def sigmoid(z: Any, count: int) -> None:
    """1 / (1 + e^-Z)."""
    for i in range(count):
        z[i] = logistic(z[i])


def relu(z: Any, count: int) -> None:
    """max(Z, 0), NaN where Z is."""
    zero = number(0.0, z)
    for i in range(count):
        z[i] = zero if z[i] <= zero else z[i]


def tanh(z: Any, count: int) -> None:
    """tanh(Z)."""
    for i in range(count):
        z[i] = hyperbolic_tangent(z[i])


def step(z: Any, count: int) -> None:
    """1 where Z >= 0, else 0."""
    for i in range(count):
        z[i] = 1.0 if z[i] >= 0.0 else 0.0


def leaky_relu(z: Any, count: int) -> None:
    """Z, or a hundredth of it below 0."""
    for i in range(count):
        z[i] = z[i] * (1.0 if z[i] > 0.0 else SLOPE)


def gelu(z: Any, count: int) -> None:
    """Z times the normal distribution below Z."""
    for i in range(count):
        x = float(z[i])
        below, _ = normal(x)
        z[i] = x * below


def silu(z: Any, count: int) -> None:
    """Z / (1 + e^-Z)."""
    for i in range(count):
        x = float(z[i])
        z[i] = x * logistic(x)
