"""Dropout of a hidden layer's output, whose mask is made again in the backward pass instead of being stored.

    A' = A * F,  F = 1 / (1 - p) where an element is kept, else 0
    dZ = dA' * F * f'

The random numbers are those of Philox-4x64 with 10 rounds, as in ``fastmlp.reference.dropout``:

    key      (seed, 0)
    counter  (1 + group, step, layer, stream)          group = row ceil(N / 16) + n // 16

A counter gives 16 numbers of 16 bits, for 16 columns of a row. A row begins with a new group, so that a tile has whole
groups for every N. Rows are those of A [M, N], and those of a member's A in [E M, N]. An element is kept if its number
is at least p 2^16. Any pass can make the number of any element, because it depends on key and counter alone.

Seed and step lie in the device's memory (``Dropout.state``), so that a captured graph drops other elements at each
replay. ``wgrad_update`` adds 1 to the step. It is launched once for each forward pass of a step, after all kernels that
read the number.

A dropped element is multiplied by 0 and not replaced by 0, so that NaN and infinity become NaN, as in torch. Where f'
is computed from A, the backward pass has A' instead. A of a kept element is A' (1 - p), up to rounding. f' of a dropped
element does not matter, because dA' F is 0.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from .activations import activation_grad, unscaled
from .device import interpreting

__all__ = ["Dropout", "Dropping", "arguments_of"]

_INTERPRETING: tl.constexpr = tl.constexpr(interpreting())
#: Columns that share a counter.
GROUP: tl.constexpr = tl.constexpr(16)


class Dropout(NamedTuple):
    """The dropout of one layer, as launchers take it; any tuple of these four will do."""

    state: Tensor  #: int64 [2], contiguous, on the device: seed and step
    layer: int  #: counts from 0
    p: float  #: above 0 and below 1
    stream: int = 0  #: the process under data parallelism


class Dropping(NamedTuple):
    """The same as kernels take it."""

    state_ptr: Tensor
    layer: int
    stream: int
    threshold: int  #: the bits of a number of 32 bits without sign, whose high half is p 2^16
    scale: float  #: 1 / (1 - p)
    kept: float  #: 1 - p


def arguments_of(dropout: Any) -> Dropping | None:
    """What a kernel takes of a ``Dropout``; None for None."""
    if dropout is None:
        return None
    state, layer, p, stream = dropout
    threshold = min(max(round(p * 65536), 1), 65535) << 16
    return Dropping(state, layer, stream, threshold - (threshold >> 31 << 32), 1.0 / (1.0 - p), 1.0 - p)


@triton.jit
def dropout_key(dropout):
    """Seed, step, layer and stream: what all elements of a program have in common, to be read once."""
    seed = tl.load(dropout.state_ptr).to(tl.uint64)
    step = tl.load(dropout.state_ptr + 1).to(tl.uint64)
    return seed, step, tl.cast(dropout.layer, tl.uint64), tl.cast(dropout.stream, tl.uint64)


@triton.jit
def _two(bits, word, threshold, FIRST: tl.constexpr):
    """``bits`` with whether the halves of a word of 32 bits are large enough, the low half first."""
    bits |= tl.where((word << 16) >= threshold, 1 << FIRST, 0)
    return bits | tl.where(word >= threshold, 2 << FIRST, 0)


@triton.jit
def _product(high, low, HIGH: tl.constexpr, LOW: tl.constexpr):
    """The four 32-bit parts, highest first, of the product of (``high``, ``low``) and (HIGH, LOW).

    Four products of 32 bits, each with an addition that cannot overflow. ``tl.umulhi`` and ``*`` of 64 bits take seven.
    """
    first = low.to(tl.uint64) * LOW
    middle = low.to(tl.uint64) * HIGH + (first >> 32)
    other = high.to(tl.uint64) * LOW + (middle & 0xFFFFFFFF)
    top = high.to(tl.uint64) * HIGH + (middle >> 32) + (other >> 32)
    return (top >> 32).to(tl.uint32), top.to(tl.uint32), other.to(tl.uint32), first.to(tl.uint32)


@triton.jit
def _philox(c0, c1, c2, c3, key):
    """Philox-4x64 with 10 rounds for the key (``key``, 0): eight words of 32 bits, the low one of each 64 first.

    c0 is a block, and the others are scalars.
    """
    second = key * 0
    high0, low0 = (c0 >> 32).to(tl.uint32), c0.to(tl.uint32)
    # Blocks from the beginning on, so that the loop keeps the types. Unrolled code would not fit the registers.
    zero = low0 * 0
    high1, low1 = zero + (c1 >> 32).to(tl.uint32), zero + c1.to(tl.uint32)
    high2, low2 = zero + (c2 >> 32).to(tl.uint32), zero + c2.to(tl.uint32)
    high3, low3 = zero + (c3 >> 32).to(tl.uint32), zero + c3.to(tl.uint32)
    for _ in range(10):
        a3, a2, a1, a0 = _product(high0, low0, 0xD2E7470E, 0xE14C6C93)
        b3, b2, b1, b0 = _product(high2, low2, 0xCA5A8263, 0x95121157)
        high0, low0 = b3 ^ high1 ^ (key >> 32).to(tl.uint32), b2 ^ low1 ^ key.to(tl.uint32)
        high2, low2 = a3 ^ high3 ^ (second >> 32).to(tl.uint32), a2 ^ low3 ^ second.to(tl.uint32)
        high1, low1, high3, low3 = b1, b0, a1, a0
        key += 0x9E3779B97F4A7C15
        second += 0xBB67AE8584CAA73B
    return low0, high0, low1, high1, low2, high2, low3, high3


@triton.jit
def _once(bits):
    """``bits``, which the compiler now computes once and moves to where they are needed.

    Of its own accord it computes them again in every thread that has elements of a group, which is four times on matrix
    units. An instruction that is not pure stays where it is.
    """
    if not _INTERPRETING:
        if is_cuda():
            bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=False, pack=1)
        else:
            bits = tl.inline_asm_elementwise(
                "v_mov_b32 $0, $1", "=v,v", [bits], dtype=tl.int32, is_pure=False, pack=1
            )  # fmt: skip
    return bits


@triton.jit
def _factor(dropout, key, group, SHAPE: tl.constexpr):
    """F of the 16 elements of each group, as a float32 block of SHAPE: the groups in their order."""
    words = _philox(group.to(tl.uint64) + 1, key[1], key[2], key[3], key[0])
    threshold = dropout.threshold.to(tl.uint32, bitcast=True)
    # One bit per element. Only the bits of groups change their layout, 16 times fewer than elements.
    bits = tl.zeros(group.shape, tl.int32)
    for i in tl.static_range(8):
        bits = _two(bits, words[i], threshold, 2 * i)
    bits = _once(bits)
    offs = tl.arange(0, GROUP)
    if len(group.shape) == 1:
        kept = (bits[:, None] >> offs[None, :]) & 1
    else:
        kept = (bits[:, :, None] >> offs[None, None, :]) & 1
    return tl.where(tl.reshape(kept, SHAPE) != 0, dropout.scale, 0.0)


@triton.jit
def factor_of_block(dropout, key, offs_m, first, M, N, COLS: tl.constexpr):
    """F of the rows ``offs_m`` and of COLS columns from ``first``, a multiple of 16, on; the program's A is [M, N]."""
    row = tl.program_id(2).to(tl.int64) * M + offs_m
    groups = first // GROUP + tl.arange(0, COLS // GROUP)
    group = row[:, None] * tl.cdiv(N, GROUP) + groups[None, :]
    return _factor(dropout, key, group, (offs_m.shape[0], COLS))


@triton.jit
def factor_of_groups(dropout, key, group):
    """F of a vector of groups, as a block of 16 columns."""
    return _factor(dropout, key, group, (group.shape[0], GROUP))


@triton.jit
def grad_of_dropped(dropout, da, saved, factor, ACTIVATION: tl.constexpr):
    """dZ = dA' * F * f' for float32 blocks; ``saved`` is Z, or A' where f' is computed from A."""
    return activation_grad(da * factor, unscaled(saved, dropout.kept, ACTIVATION), ACTIVATION)


@triton.jit
def next_step(state_ptr):
    """Add 1 to the step; the first program of a launch does."""
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
    step = tl.load(state_ptr + 1, mask=first, other=0)
    tl.store(state_ptr + 1, step + 1, mask=first)
