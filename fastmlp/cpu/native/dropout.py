"""Dropout: a layer's mask, and its output with it. ``fastmlp.reference.dropout`` says which random numbers they are.

The unsigned words of the generator are int64 here, whose sums and products have the same bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...base.dropout import GROUP
from .pointers import inlined, moved, number

#: Multipliers of the first and the third counter word, and what each round adds to the key.
_M0, _M1 = 0xD2E7470EE14C6C93 - (1 << 64), 0xCA5A826395121157 - (1 << 64)
_K0, _K1 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBB67AE8584CAA73B - (1 << 64)


@intrinsic
def high_word(typingctx: Any, x: Any, y: Any) -> Any:
    """The high word of the unsigned product of two words."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@inlined
def philox(c0: int, c1: int, c2: int, c3: int, key: int) -> tuple[int, int, int, int]:
    """The four words of a counter; the second word of the key is 0."""
    k0, k1 = key, 0
    for _ in range(10):
        high0, low0, high1, low1 = high_word(c0, _M0), c0 * _M0, high_word(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _K0, k1 + _K1
    return c0, c1, c2, c3


@inlined
def write(word: int, out: Any, count: int, threshold: int, kept: Any, dropped: Any) -> None:
    """The factors of up to four elements, whose numbers of 16 bits a word has."""
    for i in range(min(count, 4)):
        out[i] = kept if (word >> (16 * i)) & 0xFFFF >= threshold else dropped


def dropped(
    a: Any, out: Any, factors: Any, m: int, n: int, layer: int, threshold: int, p: float, first: int, seed: int,
    step: int, stream: int,
) -> None:  # fmt: skip
    """Write keep / (1 - p) and A keep / (1 - p) [m, n]; the rows of all members count from 0, these from ``first``."""
    kept, zero = number(1.0 / (1.0 - p), a), number(0.0, a)
    groups = (n + GROUP - 1) // GROUP
    for i in range(m):
        for group in range(groups):
            words = philox(1 + (first + i) * groups + group, step, layer, stream, seed)
            start = group * GROUP
            of_group, left = moved(factors, i * n + start), n - start
            write(words[0], of_group, left, threshold, kept, zero)
            write(words[1], moved(of_group, 4), left - 4, threshold, kept, zero)
            write(words[2], moved(of_group, 8), left - 8, threshold, kept, zero)
            write(words[3], moved(of_group, 12), left - 12, threshold, kept, zero)
    for i in range(m * n):
        out[i] = a[i] * factors[i]
