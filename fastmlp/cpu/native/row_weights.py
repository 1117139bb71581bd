"""The losses with their options: rows that have weights, factors of classes, label smoothing, probabilities as targets.

The functions take what those of ``losses`` take. Every row has a sample weight, and every class a factor; what a step
does not have is the number 1, read with a stride of 0. The formulas are those of ``fastmlp.step.cpu_row_weights``, with
D the sum of the rows' weights. Where all weights are 1, labels give the bits of ``losses.cross_entropy``. Weights below
the smallest normal number are numbers here, as they are for the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .activations import exp, logistic
from .layout import DELTA, IGNORED, PER_CLASS, PER_CLASS_STEP, SMOOTHING
from .losses import _bce_with_logits, _huber, _l1, _mse, softmax_row
from .pointers import FLUSHES, float_control, inlined, moved, part, pointer, set_float_control


@inlined
def sum_of(weights: Any, weight_row: int, order: Any, ordered: int, m: int) -> float:
    """The sum of the rows' sample weights."""
    total = 0.0
    for i in range(m):
        total += weights[(order[i] if ordered else i) * weight_row]
    return total


def _keeping_small_numbers(loss: Callable[..., float]) -> Callable[..., float]:
    """The unit that computes ``loss`` without treating small numbers as 0, because weights may be that small."""
    compute = part(loss)

    def unit(
        a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
        da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
    ) -> float:  # fmt: skip
        before = float_control()
        set_float_control(before & ~FLUSHES)
        loss = compute(a, classes, values, row, column, order, ordered, m, c, da, weights, weight_row, net, hyper)
        set_float_control(before)
        return loss

    return unit


def _cross_entropy(
    a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
    da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
) -> float:  # fmt: skip
    """Of labels. Rows with the label ``IGNORED`` count for nothing."""
    per_class, of_class, ignored = pointer(net[PER_CLASS], a), net[PER_CLASS_STEP], net[IGNORED]
    smoothing = hyper[SMOOTHING]
    divisor, all_classes, loss = 0.0, 0.0, 0.0
    for i in range(m):
        place = order[i] if ordered else i
        label = classes[place * row]
        if label != ignored:
            divisor += float(weights[place * weight_row]) * per_class[label * of_class]
    for j in range(c):
        all_classes += per_class[j * of_class]
    for i in range(m):
        place = order[i] if ordered else i
        label, weight = classes[place * row], float(weights[place * weight_row])
        of_a, of_da = moved(a, i * c), moved(da, i * c)
        if label == ignored:
            for j in range(c):
                of_da[j] = 0.0
        else:
            total, largest = softmax_row(of_a, of_da, c)
            log_total = math.log(total) + largest
            hot = (1.0 - smoothing) * weight * per_class[label * of_class]
            loss += hot * (log_total - of_a[label])
            picked = of_da[label]
            if smoothing == 0.0:
                share = hot / (total * divisor)
                for j in range(c):
                    of_da[j] = of_da[j] * share
                of_da[label] = (picked / total - 1.0) * hot / divisor
            else:
                spread, smooth = smoothing * weight / c, 0.0
                mass = hot + spread * all_classes
                for j in range(c):
                    factor = float(per_class[j * of_class])
                    smooth += factor * (log_total - of_a[j])
                    of_da[j] = (of_da[j] / total * mass - spread * factor) / divisor
                loss += spread * smooth
                of_da[label] = (picked / total * mass - spread * per_class[label * of_class] - hot) / divisor
    return loss / divisor


def _probabilities(
    a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
    da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
) -> float:  # fmt: skip
    """Cross-entropy of probabilities."""
    per_class, of_class = pointer(net[PER_CLASS], a), net[PER_CLASS_STEP]
    confidence, spread = 1.0 - hyper[SMOOTHING], hyper[SMOOTHING] / c
    divisor, loss = sum_of(weights, weight_row, order, ordered, m), 0.0
    for i in range(m):
        place = order[i] if ordered else i
        weight, t = float(weights[place * weight_row]), moved(values, place * row)
        of_a, of_da = moved(a, i * c), moved(da, i * c)
        total, largest = softmax_row(of_a, of_da, c)
        log_total = math.log(total) + largest
        mass, part = 0.0, 0.0
        for j in range(c):
            q = (confidence * t[j * column] + spread) * per_class[j * of_class]
            mass += q
            part += q * (log_total - of_a[j])
        loss += weight * part
        for j in range(c):
            q = (confidence * t[j * column] + spread) * per_class[j * of_class]
            of_da[j] = (of_da[j] / total * mass - q) * weight / divisor
    return loss / divisor


def _softmax_squared_error(
    a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
    da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
) -> float:  # fmt: skip
    """|softmax(A) - onehot(y)|^2, mean over rows with sample weights."""
    divisor, loss = sum_of(weights, weight_row, order, ordered, m), 0.0
    for i in range(m):
        place = order[i] if ordered else i
        label, weight = classes[place * row], float(weights[place * weight_row])
        of_a, of_da = moved(a, i * c), moved(da, i * c)
        total, _ = softmax_row(of_a, of_da, c)
        squares, inner = 0.0, 0.0
        for j in range(c):
            p = of_da[j] / total
            g = p - (1.0 if j == label else 0.0)
            squares += g * g
            inner += g * p
        loss += weight * squares
        for j in range(c):
            p = of_da[j] / total
            g = p - (1.0 if j == label else 0.0)
            of_da[j] = p * (g - inner) * (2.0 * weight / divisor)
    return loss / divisor


def _mean_of_weighted_rows(term: Callable[[float, float, int, float], tuple[float, float]]) -> Callable[..., float]:
    """The loss with sample weights of which ``term`` gives an element's part and the element of dA."""

    def loss(
        a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
        da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
    ) -> float:  # fmt: skip
        divisor, total, d = c * sum_of(weights, weight_row, order, ordered, m), 0.0, hyper[DELTA]
        for i in range(m):
            place = order[i] if ordered else i
            weight, y = float(weights[place * weight_row]), moved(values, place * row)
            of_a, of_da = moved(a, i * c), moved(da, i * c)
            for j in range(c):
                part, slope = term(float(of_a[j]), float(y[j * column]), 1, d)
                of_da[j] = slope * weight / divisor
                total += weight * part
        return total / divisor

    return loss


def _positive_bce(
    a: Any, classes: Any, values: Any, row: int, column: int, order: Any, ordered: int, m: int, c: int,
    da: Any, weights: Any, weight_row: int, net: Any, hyper: Any,
) -> float:  # fmt: skip
    """Sigmoid NLL of logits with a factor p of the terms with y.

    l = (1 - y) a + t log(1 + e^-a) and dA = t sigmoid(a) - p y, with t = 1 - y + p y.
    """
    per_class, of_class = pointer(net[PER_CLASS], a), net[PER_CLASS_STEP]
    divisor, total = c * sum_of(weights, weight_row, order, ordered, m), 0.0
    for i in range(m):
        place = order[i] if ordered else i
        weight, of_y = float(weights[place * weight_row]), moved(values, place * row)
        of_a, of_da = moved(a, i * c), moved(da, i * c)
        for j in range(c):
            x, y = float(of_a[j]), float(of_y[j * column])
            positive = y * per_class[j * of_class]
            factor = (positive - y) + 1.0
            # log(1 + e^-a) = log(1 + e^-|a|) - min(a, 0)
            log_1p = math.log1p(exp(-abs(x))) - (x if x < 0.0 else 0.0)
            total += weight * (factor * log_1p + (x - x * y))
            of_da[j] = (factor * logistic(x) - positive) * weight / divisor
    return total / divisor


mse, l1, huber, bce_with_logits = (
    _keeping_small_numbers(_mean_of_weighted_rows(term)) for term in (_mse, _l1, _huber, _bce_with_logits)
)
cross_entropy, probabilities, softmax_squared_error, positive_bce = map(
    _keeping_small_numbers, (_cross_entropy, _probabilities, _softmax_squared_error, _positive_bce)
)
