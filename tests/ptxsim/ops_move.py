"""Moves, address-space conversions, comparison and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .context import Context
from .decoder import (
    Decoder,
    Execute,
    Mask,
    Registers,
    assign,
    assign2,
    opcode,
    operand_type,
    unsupported,
    vector,
)
from .dtypes import BITS, SINT, UINT, as_numbers, ftz, u16, u32, u64
from .parser import Instruction


@opcode("mov")
def mov(D: Decoder, ins: Instruction) -> Execute:
    b = BITS[operand_type(ins)]
    dst, src = ins.ops
    if dst.startswith("{"):
        return _unpack(D, ins, b)
    d = D.dst(ins, dst, b)
    if src.startswith("{"):
        return _pack(D, ins, d, b)
    if src.strip() in ("%clock", "%clock64", "%globaltimer"):
        return assign(d, lambda R, t=UINT[b], clock=D.clock: np.array([clock()], t))
    a = D.src(ins, src, b)
    if D.bits[a] != b:
        return assign(d, lambda R, t=UINT[b]: R[a].astype(t))

    def fn(c: Context, m: Mask) -> None:
        R = c.R
        if m is None:
            R[d] = R[a]
        else:
            R[d] = np.where(m, R[a], R[d])

    return fn


def _unpack(D: Decoder, ins: Instruction, b: int) -> Execute:
    """mov {d0, d1, ...}, a: the first destination gets the lowest bits."""
    parts = vector(ins.ops[0])
    pb = b // len(parts)
    a = D.src(ins, ins.ops[1], b)
    ds = [D.dst(ins, p, pb) for p in parts]

    def fn(c: Context, m: Mask) -> None:
        x = c.R[a]
        if x.dtype == u64 and pb == 32:
            vals = [(x & u64(0xFFFFFFFF)).astype(u32), (x >> u64(32)).astype(u32)]
        else:
            vals = [(x >> x.dtype.type(pb * i)).astype(UINT[pb]) for i in range(len(ds))]
        for d, v in zip(ds, vals, strict=True):
            if m is None:
                c.R[d] = v
            else:
                c.write_masked(d, v, m)

    return fn


def _pack(D: Decoder, ins: Instruction, d: int, b: int) -> Execute:
    """mov d, {a0, a1, ...}."""
    parts = vector(ins.ops[1])
    pb = b // len(parts)
    ss = [D.src(ins, p, pb) for p in parts]
    t = UINT[b]

    def f(R: Registers) -> np.ndarray:
        v = R[ss[0]].astype(t)
        for i, s in enumerate(ss[1:], 1):
            v = v | (R[s].astype(t) << t(pb * i))
        return v

    return assign(d, f)


@opcode("cvta")
def cvta(D: Decoder, ins: Instruction) -> Execute:
    a, d = D.src(ins, ins.ops[1], 64), D.dst(ins, ins.ops[0], 64)
    space = next(m.split("::")[0] for m in ins.mods if m != "to")
    if space not in ("global", "param", "local"):  # in these spaces an address equals its generic address
        unsupported(ins, "(generic addresses) ")
    return assign(d, lambda R: R[a])


@opcode("selp")
def selp(D: Decoder, ins: Instruction) -> Execute:
    b = BITS[operand_type(ins)]
    x, y, p = D.src(ins, ins.ops[1], b), D.src(ins, ins.ops[2], b), D.src(ins, ins.ops[3], 1)
    return assign(D.dst(ins, ins.ops[0], b), lambda R: np.where(R[p], R[x], R[y]))


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_NEGATED = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(cmp: str, T: str, flush: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The predicate of two arrays of bits of type T."""
    if T == "pred" or (T[0] in "bu" and T != "bf16"):
        return _COMPARE[cmp]
    if T[0] == "s":
        t, signed = SINT[BITS[T]], _COMPARE[cmp]
        return lambda x, y: signed(x.view(t), y.view(t))
    numbers = as_numbers(T)

    def value(x: np.ndarray) -> np.ndarray:
        return ftz(numbers(x)) if flush else numbers(x)

    def unordered(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.isnan(numbers(x)) | np.isnan(numbers(y))

    if cmp == "nan":
        return unordered
    if cmp == "num":
        return lambda x, y: ~unordered(x, y)
    if cmp == "ne":  # ordered: false for a NaN, unlike numpy's
        return lambda x, y: (numbers(x) < numbers(y)) | (numbers(x) > numbers(y))
    if cmp == "neu":
        return lambda x, y: np.not_equal(value(x), value(y))
    if cmp == "equ":
        return lambda x, y: (numbers(x) == numbers(y)) | unordered(x, y)
    if cmp.endswith("u"):  # true for a NaN: the negation of the opposite ordered comparison
        opposite = _COMPARE[_NEGATED[cmp[:-1]]]
        return lambda x, y: ~opposite(value(x), value(y))
    ordered = _COMPARE[cmp]
    return lambda x, y: ordered(value(x), value(y))


@opcode("setp")
def setp(D: Decoder, ins: Instruction) -> Execute:
    T = operand_type(ins)
    b = BITS[T]
    x, y = D.src(ins, ins.ops[1], b), D.src(ins, ins.ops[2], b)
    combine = next((_BOOLEAN[m] for m in ins.mods[1:-1] if m in _BOOLEAN), None)
    ds = [D.dst(ins, s, 1) for s in ins.ops[0].split("|")]
    if T in ("f16x2", "bf16x2"):
        return _setp_pair(ins, T, ds, x, y, combine is not None)
    compare = _comparison(ins.mods[0], T, "ftz" in ins.mods and T == "f32")
    if combine is not None:
        if len(ds) > 1:
            unsupported(ins, "with two destinations and a boolean operator ")
        third = ins.ops[3].strip()
        negated = third.startswith("!")
        z = D.src(ins, third.lstrip("!"), 1)
        return assign(ds[0], lambda R: combine(compare(R[x], R[y]), ~R[z] if negated else R[z]))
    if len(ds) == 1:
        return assign2(ds[0], compare, x, y)
    d, q = ds

    def fn(c: Context, m: Mask) -> None:
        v = compare(c.R[x], c.R[y])
        if m is None:
            c.R[d], c.R[q] = v, ~v
        else:
            c.write_masked(d, v, m)
            c.write_masked(q, ~v, m)

    return fn


def _setp_pair(ins: Instruction, T: str, ds: list[int], x: int, y: int, combined: bool) -> Execute:
    """Compare two pairs of 16-bit numbers: the low halves set the first predicate, the high halves the second."""
    if combined or len(ds) != 2:
        unsupported(ins, "of pairs with a boolean operator or one destination ")
    low, high = ds
    compare = _comparison(ins.mods[0], T.removesuffix("x2"), False)

    def fn(c: Context, m: Mask) -> None:
        a, b = c.R[x], c.R[y]
        halves = (compare((a >> s).astype(u16), (b >> s).astype(u16)) for s in (a.dtype.type(0), a.dtype.type(16)))
        for d, v in zip((low, high), halves, strict=True):
            if m is None:
                c.R[d] = v
            else:
                c.write_masked(d, v, m)

    return fn


@opcode("createpolicy")
def createpolicy(D: Decoder, ins: Instruction) -> Execute:
    """Cache policies change no result."""
    return assign(D.dst(ins, ins.ops[0], 64), lambda R: np.zeros(1, u64))
