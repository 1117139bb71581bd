"""The whole training step, and many of them, as one function: gather, forward, loss, backward, update.

``layout`` says what ``net`` and ``hyper`` contain. The backward pass takes a block of rows of a weight at a time: first
its part of dX, then its gradient and its update, so that the block is read from memory once.
"""

from __future__ import annotations

import math
from typing import Any

from .layout import (
    ACTIVATE,
    ADVANCES,
    AVERAGE,
    AVERAGES,
    BACKWARD,
    BATCH,
    BIAS,
    BLOCK,
    CLASSES,
    CLIPS,
    COUNT,
    COUNTS,
    DA,
    DA_NEXT,
    DB,
    DERIVE,
    DROP,
    DW,
    EMA,
    EMA_WARMS,
    FACTORS,
    FORWARD,
    GATHER,
    GRADIENT,
    GROUP,
    GROUPS,
    HEADER,
    HOW,
    HYPER,
    IGNORED,
    INPUTS,
    LAYERS,
    LOSS,
    LOSSES,
    LOWEST,
    MAX_NORM,
    MEMBER,
    NET,
    NUMBERS,
    OF_GROUPS,
    ORDER,
    OUT,
    PARAMETER,
    PIXELS,
    PLAIN,
    PRODUCT,
    PRODUCTS,
    RATES,
    READY,
    RECORD,
    ROWS,
    RULE,
    SIGN,
    STATE,
    STATES,
    STATUS,
    STORES,
    STREAM,
    TARGETS,
    THRESHOLD,
    TRAINED,
    TRANSPOSED,
    UPDATES,
    WEIGHT,
    WEIGHT_ROW,
    WEIGHTS,
    X_COLUMN,
    X_ROW,
    Y_COLUMN,
    Y_ROW,
    A,
    K,
    N,
    X,
    Z,
)
from .pointers import (
    FLUSHES,
    call,
    float32_at,
    float64_at,
    float_control,
    int64_at,
    moved,
    number,
    part,
    pointer,
    set_float_control,
    uint8_at,
)
from .tiles import dots_1


def gathered(
    into: Any, x: Any, pixels: Any, how: int, row: int, column: int, order: Any, ordered: int, m: int, k: int
) -> None:
    """Copy the ordered rows of x or pixels to ``into`` [m, k], pixels scaled."""
    scale = number(1.0 / 255.0, x)
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


@part
def drop(net: Any, hyper: Any, layer: Any, i: int, a: Any, m: int, first: int, step: int) -> Any:
    """A of layer i after dropout; ``first`` is the place of its first row among the rows of all members."""
    out, factors, state = pointer(layer[OUT], a), pointer(layer[FACTORS], a), int64_at(net[STATE])
    p, seed, step = hyper[OF_GROUPS + 2 * net[GROUPS] + i], state[0], state[1] + step
    call(net[DROP], (a, out, factors, m, layer[N], i, layer[THRESHOLD], p, first, seed, step, net[STREAM]))
    return out


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


def averaged(net: Any, hyper: Any, zero: Any, t: float) -> None:
    """Move the averages towards the parameters."""
    weight = hyper[EMA]
    if hyper[EMA_WARMS] != 0.0 and 9.0 / (10.0 + t) > weight:
        weight = 9.0 / (10.0 + t)
    share, rest, more = number(weight, zero), number(1.0 - weight, zero), weight >= 0.5
    for i in range(2 * net[LAYERS]):
        layer = moved(net, HEADER + i // 2 * RECORD)
        of = moved(layer, BIAS if i % 2 else WEIGHT)
        if of[TRAINED]:
            average, w = pointer(of[AVERAGE], zero), pointer(of[PARAMETER], zero)
            for j in range(layer[N] * (1 if i % 2 else layer[K])):
                difference = w[j] - average[j]
                average[j] = w[j] - rest * difference if more else average[j] + share * difference


def backward(net: Any, hyper: Any, x: Any, m: int, t: float) -> None:
    """From dA of the last layer down to the lowest trained one, with the updates."""
    da, below = pointer(net[DA], x), pointer(net[DA_NEXT], x)
    dw, db = pointer(net[DW], x), pointer(net[DB], x)
    multiply, stores, plain, lowest = net[PRODUCTS], net[STORES], net[PLAIN], net[LOWEST]
    one = number(1.0, x)
    i = net[LAYERS] - 1
    while i >= lowest:
        layer = moved(net, HEADER + i * RECORD)
        n, k = layer[N], layer[K]
        inputs = x
        if i > 0:
            inputs = pointer(net[HEADER + (i - 1) * RECORD + OUT], x)
        if layer[THRESHOLD]:
            factors = pointer(layer[FACTORS], x)
            for j in range(m * n):
                da[j] *= factors[j]
        if layer[DERIVE]:
            call(layer[DERIVE], (pointer(layer[Z], x), da, m * n))
        bias, weight = moved(layer, BIAS), moved(layer, WEIGHT)
        if bias[TRAINED]:
            if stores:
                db = pointer(bias[GRADIENT], x)
            for j in range(n):
                db[j] = da[j]
            for row in range(1, m):
                of_row = moved(da, row * n)
                for j in range(n):
                    db[j] += of_row[j]
            if not stores:
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
                if stores:
                    into = moved(pointer(weight[GRADIENT], x), first * k)
                    call(multiply, (moved(da, first), 1, n, inputs, k, m, into, k, rows, k, one, 0))
                elif plain:
                    call(multiply, (moved(da, first), 1, n, inputs, k, m, of_w, k, rows, k, rate, 1))
                else:
                    call(multiply, (moved(da, first), 1, n, inputs, k, m, dw, k, rows, k, one, 0))
                    update(net, hyper, weight, dw, first * k, rows * k, 1.0, t)
            first += rows
        da, below = below, da
        i -= 1
    if net[CLIPS] and net[UPDATES]:
        call(net[CLIPS], (net, hyper, x, t))
    if net[AVERAGES] and net[UPDATES]:
        call(net[AVERAGES], (net, hyper, x, t))


def run(call_: Any, like: Any) -> None:
    """Steps over ``ROWS`` rows, ``BATCH`` at a time; ``like`` is any pointer to values."""
    before = float_control()
    set_float_control(before | FLUSHES)
    steps(call_, like)
    set_float_control(before)


@part
def has_no_class(call_: Any) -> int:
    """1 where a label is no class and not ignored, else 0."""
    net, classes, order, ordered = int64_at(call_[NET]), int64_at(call_[TARGETS]), int64_at(call_[ORDER]), call_[ORDER]
    row, ignored, c = call_[Y_ROW], net[IGNORED], net[HEADER + (net[LAYERS] - 1) * RECORD + N]
    if net[CLASSES]:
        for i in range(call_[ROWS]):
            label = classes[(order[i] if ordered else i) * row]
            if (label < 0 or label >= c) and label != ignored:
                return 1
    return 0


@part
def steps(call_: Any, like: Any) -> None:
    """``run`` with the settings of floating-point arithmetic as they are."""
    net, hyper, count = int64_at(call_[NET]), float64_at(call_[HYPER]), float32_at(call_[COUNT])
    x, pixels, rates = pointer(call_[INPUTS], like), uint8_at(call_[INPUTS]), float64_at(call_[RATES])
    classes, values, losses = int64_at(call_[TARGETS]), pointer(call_[TARGETS], like), pointer(call_[LOSSES], like)
    order, ordered, rated = int64_at(call_[ORDER]), call_[ORDER], call_[RATES]
    weights, weight_row = pointer(call_[WEIGHTS], like), call_[WEIGHT_ROW]
    how, x_row, x_column, y_row, y_column = call_[HOW], call_[X_ROW], call_[X_COLUMN], call_[Y_ROW], call_[Y_COLUMN]
    n, layers, groups, member = call_[ROWS], net[LAYERS], net[GROUPS], call_[MEMBER]
    k, c = net[HEADER + K], net[HEADER + (layers - 1) * RECORD + N]
    x_t, z_t, da = pointer(net[TRANSPOSED], like), pointer(net[PRODUCT], like), pointer(net[DA], like)
    call_[STATUS] = has_no_class(call_)
    if call_[STATUS]:
        return
    done, step = 0, 0
    while done < n:
        m = min(call_[BATCH], n - done)
        if rated:
            for group in range(groups):
                hyper[OF_GROUPS + 2 * group] = rates[step * groups + group]
        inputs = x
        if how != READY or ordered:
            inputs = pointer(net[X], like)
            call(net[GATHER], (inputs, x, pixels, how, x_row, x_column, order, ordered, m, k))
        a = inputs
        for i in range(layers):
            layer = moved(net, HEADER + i * RECORD)
            z, w, bias = pointer(layer[Z], like), pointer(layer[WEIGHT + PARAMETER], like), layer[BIAS + PARAMETER]
            rows, columns = layer[N], layer[K]
            call(net[FORWARD], (net[PRODUCTS], a, w, pointer(bias, like), bias, z, m, rows, columns, x_t, z_t))
            a = pointer(layer[A], like)
            if layer[ACTIVATE]:
                if layer[Z] != layer[A]:
                    for j in range(m * rows):
                        a[j] = z[j]
                call(layer[ACTIVATE], (a, m * rows))
            if layer[THRESHOLD]:
                a = drop(net, hyper, layer, i, a, m, member * m, step)
        targets = (a, classes, values, y_row, y_column, order, ordered, m, c, da, weights, weight_row, net, hyper)
        losses[step] = call(net[LOSS], targets)
        t = 0.0
        if net[COUNTS] and net[UPDATES]:
            count[0] += 1
            t = float(count[0])
        call(net[BACKWARD], (net, hyper, inputs, m, t))
        if ordered:
            order = moved(order, m)
        else:
            x, pixels = moved(x, m * x_row), moved(pixels, m * x_row)
            classes, values = moved(classes, m * y_row), moved(values, m * y_row)
            weights = moved(weights, m * weight_row)
        done += m
        step += 1
    if net[ADVANCES]:
        int64_at(net[STATE])[1] += step


def members(
    calls: Any, count: int, x: int, x_step: int, y: int, y_step: int, losses: int, step: int, weights: int,
    weight_step: int, run_: int,
) -> None:  # fmt: skip
    """Call ``run``, whose address is ``run_``, for members of an ensemble, whose ``call``s are at the addresses.

    The inputs, targets, losses and sample weights of member 0 have the addresses x, y, losses and weights; those of the
    next one are so many bytes further on. Nothing runs where a label of any of them is no class.
    """
    for i in range(count):
        of_member = int64_at(calls[i])
        member = of_member[MEMBER]
        of_member[INPUTS], of_member[TARGETS] = x + member * x_step, y + member * y_step
        of_member[LOSSES], of_member[WEIGHTS] = losses + member * step, weights + member * weight_step
    for i in range(count):
        if has_no_class(int64_at(calls[i])):
            int64_at(calls[0])[STATUS] = 1
            return
    for i in range(count):
        of_member = int64_at(calls[i])
        call(run_, (of_member, of_member))
