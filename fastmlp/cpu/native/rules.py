"""The optimizers: the update of one parameter, or of a part of it, in the dtype of the parameter.

Each function takes the parameter w, its gradient g and its states, all of ``count`` elements, a factor of the gradient
(clipping, and the sign of ``maximize``), the learning rate, the weight decay, the number of the update, and the rule's
numbers ``p``, which ``Optimizer.numbers`` lists. The docstring of each function names these numbers in their order.
"""

from __future__ import annotations

import math
from typing import Any

from .pointers import number


def sgd(
    w: Any, g: Any, first: Any, second: Any, third: Any, count: int, scale: float, lr: float, wd: float, t: float,
    p: Any,
) -> None:  # fmt: skip
    """momentum, nesterov."""
    factor, rate, decay, momentum = number(scale, w), number(lr, w), number(wd, w), number(p[0], w)
    if p[0] == 0.0:
        for i in range(count):
            w[i] = w[i] - rate * (factor * g[i] + decay * w[i])
    elif p[1] == 0.0:
        for i in range(count):
            velocity = momentum * first[i] + (factor * g[i] + decay * w[i])
            first[i] = velocity
            w[i] = w[i] - rate * velocity
    else:
        for i in range(count):
            gradient = factor * g[i] + decay * w[i]
            velocity = momentum * first[i] + gradient
            first[i] = velocity
            w[i] = w[i] - rate * (gradient + momentum * velocity)


def adam(
    w: Any, g: Any, first: Any, second: Any, third: Any, count: int, scale: float, lr: float, wd: float, t: float,
    p: Any,
) -> None:  # fmt: skip
    """beta1, beta2, eps, amsgrad, whether the weight decay is no part of the gradient."""
    factor, part1, beta2, part2 = number(scale, w), number(1.0 - p[0], w), number(p[1], w), number(1.0 - p[1], w)
    rate, eps = number(lr / (1.0 - p[0] ** t), w), number(p[2], w)
    root = number(1.0 / math.sqrt(1.0 - p[1] ** t), w)
    decay = number(0.0 if p[4] else wd, w)
    shrink = number(1.0 - lr * wd if p[4] else 1.0, w)
    if p[3] == 0.0:
        for i in range(count):
            gradient = factor * g[i] + decay * w[i]
            mean = first[i] + part1 * (gradient - first[i])
            square = beta2 * second[i] + part2 * gradient * gradient
            first[i] = mean
            second[i] = square
            w[i] = shrink * w[i] - rate * (mean / (math.sqrt(square) * root + eps))
    else:
        for i in range(count):
            gradient = factor * g[i] + decay * w[i]
            mean = first[i] + part1 * (gradient - first[i])
            square = beta2 * second[i] + part2 * gradient * gradient
            first[i] = mean
            second[i] = square
            largest = third[i] if third[i] > square else square
            third[i] = largest
            w[i] = shrink * w[i] - rate * (mean / (math.sqrt(largest) * root + eps))


def rmsprop(
    w: Any, g: Any, first: Any, second: Any, third: Any, count: int, scale: float, lr: float, wd: float, t: float,
    p: Any,
) -> None:  # fmt: skip
    """alpha, eps, momentum, centered. The states are the mean square, with ``centered`` the mean, and the momentum."""
    factor, rate, decay = number(scale, w), number(lr, w), number(wd, w)
    part, eps, momentum = number(1.0 - p[0], w), number(p[1], w), number(p[2], w)
    centered, moves = p[3] != 0.0, p[2] != 0.0
    velocity = third if centered else second
    for i in range(count):
        gradient = factor * g[i] + decay * w[i]
        square = first[i] + part * (gradient * gradient - first[i])
        first[i] = square
        if centered:
            mean = second[i] + part * (gradient - second[i])
            second[i] = mean
            square = square - mean * mean
        change = gradient / (math.sqrt(square) + eps)
        if moves:
            change = momentum * velocity[i] + change
            velocity[i] = change
        w[i] = w[i] - rate * change


def lion(
    w: Any, g: Any, first: Any, second: Any, third: Any, count: int, scale: float, lr: float, wd: float, t: float,
    p: Any,
) -> None:  # fmt: skip
    """beta1, beta2."""
    factor, rate, decay = number(scale, w), number(lr, w), number(wd, w)
    part1, part2 = number(1.0 - p[0], w), number(1.0 - p[1], w)
    zero, one = number(0.0, w), number(1.0, w)
    for i in range(count):
        gradient = factor * g[i]
        mean = first[i] + part1 * (gradient - first[i])
        sign = one if mean > zero else (-one if mean < zero else zero * mean)
        first[i] = first[i] + part2 * (gradient - first[i])
        w[i] = w[i] - rate * (sign + decay * w[i])


#: The same function: the last of its numbers tells the two apart.
adamw = adam
