"""The whole training step, and many of them, as one function: gather, forward, loss, backward, update.

``layout`` says what ``net`` and ``hyper`` contain. The backward pass takes a block of rows of a weight at a time: first
its part of dX, then its gradient and its update, so that the block is read from memory once.
"""

from __future__ import annotations

import math
from typing import Any

from .layout import (
    ACTIVATE,
    AVERAGE,
    AVERAGES,
    BIAS,
    BLOCK,
    CLASSES,
    CLIPS,
    COUNTS,
    DA,
    DA_NEXT,
    DB,
    DELTA,
    DERIVE,
    DW,
    EMA,
    EMA_WARMS,
    FORWARD,
    GRADIENT,
    GROUP,
    GROUPS,
    HEADER,
    LAYERS,
    LOSS,
    LOWEST,
    MAX_NORM,
    NUMBERS,
    OF_GROUPS,
    PARAMETER,
    PIXELS,
    PLAIN,
    PRODUCT,
    PRODUCTS,
    READY,
    RECORD,
    RULE,
    SIGN,
    STATES,
    TRAINED,
    TRANSPOSED,
    WEIGHT,
    A,
    K,
    N,
    X,
    Z,
)
from .pointers import call, inlined, moved, number, part, pointer
from .tiles import dots_1


@part
def gathered(
    net: Any, x: Any, pixels: Any, how: int, row: int, column: int, order: Any, ordered: int, m: int, k: int
) -> Any:
    """X [m, k] with contiguous rows: ``x`` itself, or a copy of the ordered rows, pixels scaled."""
    if how == READY and ordered == 0:
        return x
    into, scale = pointer(net[X], x), number(1.0 / 255.0, x)
    for i in range(m):
        start = (order[i] if ordered else i) * row
        to = moved(into, i * k)
        if how == PIXELS:
            of_pixels = moved(pixels, start)
            if column == 1:
                for j in range(k):
                    to[j] = of_pixels[j] * scale
            else:
                for j in range(k):
                    to[j] = of_pixels[j * column] * scale
        else:
            of_x = moved(x, start)
            if column == 1:
                for j in range(k):
                    to[j] = of_x[j]
            else:
                for j in range(k):
                    to[j] = of_x[j * column]
    return into


@part
def update(net: Any, hyper: Any, of: Any, g: Any, first: int, count: int, scale: float, t: float) -> None:
    """Update ``count`` elements of the parameter with the record ``of``, from ``first`` on, by their gradient g."""
    w = moved(pointer(of[PARAMETER], g), first)
    group = OF_GROUPS + 2 * of[GROUP]
    states = moved(of, STATES)
    one = moved(pointer(states[0], g), first)
    two = moved(pointer(states[1], g), first)
    three = moved(pointer(states[2], g), first)
    numbers = moved(hyper, NUMBERS)
    call(net[RULE], (w, g, one, two, three, count, scale * hyper[SIGN], hyper[group], hyper[group + 1], t, numbers))


@part
def clipped(net: Any, hyper: Any, zero: Any, t: float) -> None:
    """The update of all parameters by gradients whose common norm is at most ``MAX_NORM``."""
    squares, partial = 0.0, pointer(net[DB], zero)
    for i in range(2 * net[LAYERS]):
        layer = moved(net, HEADER + i // 2 * RECORD)
        of = moved(layer, BIAS if i % 2 else WEIGHT)
        if of[TRAINED]:
            g = pointer(of[GRADIENT], zero)
            dots_1(g, g, 0, layer[N] * (1 if i % 2 else layer[K]), partial)
            squares += partial[0]
    scale = hyper[MAX_NORM] / (math.sqrt(squares) + 1e-6)
    scale = 1.0 if scale > 1.0 else scale
    for i in range(2 * net[LAYERS]):
        layer = moved(net, HEADER + i // 2 * RECORD)
        of = moved(layer, BIAS if i % 2 else WEIGHT)
        if of[TRAINED]:
            update(net, hyper, of, pointer(of[GRADIENT], zero), 0, layer[N] * (1 if i % 2 else layer[K]), scale, t)


@part
def averaged(net: Any, hyper: Any, zero: Any, t: float) -> None:
    """Move the averages towards the parameters."""
    weight = hyper[EMA]
    if hyper[EMA_WARMS] != 0.0 and 9.0 / (10.0 + t) > weight:
        weight = 9.0 / (10.0 + t)
    share = number(weight, zero)
    for i in range(2 * net[LAYERS]):
        layer = moved(net, HEADER + i // 2 * RECORD)
        of = moved(layer, BIAS if i % 2 else WEIGHT)
        if of[TRAINED]:
            average, w = pointer(of[AVERAGE], zero), pointer(of[PARAMETER], zero)
            for j in range(layer[N] * (1 if i % 2 else layer[K])):
                average[j] = average[j] + share * (w[j] - average[j])


@inlined
def backward(net: Any, hyper: Any, x: Any, m: int, t: float) -> None:
    """From dA of the last layer down to the lowest trained one; updates the parameters unless gradients are clipped."""
    da, below = pointer(net[DA], x), pointer(net[DA_NEXT], x)
    dw, db = pointer(net[DW], x), pointer(net[DB], x)
    multiply, clips, plain, lowest = net[PRODUCTS], net[CLIPS], net[PLAIN], net[LOWEST]
    one = number(1.0, x)
    i = net[LAYERS] - 1
    while i >= lowest:
        layer = moved(net, HEADER + i * RECORD)
        n, k = layer[N], layer[K]
        inputs = x
        if i > 0:
            inputs = pointer(net[HEADER + (i - 1) * RECORD + A], x)
        if layer[DERIVE]:
            call(layer[DERIVE], (pointer(layer[Z], x), da, m * n))
        bias, weight = moved(layer, BIAS), moved(layer, WEIGHT)
        if bias[TRAINED]:
            if clips:
                db = pointer(bias[GRADIENT], x)
            for j in range(n):
                db[j] = da[j]
            for row in range(1, m):
                of_row = moved(da, row * n)
                for j in range(n):
                    db[j] += of_row[j]
            if not clips:
                update(net, hyper, bias, db, 0, n, 1.0, t)
        w = pointer(weight[PARAMETER], x)
        rate = number(-hyper[OF_GROUPS + 2 * weight[GROUP]], x)
        first = 0
        while first < n:
            rows = min(layer[BLOCK], n - first)
            of_w = moved(w, first * k)
            if i > lowest:
                call(multiply, (moved(da, first), n, 1, of_w, k, rows, below, k, m, k, one, first))
            if weight[TRAINED]:
                if plain:
                    call(multiply, (moved(da, first), 1, n, inputs, k, m, of_w, k, rows, k, rate, 1))
                elif clips:
                    into = moved(pointer(weight[GRADIENT], x), first * k)
                    call(multiply, (moved(da, first), 1, n, inputs, k, m, into, k, rows, k, one, 0))
                else:
                    call(multiply, (moved(da, first), 1, n, inputs, k, m, dw, k, rows, k, one, 0))
                    update(net, hyper, weight, dw, first * k, rows * k, 1.0, t)
            first += rows
        da, below = below, da
        i -= 1
    if clips:
        clipped(net, hyper, x, t)
    if net[AVERAGES]:
        averaged(net, hyper, x, t)


@inlined
def one_step(
    net: Any,
    hyper: Any,
    count: Any,
    x: Any,
    pixels: Any,
    how: int,
    x_row: int,
    x_column: int,
    classes: Any,
    values: Any,
    y_row: int,
    y_column: int,
    order: Any,
    ordered: int,
    m: int,
) -> float:
    """One training step of m rows; returns the loss."""
    layers = net[LAYERS]
    inputs = gathered(net, x, pixels, how, x_row, x_column, order, ordered, m, net[HEADER + K])
    a = inputs
    x_t, z_t = pointer(net[TRANSPOSED], x), pointer(net[PRODUCT], x)
    for i in range(layers):
        layer = moved(net, HEADER + i * RECORD)
        n, k = layer[N], layer[K]
        z, w, bias = pointer(layer[Z], x), pointer(layer[WEIGHT + PARAMETER], x), layer[BIAS + PARAMETER]
        call(net[FORWARD], (net[PRODUCTS], a, w, pointer(bias, x), bias, z, m, n, k, x_t, z_t))
        a = pointer(layer[A], x)
        if layer[ACTIVATE]:
            call(layer[ACTIVATE], (z, a, m * n))
    c, da = net[HEADER + (layers - 1) * RECORD + N], pointer(net[DA], x)
    loss = call(net[LOSS], (a, classes, values, y_row, y_column, order, ordered, m, c, da, hyper[DELTA]))
    t = 0.0
    if net[COUNTS]:
        count[0] += 1
        t = float(count[0])
    backward(net, hyper, inputs, m, t)
    return loss


def run(
    net: Any,
    hyper: Any,
    count: Any,
    x: Any,
    pixels: Any,
    how: int,
    x_row: int,
    x_column: int,
    classes: Any,
    values: Any,
    y_row: int,
    y_column: int,
    order: Any,
    ordered: int,
    n: int,
    batch: int,
    rates: Any,
    rated: int,
    losses: Any,
) -> int:
    """Steps over n rows, ``batch`` at a time; writes the loss of each.

    Args:
        count: the number of updates, float32.
        x, pixels: the inputs, of which ``how`` says what they are, with their strides in elements.
        classes, values: the targets, one or the other, with their strides.
        order: the numbers of the rows, where ``ordered``.
        rates: the learning rates of each step and group, where ``rated``.

    Returns:
        0, or 1 where a class number is out of range; nothing has changed then.
    """
    if net[CLASSES]:
        c = net[HEADER + (net[LAYERS] - 1) * RECORD + N]
        for i in range(n):
            label = classes[(order[i] if ordered else i) * y_row]
            if label < 0 or label >= c:
                return 1
    done, step, groups = 0, 0, net[GROUPS]
    while done < n:
        m = min(batch, n - done)
        if rated:
            for group in range(groups):
                hyper[OF_GROUPS + 2 * group] = rates[step * groups + group]
        of_x, of_pixels, of_classes, of_values = x, pixels, classes, values
        if not ordered:
            of_x, of_pixels = moved(x, done * x_row), moved(pixels, done * x_row)
            of_classes, of_values = moved(classes, done * y_row), moved(values, done * y_row)
        losses[step] = one_step(
            net,
            hyper,
            count,
            of_x,
            of_pixels,
            how,
            x_row,
            x_column,
            of_classes,
            of_values,
            y_row,
            y_column,
            moved(order, done),
            ordered,
            m,
        )
        done += m
        step += 1
    return 0
