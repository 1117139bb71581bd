"""The losses: the mean, and dA of the last layer. Terms are added up in float64, row by row.

Each function takes A [m, c], the targets with their strides in elements, the numbers of their rows or null, where dA
goes, the sample weights with their stride, and the description of the network (``layout``). The formulas are those of
``fastmlp.step.cpu_losses``. Here rows and classes have no weights; ``row_weights`` has the losses in which they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .activations import exp, logistic
from .layout import DELTA
from .pointers import inlined, moved


@inlined
def softmax_row(a: Any, p: Any, c: int) -> tuple[float, float]:
    """Write softmax(a) times the returned sum; also returns the largest element."""
    largest = float(a[0])
    for j in range(1, c):
        if a[j] > largest:
            largest = float(a[j])
    for j in range(c):
        p[j] = exp(float(a[j]) - largest)
    total = 0.0
    for j in range(c):
        total += p[j]
    return total, largest


def cross_entropy(
    a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
    da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
) -> float:  # fmt: skip
    """-log softmax(A)[y], mean over rows."""
    loss = 0.0
    for i in range(m):
        label = classes[(order[i] if ordered else i) * row]
        of_a, of_da = moved(a, i * c), moved(da, i * c)
        total, largest = softmax_row(of_a, of_da, c)
        loss += (math.log(total) + largest) - of_a[label]
        share = 1.0 / (total * m)
        picked = of_da[label]
        for j in range(c):
            of_da[j] = of_da[j] * share
        of_da[label] = (picked / total - 1.0) / m
    return loss / m


def softmax_squared_error(
    a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
    da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
) -> float:  # fmt: skip
    """|softmax(A) - onehot(y)|^2, mean over rows."""
    loss = 0.0
    for i in range(m):
        label = classes[(order[i] if ordered else i) * row]
        of_a, of_da = moved(a, i * c), moved(da, i * c)
        total, _ = softmax_row(of_a, of_da, c)
        inner = 0.0
        for j in range(c):
            p = of_da[j] / total
            g = p - (1.0 if j == label else 0.0)
            loss += g * g
            inner += g * p
        for j in range(c):
            p = of_da[j] / total
            g = p - (1.0 if j == label else 0.0)
            of_da[j] = p * (g - inner) * (2.0 / m)
    return loss / m


@inlined
def _mse(a: float, y: float, count: int, d: float) -> tuple[float, float]:
    """(A - y)^2."""
    difference = a - y
    return difference * difference, difference * (2.0 / count)


@inlined
def _l1(a: float, y: float, count: int, d: float) -> tuple[float, float]:
    """|A - y|."""
    difference = a - y
    return abs(difference), ((difference > 0.0) - (difference < 0.0)) / count


@inlined
def _huber(a: float, y: float, count: int, d: float) -> tuple[float, float]:
    """Half the squared difference up to delta, linear beyond."""
    difference = a - y
    clamped = d if difference > d else difference
    clamped = -d if clamped < -d else clamped
    return clamped * (difference - 0.5 * clamped), clamped / count


@inlined
def _bce_with_logits(a: float, y: float, count: int, d: float) -> tuple[float, float]:
    """Sigmoid NLL of logits."""
    above = 0.0 if a < 0.0 else a
    return (above - a * y) + math.log1p(exp(-abs(a))), (logistic(a) - y) / count


def _mean_over_elements(term: Callable[[float, float, int, float], tuple[float, float]]) -> Callable[..., float]:
    """The loss of which ``term`` gives an element's part and the element of dA."""

    def loss(
        a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
        da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
    ) -> float:  # fmt: skip
        total, count, d = 0.0, m * c, hyper[DELTA]
        for i in range(m):
            y = moved(values, (order[i] if ordered else i) * row)
            of_a, of_da = moved(a, i * c), moved(da, i * c)
            for j in range(c):
                part, of_da[j] = term(float(of_a[j]), float(y[j * column]), count, d)
                total += part
        return total / count

    return loss


mse, l1, huber, bce_with_logits = map(_mean_over_elements, (_mse, _l1, _huber, _bce_with_logits))
