"""The inner loops of products, in LLVM's own vectors, so that sums stay in registers in an order that is known.

A tile is a few rows of C and one or two vectors of columns (or one column), which are added up over all steps before
they are stored. Element (i, s) of A is ``a[i row_a + s step_a]``, so that A or its transpose is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .pointers import VECTOR_BYTES

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_FUSED = ("contract",)


class Builder:
    """LLVM instructions on vectors of the dtype, or on single numbers where ``width`` is 1."""

    def __init__(self, builder: Any, scalar: Any, width: int, size: int) -> None:
        self.builder, self.width, self.size = builder, width, size
        self.type = ir.VectorType(scalar, width) if width > 1 else scalar

    def at(self, start: Any, offset: Any) -> Any:
        """The place so many elements after ``start``."""
        return self.builder.gep(start, [offset if isinstance(offset, ir.Value) else ir.Constant(_INT64, offset)])

    def load(self, place: Any) -> Any:
        """The vector at the place."""
        return self.builder.load(self.builder.bitcast(place, self.type.as_pointer()), align=self.size)

    def store(self, value: Any, place: Any) -> None:
        """Write a vector to the place."""
        self.builder.store(value, self.builder.bitcast(place, self.type.as_pointer()), align=self.size)

    def everywhere(self, value: Any) -> Any:
        """A vector of one number."""
        if self.width == 1:
            return value
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, self.width), None))

    def fused(self, x: Any, y: Any, z: Any) -> Any:
        """X y + z."""
        return self.builder.fadd(self.builder.fmul(x, y, flags=_FUSED), z, flags=_FUSED)

    def zeros(self, count: int) -> list[Any]:
        """Places for so many vectors, which LLVM keeps in registers."""
        places = [cgutils.alloca_once(self.builder, self.type) for _ in range(count)]
        for place in places:
            self.builder.store(ir.Constant(self.type, None), place)
        return places

    def add(self, place: Any, x: Any, y: Any) -> None:
        """Add x y to what is at the place."""
        self.builder.store(self.fused(x, y, self.builder.load(place)), place)

    def total(self, value: Any) -> Any:
        """The sum of a vector's elements, halves first."""
        width, b = self.width, self.builder
        while width > 1:
            width //= 2
            halves = [
                b.shuffle_vector(
                    value,
                    ir.Constant(value.type, ir.Undefined),
                    ir.Constant(ir.VectorType(_INT32, width), [ir.Constant(_INT32, first + i) for i in range(width)]),
                )
                for first in (0, width)
            ]
            value = b.fadd(*halves)
        return b.extract_element(value, ir.Constant(_INT32, 0))


def scalar_of(context: Any, kind: Any) -> tuple[Any, int]:
    """LLVM's type of what a pointer points to, and its bytes."""
    return context.get_value_type(kind.dtype), kind.dtype.bitwidth // 8


def tile(rows: int, vectors: int) -> Any:
    """A function that does C = keep C + factor A B for a tile of that many rows and vectors; 0 vectors: one column."""

    @intrinsic
    def compute(
        typingctx: Any,
        a: Any,
        row_a: Any,
        step_a: Any,
        b: Any,
        step_b: Any,
        steps: Any,
        c: Any,
        row_c: Any,
        factor: Any,
        keep: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, row_a, step_a, b, step_b, steps, c, row_c, factor, keep = args
            scalar, size = scalar_of(context, signature.args[0])
            of = Builder(builder, scalar, VECTOR_BYTES // size if vectors else 1, size)
            columns = [v * of.width for v in range(max(1, vectors))]
            sums = [of.zeros(len(columns)) for _ in range(rows)]
            starts = [of.at(a, builder.mul(row_a, ir.Constant(_INT64, i))) for i in range(rows)]
            with cgutils.for_range(builder, steps) as loop:
                here, row_b = builder.mul(loop.index, step_a), of.at(b, builder.mul(loop.index, step_b))
                loaded = [of.load(of.at(row_b, column)) for column in columns]
                for start, row in zip(starts, sums, strict=True):
                    x = of.everywhere(builder.load(of.at(start, here)))
                    for place, y in zip(row, loaded, strict=True):
                        of.add(place, x, y)
            factor = of.everywhere(factor)
            keeps = builder.icmp_signed("!=", keep, ir.Constant(_INT64, 0))
            with builder.if_else(keeps) as (then, otherwise):
                for kept, branch in ((True, then), (False, otherwise)):
                    with branch:
                        for i, row in enumerate(sums):
                            start = of.at(c, builder.mul(row_c, ir.Constant(_INT64, i)))
                            for place, column in zip(row, columns, strict=True):
                                into, value = of.at(start, column), builder.load(place)
                                value = of.fused(factor, value, of.load(into)) if kept else builder.fmul(factor, value)
                                of.store(value, into)
            return context.get_dummy_value()

        i64 = types.int64
        return types.void(a, i64, i64, a, i64, i64, a, i64, a.dtype, i64), generate

    return compute


def dots(rows: int, chains: int) -> Any:
    """A function that writes x w_i of so many rows w_i, each as ``chains`` vectors of sums."""

    @intrinsic
    def compute(typingctx: Any, x: Any, w: Any, row_w: Any, count: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, w, row_w, count, out = args
            scalar, size = scalar_of(context, signature.args[0])
            of, one = Builder(builder, scalar, VECTOR_BYTES // size, size), Builder(builder, scalar, 1, size)
            starts = [of.at(w, builder.mul(row_w, ir.Constant(_INT64, i))) for i in range(rows)]
            sums = [of.zeros(chains) for _ in range(rows)]

            def add(of: Builder, many: int, first: Any, places: list[list[Any]]) -> Any:
                """Add what is left from ``first`` on, in parts of so many vectors; returns the first element after."""
                part = ir.Constant(_INT64, many * of.width)
                parts = builder.sdiv(builder.sub(count, first), part)
                with cgutils.for_range(builder, parts) as loop:
                    here = builder.add(first, builder.mul(loop.index, part))
                    for chain in range(many):
                        offset = builder.add(here, ir.Constant(_INT64, chain * of.width))
                        value = of.load(of.at(x, offset))
                        for start, row in zip(starts, places, strict=True):
                            of.add(row[chain], value, of.load(of.at(start, offset)))
                return builder.add(first, builder.mul(parts, part))

            after = add(of, chains, ir.Constant(_INT64, 0), sums)
            if chains > 1:
                after = add(of, 1, after, sums)
            totals = one.zeros(rows)
            for row, total in zip(sums, totals, strict=True):
                values = [builder.load(place) for place in row]
                while len(values) > 1:
                    values = [builder.fadd(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
                builder.store(of.total(values[0]), total)
            add(one, 1, after, [[total] for total in totals])
            for i, total in enumerate(totals):
                builder.store(builder.load(total), one.at(out, i))
            return context.get_dummy_value()

        return types.void(x, x, types.int64, types.int64, x), generate

    return compute


Kernel = Callable[..., None]
# 12 vectors of sums in 16 registers: enough for two fused operations per cycle, each of which takes four cycles.
tile_6x2, tile_4x2, tile_1x2 = tile(6, 2), tile(4, 2), tile(1, 2)
tile_12x1, tile_8x1, tile_1x1 = tile(12, 1), tile(8, 1), tile(1, 1)
tile_8, tile_1 = tile(8, 0), tile(1, 0)
dots_4, dots_1 = dots(4, 2), dots(1, 4)
