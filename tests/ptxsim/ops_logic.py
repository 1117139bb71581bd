"""Bitwise logic, shifts, bit fields and bit counts."""

from __future__ import annotations

import numpy as np

from .decoder import Decoder, Execute, Registers, assign, assign2, immediate, opcode, operand_type, unsupported
from .dtypes import BITS, SINT, UINT, i32, i64, u32, u64
from .parser import Instruction


@opcode("and", "or", "xor")
def logic(D: Decoder, ins: Instruction) -> Execute:
    b = BITS[operand_type(ins)]
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.op]
    return assign2(D.dst(ins, ins.ops[0], b), f, D.src(ins, ins.ops[1], b), D.src(ins, ins.ops[2], b))


@opcode("not", "cnot")
def invert(D: Decoder, ins: Instruction) -> Execute:
    b = BITS[operand_type(ins)]
    a = D.src(ins, ins.ops[1], b)
    if ins.op == "cnot":
        return assign(D.dst(ins, ins.ops[0], b), lambda R: (R[a] == 0).astype(UINT[b]))
    return assign(D.dst(ins, ins.ops[0], b), lambda R: ~R[a])


@opcode("shl", "shr")
def shift(D: Decoder, ins: Instruction) -> Execute:
    T = operand_type(ins)
    b = BITS[T]
    d, a, s = D.dst(ins, ins.ops[0], b), D.src(ins, ins.ops[1], b), D.src(ins, ins.ops[2], 32)
    t = UINT[b]
    n = D.const_value(s)
    if n is not None and n < b:
        if ins.op == "shl":
            return assign(d, lambda R: R[a] << t(n))
        if T[0] == "s":
            return assign(d, lambda R: (R[a].view(SINT[b]) >> SINT[b](n)).view(t))
        return assign(d, lambda R: R[a] >> t(n))

    def f(R: Registers) -> np.ndarray:
        k = R[s]
        big = k >= u32(b)
        kk = np.minimum(k, u32(b - 1)).astype(t)
        x = R[a]
        if T[0] == "s" and ins.op == "shr":
            return (x.view(SINT[b]) >> kk.view(SINT[b])).view(t)
        v = x << kk if ins.op == "shl" else x >> kk
        return np.where(big, t(0), v)

    return assign(d, f)


@opcode("shf")
def funnel_shift(D: Decoder, ins: Instruction) -> Execute:
    d = D.dst(ins, ins.ops[0], 32)
    a, b, s = (D.src(ins, x, 32) for x in ins.ops[1:4])
    left, wrap = ins.mods[0] == "l", ins.mods[1] == "wrap"

    def f(R: Registers) -> np.ndarray:
        v = (R[b].astype(u64) << u64(32)) | R[a]
        k = (R[s] & u32(31)) if wrap else np.minimum(R[s], u32(32))
        k = k.astype(u64)
        return (((v << k) >> u64(32)) if left else (v >> k)).astype(u32)

    return assign(d, f)


@opcode("lop3")
def lop3(D: Decoder, ins: Instruction) -> Execute:
    d = D.dst(ins, ins.ops[0], 32)
    a, b, c = (D.src(ins, x, 32) for x in ins.ops[1:4])
    lut = immediate(ins.ops[4], 32)

    def f(R: Registers) -> np.ndarray:
        x, y, z = R[a], R[b], R[c]
        out = np.zeros(1, u32)
        for i in range(8):
            if lut >> i & 1:
                out = out | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        return out

    return assign(d, f)


@opcode("prmt")
def prmt(D: Decoder, ins: Instruction) -> Execute:
    if ins.mods != ["b32"]:
        unsupported(ins)
    d = D.dst(ins, ins.ops[0], 32)
    a, b, s = (D.src(ins, x, 32) for x in ins.ops[1:4])

    def f(R: Registers) -> np.ndarray:
        v = (R[b].astype(u64) << u64(32)) | R[a]
        sel = R[s].astype(u64)
        out = np.zeros(1, u64)
        for i in range(4):
            k = (sel >> u64(4 * i)) & u64(15)
            byte = (v >> ((k & u64(7)) * u64(8))) & u64(255)
            byte = np.where(k & u64(8), np.where(byte & u64(128), u64(255), u64(0)), byte)
            out = out | (byte << u64(8 * i))
        return out.astype(u32)

    return assign(d, f)


@opcode("bfe")
def bfe(D: Decoder, ins: Instruction) -> Execute:
    T = operand_type(ins)
    b = BITS[T]
    t = UINT[b]
    d, a = D.dst(ins, ins.ops[0], b), D.src(ins, ins.ops[1], b)
    p, n = D.src(ins, ins.ops[2], 32), D.src(ins, ins.ops[3], 32)

    def f(R: Registers) -> np.ndarray:
        pos, ln = (R[p] & u32(255)).astype(i64), (R[n] & u32(255)).astype(i64)
        x = R[a]
        sh = np.minimum(pos, b - 1).astype(t)
        v = np.where(pos >= b, t(0), x >> sh)
        mask = np.where(ln >= b, t((1 << b) - 1), (t(1) << np.minimum(ln, b - 1).astype(t)) - t(1))
        v = v & mask
        if T[0] == "s":
            top = np.minimum(pos + ln - 1, b - 1)
            sign = np.where(ln == 0, t(0), (x >> np.maximum(top, 0).astype(t)) & t(1))
            avail = np.clip(np.minimum(ln, b - pos), 0, b)  # bits really present
            keep = np.where(avail >= b, t((1 << b) - 1), (t(1) << np.minimum(avail, b - 1).astype(t)) - t(1))
            v = np.where((sign != 0) & (ln > 0), (v & keep) | ~keep, v)
        return v

    return assign(d, f)


@opcode("bfi")
def bfi(D: Decoder, ins: Instruction) -> Execute:
    b = BITS[operand_type(ins)]
    t = UINT[b]
    d, a, x = D.dst(ins, ins.ops[0], b), D.src(ins, ins.ops[1], b), D.src(ins, ins.ops[2], b)
    p, n = D.src(ins, ins.ops[3], 32), D.src(ins, ins.ops[4], 32)

    def f(R: Registers) -> np.ndarray:
        pos, ln = (R[p] & u32(255)).astype(i64), (R[n] & u32(255)).astype(i64)
        mask = np.where(ln >= b, t((1 << b) - 1), (t(1) << np.minimum(ln, b - 1).astype(t)) - t(1))
        sh = np.minimum(pos, b - 1).astype(t)
        mask = np.where(pos >= b, t(0), mask << sh)
        return (R[x] & ~mask) | ((R[a] << sh) & mask)

    return assign(d, f)


@opcode("popc", "clz", "brev", "bfind")
def count_bits(D: Decoder, ins: Instruction) -> Execute:
    T = operand_type(ins)
    b = BITS[T]
    a = D.src(ins, ins.ops[1], b)
    d = D.dst(ins, ins.ops[0], b if ins.op == "brev" else 32)

    def bits_of(x: np.ndarray) -> np.ndarray:
        return (x[:, None] >> np.arange(b, dtype=UINT[b])) & UINT[b](1)

    def f(R: Registers) -> np.ndarray:
        x = R[a]
        if ins.op == "popc":
            return bits_of(x).sum(1, dtype=u32)
        if ins.op == "brev":
            return (bits_of(x)[:, ::-1] << np.arange(b, dtype=UINT[b])).sum(1, dtype=UINT[b])
        if ins.op == "bfind" and T[0] == "s":
            x = np.where(x.view(SINT[b]) < 0, ~x, x)
        bb = bits_of(x)
        top = np.where(bb.any(1), b - 1 - np.argmax(bb[:, ::-1], axis=1), -1).astype(i64)
        if ins.op == "clz":
            return (b - 1 - top).astype(u32)
        return (np.where(top < 0, -1, b - 1 - top) if "shiftamt" in ins.mods else top).astype(i32).view(u32)

    return assign(d, f)
