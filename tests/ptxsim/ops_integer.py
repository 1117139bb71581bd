"""Integer arithmetic. Opcodes that integers and floats share are decoded here, and passed on by their type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .context import Context
from .decoder import Decoder, Execute, Mask, Registers, assign, assign2, opcode, operand_type, unsupported
from .dtypes import BITS, SINT, UINT, i8, i32, i64, u8, u32, u64
from .ops_float import FLOAT_TYPES, float_arithmetic
from .parser import Instruction


@opcode("add", "sub", "mul", "min", "max", "div", "rem", "abs", "neg", "fma", "mad", "copysign", "sad")
def arithmetic(D: Decoder, ins: Instruction) -> Execute:
    T, o = operand_type(ins), ins.op
    if T in FLOAT_TYPES:
        return float_arithmetic(D, ins)
    if "cc" in ins.mods:
        return carry_arithmetic(D, ins)
    if T in ("s16x2", "u16x2") or "sat" in ins.mods:
        unsupported(ins)
    if o in ("mul", "mad"):
        return _multiply(D, ins, T)
    b = BITS[T]
    t = UINT[b]
    d = D.dst(ins, ins.ops[0], b)
    s = [D.src(ins, x, b) for x in ins.ops[1:]]
    if o in ("add", "sub"):
        return assign2(d, np.add if o == "add" else np.subtract, *s)

    def view(x: np.ndarray) -> np.ndarray:
        return x.view(SINT[b]) if T[0] == "s" else x

    if o in ("min", "max"):
        pick = np.minimum if o == "min" else np.maximum
        return assign2(d, lambda x, y: pick(view(x), view(y)).view(t), *s)
    if o == "abs":
        return assign(d, lambda R: np.abs(view(R[s[0]])).view(t))
    if o == "neg":
        return assign(d, lambda R: (~R[s[0]]) + t(1))
    if o == "sad":

        def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return (np.maximum(view(x), view(y)) - np.minimum(view(x), view(y))).view(t)

        return assign(d, lambda R: distance(R[s[0]], R[s[1]]) + R[s[2]])
    if o in ("div", "rem"):
        return assign2(d, _division(T, o == "rem"), *s)
    unsupported(ins)


def _division(T: str, remainder: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Truncating division; by zero the quotient has all bits set and the remainder is the dividend."""
    b = BITS[T]
    t, signed = UINT[b], T[0] == "s"

    def f(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if signed:
            x_neg, y_neg = x.view(SINT[b]) < 0, y.view(SINT[b]) < 0
            x, y = np.where(x_neg, ~x + t(1), x), np.where(y_neg, ~y + t(1), y)
        zero = y == 0
        q = x // np.where(zero, t(1), y)
        if remainder:
            r = np.where(zero, x, x - q * y)
            return np.where(x_neg, ~r + t(1), r) if signed else r
        q = np.where(zero, t((1 << b) - 1), q)
        return np.where((x_neg ^ y_neg) & ~zero, ~q + t(1), q) if signed else q

    return f


def _wide(x: np.ndarray, T: str) -> np.ndarray:
    """Bits of integer type T -> integers of twice the width, signed or unsigned."""
    b = BITS[T]
    if T[0] == "s":
        return x.view(SINT[b]).astype(SINT[b * 2])
    return x.astype(UINT[b * 2])


def _mulhi64(x: np.ndarray, y: np.ndarray, signed: bool) -> np.ndarray:
    m = u64(0xFFFFFFFF)
    a0, a1, b0, b1 = x & m, x >> u64(32), y & m, y >> u64(32)
    t = a0 * b0
    t1 = a1 * b0 + (t >> u64(32))
    t2 = a0 * b1 + (t1 & m)
    hi = a1 * b1 + (t1 >> u64(32)) + (t2 >> u64(32))
    if signed:
        hi = hi - np.where(x.view(i64) < 0, y, u64(0)) - np.where(y.view(i64) < 0, x, u64(0))
    return hi


def _product(ins: Instruction, T: str, mode: str | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    b = BITS[T]
    if mode == "lo":
        return np.multiply
    if mode == "wide":
        t = UINT[2 * b]
        return lambda x, y: (_wide(x, T) * _wide(y, T)).view(t)
    if mode == "hi":
        signed = T[0] == "s"
        if b == 64:
            return lambda x, y: _mulhi64(x, y, signed)
        wide, half = (SINT[2 * b], SINT[b]) if signed else (UINT[2 * b], UINT[b])
        return lambda x, y: ((_wide(x, T) * _wide(y, T)) >> wide(b)).astype(half).view(UINT[b])
    unsupported(ins)


def _multiply(D: Decoder, ins: Instruction, T: str) -> Execute:
    b = BITS[T]
    mode = next((m for m in ins.mods if m in ("lo", "hi", "wide")), None)
    ob = b * 2 if mode == "wide" else b
    product = _product(ins, T, mode)
    d, x, y = D.dst(ins, ins.ops[0], ob), D.src(ins, ins.ops[1], b), D.src(ins, ins.ops[2], b)
    if ins.op == "mul":
        return assign2(d, product, x, y)
    z = D.src(ins, ins.ops[3], ob)
    return assign(d, lambda R: product(R[x], R[y]) + R[z])


def _add_carry(x: np.ndarray, y: np.ndarray, carry_in: np.ndarray | None, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(sum, carry) of b-bit unsigned numbers."""
    s = x + y
    carry = s < x
    if carry_in is not None:
        with_carry = s + carry_in.astype(UINT[b])
        carry = carry | (with_carry < s)
        s = with_carry
    return s, carry


def _sub_borrow(x: np.ndarray, y: np.ndarray, borrow_in: np.ndarray | None, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(difference, borrow) of b-bit unsigned numbers."""
    v = x - y
    borrow = x < y
    if borrow_in is not None:
        one = borrow_in.astype(UINT[b])
        borrow = borrow | (v < one)
        v = v - one
    return v, borrow


@opcode("addc", "subc", "madc")
def carry_arithmetic(D: Decoder, ins: Instruction) -> Execute:
    """add.cc, addc and their kin. The carry is one flag per lane, beside the registers."""
    T = operand_type(ins)
    b = BITS[T]
    sets, uses, base = "cc" in ins.mods, ins.op.endswith("c"), ins.op[:3]
    d = D.dst(ins, ins.ops[0], b)
    s = [D.src(ins, x, b) for x in ins.ops[1:]]
    mode = next((m for m in ins.mods if m in ("lo", "hi")), None)
    product = _product(ins, T, mode) if base == "mad" else None
    combine = _sub_borrow if base == "sub" else _add_carry

    def fn(c: Context, m: Mask) -> None:
        R = c.R
        x, y = R[s[0]], R[s[1]]
        if product is not None:
            x, y = product(x, y), R[s[2]]
        v, carry = combine(x, y, c.carry if uses else None, b)
        if m is None:
            R[d] = v
            if sets:
                c.carry = carry
        else:
            c.write_masked(d, v, m)
            if sets:
                c.carry = np.where(m, carry, c.carry)

    return fn


@opcode("dp4a")
def dp4a(D: Decoder, ins: Instruction) -> Execute:
    """The dot product of four bytes, added to a 32-bit integer."""
    ta, tb = (i8 if t == "s32" else u8 for t in ins.mods[:2])
    d = D.dst(ins, ins.ops[0], 32)
    a, b, c = (D.src(ins, x, 32) for x in ins.ops[1:4])

    def f(R: Registers) -> np.ndarray:
        x = np.ascontiguousarray(R[a]).view(ta).reshape(-1, 4).astype(i64)
        y = np.ascontiguousarray(R[b]).view(tb).reshape(-1, 4).astype(i64)
        return ((x * y).sum(1) + R[c].view(i32)).astype(u32)

    return assign(d, f)
