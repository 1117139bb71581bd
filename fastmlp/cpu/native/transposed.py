"""Transposes a matrix: squares of vectors with shuffles in registers, and what is left element by element."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .pointers import VECTOR_BYTES, lanes, moved, part
from .tiles import Builder, scalar_of


@intrinsic
def square(typingctx: Any, a: Any, row_a: Any, b: Any, row_b: Any) -> Any:
    """B = A^T for as many rows and columns as a vector has elements."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, row_a, b, row_b = args
        scalar, size = scalar_of(context, signature.args[0])
        of = Builder(builder, scalar, VECTOR_BYTES // size, size)
        i64, mask = ir.IntType(64), ir.VectorType(ir.IntType(32), of.width)
        rows = [of.load(of.at(a, builder.mul(row_a, ir.Constant(i64, i)))) for i in range(of.width)]
        half = of.width // 2
        while half:  # blocks of so many rows and columns change places with those beside the diagonal
            picks = (
                [j if not j & half else of.width + j - half for j in range(of.width)],
                [j + half if not j & half else of.width + j for j in range(of.width)],
            )
            for i in range(of.width):
                if not i & half:
                    pair = rows[i], rows[i + half]
                    rows[i], rows[i + half] = (builder.shuffle_vector(*pair, ir.Constant(mask, pick)) for pick in picks)
            half //= 2
        for i, row in enumerate(rows):
            of.store(row, of.at(b, builder.mul(row_b, ir.Constant(i64, i))))
        return context.get_dummy_value()

    return types.void(a, types.int64, a, types.int64), generate


@part
def transposed(a: Any, row_a: int, m: int, k: int, b: Any, row_b: int) -> None:
    """B [k, m] = A^T for A [m, k]; rows begin so many elements apart."""
    width = lanes(a)
    i = 0
    while i + width <= m:
        j = 0
        while j + width <= k:
            square(moved(a, i * row_a + j), row_a, moved(b, j * row_b + i), row_b)
            j += width
        while j < k:
            column = moved(b, j * row_b)
            for row in range(i, i + width):
                column[row] = a[row * row_a + j]
            j += 1
        i += width
    while i < m:
        of_row = moved(a, i * row_a)
        for j in range(k):
            b[j * row_b + i] = of_row[j]
        i += 1
