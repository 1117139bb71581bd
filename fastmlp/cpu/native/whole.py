"""The whole training step, and many of them, as one function: gather, forward, loss, backward and update.

``layout`` says what ``net`` and ``hyper`` contain, ``team`` how threads share a step.
"""

from __future__ import annotations

from typing import Any

from .layout import (
    ACTIVATE,
    ADVANCES,
    BACKWARD,
    BATCH,
    BIAS,
    CLASSES,
    COUNT,
    COUNTS,
    DA,
    DROP,
    FACTORS,
    FORWARD,
    GATHER,
    GROUPS,
    HEADER,
    HOW,
    HYPER,
    IGNORED,
    INPUTS,
    LAYERS,
    LIMIT,
    LOSS,
    LOSSES,
    MEMBER,
    MOST,
    NET,
    OF_GROUPS,
    ORDER,
    OUT,
    PARAMETER,
    PIXELS,
    RATES,
    READY,
    RECORD,
    ROWS,
    RUN,
    SIZE,
    START,
    STATE,
    STATUS,
    STREAM,
    TARGETS,
    TEAM,
    THREAD,
    THREADS,
    THRESHOLD,
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
    inlined,
    int64_at,
    moved,
    number,
    part,
    pointer,
    set_float_control,
    uint8_at,
)
from .team import TILE_ROWS, ask, span, start, wait


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


@inlined
def activated(layer: Any, z: Any, a: Any, m: int, thread: int, threads: int) -> None:
    """A = f(Z), the thread's columns."""
    n = layer[N]
    first, count = span(n, TILE_ROWS, thread, threads)
    runs, length = (1, m * n) if count == n else (m, count)
    if count:
        for row in range(runs):
            begin = row * n + first
            of_z, of_a = moved(z, begin), moved(a, begin)
            if layer[Z] != layer[A]:
                for j in range(length):
                    of_a[j] = of_z[j]
            call(layer[ACTIVATE], (of_a, length))


@inlined
def drop(net: Any, hyper: Any, layer: Any, i: int, a: Any, first: int, m: int, before: int, step: int) -> None:
    """Drop elements of m rows of A of layer i, from the first one on; so many rows of all members are before A."""
    start_a = first * layer[N]
    a, out, factors = moved(a, start_a), pointer(layer[OUT], a), pointer(layer[FACTORS], a)
    state = int64_at(net[STATE])
    p, seed, step = hyper[OF_GROUPS + 2 * net[GROUPS] + i], state[0], state[1] + step
    places = a, moved(out, start_a), moved(factors, start_a)
    call(net[DROP], (*places, m, layer[N], i, layer[THRESHOLD], p, before + first, seed, step, net[STREAM]))


def run(call_: Any, like: Any) -> None:
    """Steps over ``ROWS`` rows, ``BATCH`` at a time; ``like`` is any pointer to values."""
    net, thread, threads = int64_at(call_[NET]), 0, 1
    if net[THREADS] > 1:
        thread, threads = ask(net[TEAM + THREAD]), ask(net[TEAM + SIZE])
    before = float_control()
    set_float_control(before | FLUSHES)
    steps(call_, like, thread, threads)
    set_float_control(before)


def spread(call_: Any, like: Any) -> None:
    """``run`` in each thread of a team, which share the work."""
    net = int64_at(call_[NET])
    threads = min(net[THREADS], ask(net[TEAM + MOST]), int64_at(net[TEAM + LIMIT])[0])
    start(net[TEAM + START], threads, net[RUN], call_)


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


@inlined
def steps(call_: Any, like: Any, thread: int, threads: int) -> None:
    """The thread's part of ``run``, with the settings of floating-point arithmetic as they are."""
    net, hyper, count = int64_at(call_[NET]), float64_at(call_[HYPER]), float32_at(call_[COUNT])
    x, pixels, rates = pointer(call_[INPUTS], like), uint8_at(call_[INPUTS]), float64_at(call_[RATES])
    classes, values, losses = int64_at(call_[TARGETS]), pointer(call_[TARGETS], like), pointer(call_[LOSSES], like)
    order, ordered, rated = int64_at(call_[ORDER]), call_[ORDER], call_[RATES]
    weights, weight_row = pointer(call_[WEIGHTS], like), call_[WEIGHT_ROW]
    how, x_row, x_column, y_row, y_column = call_[HOW], call_[X_ROW], call_[X_COLUMN], call_[Y_ROW], call_[Y_COLUMN]
    n, layers, groups, member = call_[ROWS], net[LAYERS], net[GROUPS], call_[MEMBER]
    k, c, da = net[HEADER + K], net[HEADER + (layers - 1) * RECORD + N], pointer(net[DA], like)
    failed, leads = has_no_class(call_), thread == 0
    if leads:
        call_[STATUS] = failed
    if failed:
        return
    done, step = 0, 0
    while done < n:
        m = min(call_[BATCH], n - done)
        if rated and leads:
            for group in range(groups):
                hyper[OF_GROUPS + 2 * group] = rates[step * groups + group]
        first, rows = span(m, 1, thread, threads)
        inputs = x
        if how != READY or ordered:
            inputs = pointer(net[X], like)
            start_x = 0 if ordered else first * x_row
            of_x, of_pixels, into = moved(x, start_x), moved(pixels, start_x), moved(inputs, first * k)
            call(
                net[GATHER],
                (into, of_x, of_pixels, how, x_row, x_column, moved(order, first), ordered, rows, k),
            )
            wait(net, threads)
        a = inputs
        for i in range(layers):
            layer = moved(net, HEADER + i * RECORD)
            z, w, bias = pointer(layer[Z], like), pointer(layer[WEIGHT + PARAMETER], like), layer[BIAS + PARAMETER]
            shape = m, layer[N], layer[K], thread, threads
            call(net[FORWARD], (net, a, w, pointer(bias, like), bias, z, *shape))
            a = pointer(layer[A], like)
            if layer[ACTIVATE]:
                activated(layer, z, a, m, thread, threads)
            wait(net, threads)
            if layer[THRESHOLD]:
                drop(net, hyper, layer, i, a, first, rows, member * m, step)
                a = pointer(layer[OUT], like)
                wait(net, threads)
        if leads:
            targets = (a, classes, values, y_row, y_column, order, ordered, m, c, da, weights, weight_row, net, hyper)
            losses[step] = call(net[LOSS], targets)
            if net[COUNTS] and net[UPDATES]:
                count[0] += 1
        wait(net, threads)
        t = 0.0
        if net[COUNTS] and net[UPDATES]:
            t = float(count[0])
        call(net[BACKWARD], (net, hyper, inputs, m, t, thread, threads))
        if ordered:
            order = moved(order, m)
        else:
            x, pixels = moved(x, m * x_row), moved(pixels, m * x_row)
            classes, values = moved(classes, m * y_row), moved(values, m * y_row)
            weights = moved(weights, m * weight_row)
        done += m
        step += 1
    if net[ADVANCES] and leads:
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
