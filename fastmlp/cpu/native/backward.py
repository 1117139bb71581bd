"""The backward pass with the update.

It takes a block of rows of a weight at a time: first its part of dX, then its gradient and its update. So the block is
read from memory once. Each thread takes the blocks of its own rows. So dX is a sum over the threads, each of which has
room for its part, and the layer below adds up what it needs of them.
"""

from __future__ import annotations

import math
from typing import Any

from .layout import (
    AVERAGE,
    AVERAGES,
    BIAS,
    BLOCK,
    CLIPS,
    DA,
    DA_NEXT,
    DA_ROOM,
    DB,
    DERIVE,
    DW,
    DW_ROOM,
    EMA,
    EMA_WARMS,
    FACTORS,
    GRADIENT,
    GROUP,
    HEADER,
    LAYERS,
    LOWEST,
    MAX_NORM,
    NUMBERS,
    OF_GROUPS,
    OUT,
    PARAMETER,
    PLAIN,
    PRODUCTS,
    RECORD,
    RULE,
    SIGN,
    STATES,
    STORES,
    THRESHOLD,
    TRAINED,
    UPDATES,
    WEIGHT,
    K,
    N,
    Z,
)
from .pointers import call, inlined, moved, number, part, pointer
from .team import TILE_ROWS, span, wait
from .tiles import dots_1


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


def clipped(net: Any, hyper: Any, zero: Any, t: float, thread: int, threads: int) -> None:
    """The update of all parameters by gradients whose common norm is at most ``MAX_NORM``."""
    squares, partial = 0.0, moved(pointer(net[DW], zero), thread * net[DW_ROOM])
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
            first, count = span(layer[N] * (1 if i % 2 else layer[K]), TILE_ROWS, thread, threads)
            update(net, hyper, of, moved(pointer(of[GRADIENT], zero), first), first, count, scale, t)


def averaged(net: Any, hyper: Any, zero: Any, t: float, thread: int, threads: int) -> None:
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
            first, count = span(layer[N] * (1 if i % 2 else layer[K]), TILE_ROWS, thread, threads)
            for j in range(first, first + count):
                difference = w[j] - average[j]
                average[j] = w[j] - rest * difference if more else average[j] + share * difference


@inlined
def through_activation(layer: Any, da: Any, m: int, first: int, count: int, parts: int, room: int) -> None:
    """Make dA of a layer, the sum of ``parts`` parts, dZ in its place, for ``count`` columns from ``first`` on."""
    n, saved, factors = layer[N], pointer(layer[Z], da), pointer(layer[FACTORS], da)
    runs, length = (1, m * n) if count == n else (m, count)
    for row in range(runs):
        begin = row * n + first
        of_row = moved(da, begin)
        for other in range(1, parts):
            more = moved(da, other * room + begin)
            for j in range(length):
                of_row[j] += more[j]
        if layer[THRESHOLD]:
            kept = moved(factors, begin)
            for j in range(length):
                of_row[j] *= kept[j]
        if layer[DERIVE]:
            call(layer[DERIVE], (moved(saved, begin), of_row, length))


def backward(net: Any, hyper: Any, x: Any, m: int, t: float, thread: int, threads: int) -> None:
    """From dA of the last layer down to the lowest trained one, with the updates; the thread's part of it."""
    da, below = pointer(net[DA], x), pointer(net[DA_NEXT], x)
    dw, db = moved(pointer(net[DW], x), thread * net[DW_ROOM]), pointer(net[DB], x)
    multiply, stores, plain, lowest, room = net[PRODUCTS], net[STORES], net[PLAIN], net[LOWEST], net[DA_ROOM]
    one, parts = number(1.0, x), 1
    i = net[LAYERS] - 1
    while i >= lowest:
        layer = moved(net, HEADER + i * RECORD)
        n, k = layer[N], layer[K]
        inputs = x
        if i > 0:
            inputs = pointer(net[HEADER + (i - 1) * RECORD + OUT], x)
        first, count = span(n, TILE_ROWS, thread, threads)
        if count:
            through_activation(layer, da, m, first, count, parts, room)
        bias, weight = moved(layer, BIAS), moved(layer, WEIGHT)
        if bias[TRAINED] and count:
            if stores:
                db = pointer(bias[GRADIENT], x)
            for j in range(first, first + count):
                db[j] = da[j]
            for row in range(1, m):
                of_row = moved(da, row * n)
                for j in range(first, first + count):
                    db[j] += of_row[j]
            if not stores:
                update(net, hyper, bias, moved(db, first), first, count, 1.0, t)
        w, into_below = pointer(weight[PARAMETER], x), moved(below, thread * room)
        rate = number(-hyper[OF_GROUPS + 2 * weight[GROUP]], x)
        done = 0
        while done < count:
            start, rows = first + done, min(layer[BLOCK], count - done)
            of_w = moved(w, start * k)
            if i > lowest:
                call(multiply, (moved(da, start), n, 1, of_w, k, rows, into_below, k, m, k, one, done))
            if weight[TRAINED]:
                if stores:
                    into = moved(pointer(weight[GRADIENT], x), start * k)
                    call(multiply, (moved(da, start), 1, n, inputs, k, m, into, k, rows, k, one, 0))
                elif plain:
                    call(multiply, (moved(da, start), 1, n, inputs, k, m, of_w, k, rows, k, rate, 1))
                else:
                    call(multiply, (moved(da, start), 1, n, inputs, k, m, dw, k, rows, k, one, 0))
                    update(net, hyper, weight, dw, start * k, rows * k, 1.0, t)
            done += rows
        wait(net, threads)
        da, below = below, da
        _, each = span(n, TILE_ROWS, 0, threads)
        parts = (n + each - 1) // each
        i -= 1
    if net[CLIPS] and net[UPDATES]:
        call(net[CLIPS], (net, hyper, x, t, thread, threads))
        wait(net, threads)
    if net[AVERAGES] and net[UPDATES]:
        call(net[AVERAGES], (net, hyper, x, t, thread, threads))
        wait(net, threads)
