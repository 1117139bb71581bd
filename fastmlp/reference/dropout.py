"""Dropout in plain torch: the random numbers, which elements are kept, and the output.

    A_out = keep * A / (1 - p)

The random numbers are those of Philox-4x64 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), a function of a key and a counter. So the backward pass makes the same numbers again, and no order of
computation changes them. The kernels make them on a GPU; ``numpy.random.Philox``, or the machine code of small steps,
makes them on a CPU.

    key      (seed, 0)
    counter  (1 + group, step, layer, stream)        group = row * ceil(N / 16) + column // 16

Each row begins a new group of 16 columns. The four words of 64 bits of a group are 16 numbers of 16 bits, from the low
bits of the first word up; number i belongs to column 16 * (group of the row) + i. The rows of a layer's output [M, N]
are counted from 0, and those of an ensemble's output [E, M, N] as rows of [E M, N]. ``step`` counts training passes,
``layer`` is the place among the layers from 0 on, and ``stream`` is the process under data parallelism, else 0. (The
counter of numpy's generator is raised before its first use, which is why 1 is added to the group.)

An element is kept where its number is at least p * 2^16, rounded to a whole number from 1 to 2^16 - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.dropout import GROUP, threshold

#: Multipliers of the first and the third counter word, and what each round adds to the key.
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor, rounds: int = 10) -> Tensor:
    """Philox-4x64: the output words [..., 4] of counters [..., 4] and a key [2].

    All are int64 with the bits of the unsigned words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(rounds):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _signed(_KEY_STEPS[0]), k1 + _signed(_KEY_STEPS[1])
    return torch.stack((c0, c1, c2, c3), -1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >> 63 else word


def _high_half(word: Tensor) -> Tensor:
    return (word >> 32) & _LOW


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the unsigned product, from products of halves (Warren, Hacker's Delight, 8-2)."""
    a_high, a_low, b_high, b_low = _high_half(a), a & _LOW, b >> 32, b & _LOW
    middle = a_high * b_low + _high_half(a_low * b_low)
    other = a_low * b_high + (middle & _LOW)
    return a_high * b_high + _high_half(middle) + _high_half(other), a * _signed(b)


def numbers(seed: int, step: int, layer: int, rows: int, columns: int, stream: int = 0) -> Tensor:
    """The random numbers of a layer's output, int64 [rows, columns] from 0 to 65,535."""
    state = torch.tensor([_signed(seed % (1 << 64)), step], dtype=torch.int64, device="cpu")
    return numbers_of(state, layer, rows, columns, stream)


def numbers_of(state: Tensor, layer: int, rows: int, columns: int, stream: int = 0) -> Tensor:
    """``numbers`` of the state (seed, step), int64 [2], on the state's device."""
    groups = -(-columns // GROUP)
    seed, step = state.unbind()
    first = torch.arange(1, 1 + rows * groups, device=state.device)
    counter = torch.stack(
        [first, step.expand_as(first), torch.full_like(first, layer), torch.full_like(first, stream)], -1
    )
    words = philox(counter, torch.stack([seed, torch.zeros_like(seed)]))
    pieces = torch.stack([(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], -1)
    return pieces.reshape(rows, groups * GROUP)[:, :columns]


def keep_mask(seed: int, step: int, layer: int, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    """Which elements of a layer's output dropout keeps, bool [rows, columns] on the CPU.

    Args:
        seed, step: of the model's ``dropout_state``.
        layer: place among the layers, from 0 on.
        rows: M, or E M of an ensemble, whose member e has the rows from e M on.
        p: probability of an element to be dropped, at least 0 and below 1; 0 keeps everything.
        stream: the rank under data parallelism.
    """
    if p == 0:
        return torch.ones(rows, columns, dtype=torch.bool, device="cpu")
    return numbers(seed, step, layer, rows, columns, stream) >= threshold(p)


def dropout(a: Tensor, keep: Tensor, p: float) -> Tensor:
    """A_out = keep * A / (1 - p), as a product, so that a dropped NaN or infinity is NaN, as torch's is."""
    return a * keep.to(a.dtype) * (1 / (1 - p))
