"""The three products of a layer, on matrices with contiguous rows.

Z = X W^T          fewer rows than a vector has elements: inner products along K
Z = X W^T          W smaller than X and Z, N whole vectors: vectors along N, W transposed
Z^T = W X^T        else: vectors over the rows of the batch, X transposed and padded to whole vectors
dX = dZ W          vectors along K
dW = dZ^T X        vectors along K
"""

from __future__ import annotations

from typing import Any

from .layout import PRODUCT, PRODUCTS, TRANSPOSED
from .pointers import call, lanes, moved, number, part, pointer
from .team import TILE_ROWS, span, wait
from .tiles import dots_1, dots_4, tile_1, tile_1x1, tile_1x2, tile_4x2, tile_6x2, tile_8, tile_8x1, tile_12x1
from .transposed import transposed


@part
def outer(a: Any, row_a: int, b: Any, c: Any, row_c: int, rows: int, columns: int, factor: Any, keep: int) -> None:
    """``product`` of a column A and a row B: C is written from one end to the other, as memory likes it best."""
    for i in range(rows):
        x, of_c = a[i * row_a], moved(c, i * row_c)
        if keep:
            for j in range(columns):
                of_c[j] = of_c[j] + factor * (x * b[j])
        else:
            for j in range(columns):
                of_c[j] = factor * (x * b[j])


def product(
    a: Any,
    row_a: int,
    step_a: int,
    b: Any,
    step_b: int,
    steps: int,
    c: Any,
    row_c: int,
    rows: int,
    columns: int,
    factor: Any,
    keep: int,
) -> None:
    """C = keep C + factor A B, A [rows, steps] with any strides, B [steps, columns], C [rows, columns]."""
    if steps == 1:
        outer(a, row_a, b, c, row_c, rows, columns, factor, keep)
        return
    width = lanes(c)
    j = 0
    while j + 2 * width <= columns:
        i, left = 0, rows
        while left >= 10 or left == 6 or left == 7:  # two tiles of 4 rows are faster than 6 rows and single ones
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_6x2(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i, left = i + 6, left - 6
        while i + 4 <= rows:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_4x2(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i += 4
        while i < rows:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_1x2(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i += 1
        j += 2 * width
    if j + width <= columns:
        i, left = 0, rows
        while left >= 20 or 12 <= left < 16:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_12x1(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i, left = i + 12, left - 12
        while i + 8 <= rows:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_8x1(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i += 8
        while i < rows:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_1x1(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i += 1
        j += width
    while j < columns:
        i = 0
        while i + 8 <= rows:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_8(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i += 8
        while i < rows:
            of_a, of_c = moved(a, i * row_a), moved(c, i * row_c + j)
            tile_1(of_a, row_a, step_a, moved(b, j), step_b, steps, of_c, row_c, factor, keep)
            i += 1
        j += 1


def forward(
    net: Any, x: Any, w: Any, bias: Any, has_bias: int, z: Any, m: int, n: int, k: int, thread: int, threads: int
) -> None:
    """Z [m, n] = X W^T + b for X [m, k] and W [n, k]: the columns of Z that belong to the thread."""
    product, width = net[PRODUCTS], lanes(x)
    x_t, z_t = pointer(net[TRANSPOSED], x), pointer(net[PRODUCT], x)
    first, count = span(n, TILE_ROWS, thread, threads)
    last = first + count
    if m < width:
        i = first
        while i + 4 <= last:
            for row in range(m):
                dots_4(moved(x, row * k), moved(w, i * k), k, k, moved(z, row * n + i))
            i += 4
        while i < last:
            for row in range(m):
                dots_1(moved(x, row * k), moved(w, i * k), k, k, moved(z, row * n + i))
            i += 1
    elif n % width == 0 and n * k <= m * (n + k):
        of_w, of_z = moved(x_t, first), moved(z, first)
        transposed(moved(w, first * k), k, count, k, of_w, n)
        call(product, (x, k, 1, of_w, n, k, of_z, n, m, count, number(1.0, x), 0))
    else:
        padded = (m + width - 1) // width * width
        begin, columns = span(k, TILE_ROWS, thread, threads)
        transposed(moved(x, begin), k, m, columns, moved(x_t, begin * padded), padded)
        zero = number(0.0, x)
        for row in range(m, padded):
            column = moved(x_t, row)
            for i in range(begin, begin + columns):
                column[i * padded] = zero
        wait(net, threads)
        of_z = moved(z_t, first * padded)
        call(product, (moved(w, first * k), k, 1, x_t, padded, k, of_z, padded, count, padded, number(1.0, x), 0))
        transposed(of_z, padded, count, m, moved(z, first), n)
    if has_bias:
        for row in range(m):
            of_row = moved(z, row * n)
            for i in range(first, last):
                of_row[i] += bias[i]
