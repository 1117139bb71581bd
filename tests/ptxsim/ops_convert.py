"""Conversions between number formats (cvt)."""

from __future__ import annotations

import numpy as np

from .decoder import Decoder, Execute, Registers, assign, opcode, unsupported
from .dtypes import (
    BITS,
    SINT,
    UINT,
    as_numbers,
    f32,
    f32_to_half,
    f64,
    ftz,
    i64,
    tf32_rna,
    to_f32_directed,
    u32,
    u64,
)
from .parser import Instruction

_ROUND_INT = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_MODES = ("rn", "rz", "rm", "rp", "rna")
_FLOATS = ("f16", "bf16", "f32", "f64")


class _Conversion:
    """The parts that all conversions share: types, slots, rounding, flags."""

    def __init__(self, D: Decoder, ins: Instruction, to: str, of: str) -> None:
        mods = ins.mods
        self.ins, self.to, self.of = ins, to, of
        self.mode = next((m for m in mods if m in _MODES), None)
        self.rint = next((_ROUND_INT[m] for m in mods if m in _ROUND_INT), None)
        self.flush, self.sat, self.relu = "ftz" in mods and of == "f32", "sat" in mods, "relu" in mods
        self.from_bits, self.to_bits = BITS[of], BITS[to]
        self.a = D.src(ins, ins.ops[1], self.from_bits)
        self.d = D.dst(ins, ins.ops[0], self.to_bits)
        self.register_bits = D.bits[self.d]  # may be wider than the result
        self._numbers = as_numbers(of)
        self._narrow = UINT[self.from_bits] if D.bits[self.a] != self.from_bits else None

    def source(self, R: Registers) -> np.ndarray:
        x = R[self.a] if self._narrow is None else R[self.a].astype(self._narrow)
        x = self._numbers(x)
        return ftz(x) if self.flush else x

    def store_integer(self, v: np.ndarray) -> np.ndarray:
        """Sign- or zero-extended to the register."""
        ob = self.register_bits
        return v.astype(SINT[ob]).view(UINT[ob]) if self.to[0] == "s" else v.astype(UINT[ob])


@opcode("cvt")
def cvt(D: Decoder, ins: Instruction) -> Execute:
    types = [m for m in ins.mods if m in BITS or m in ("e4m3x2", "e5m2x2")]
    if len(types) != 2 or "satfinite" in ins.mods or "rs" in ins.mods:
        unsupported(ins)
    to, of = types
    if "x2" in of or to in ("e4m3x2", "e5m2x2"):
        unsupported(ins)
    if to in ("f16x2", "bf16x2"):
        return _to_pair(D, ins, to[:-2])
    v = _Conversion(D, ins, to, of)
    if to == "tf32":
        return _to_tf32(v)
    if of in _FLOATS:
        return _float_to_float(v) if to in _FLOATS else _float_to_integer(v)
    return _integer_to_float(v) if to in _FLOATS else _integer_to_integer(v)


def _to_pair(D: Decoder, ins: Instruction, E: str) -> Execute:
    """cvt.f16x2.f32 d, a, b: a to the upper half."""
    d = D.dst(ins, ins.ops[0], 32)
    hi, lo = D.src(ins, ins.ops[1], 32), D.src(ins, ins.ops[2], 32)
    mode = next((m for m in ins.mods if m in _MODES), None)
    relu = "relu" in ins.mods

    def half(x: np.ndarray) -> np.ndarray:
        x = x.view(f32)
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, f32(0)))
        return f32_to_half(x, E, mode).astype(u32)

    return assign(d, lambda R: (half(R[hi]) << u32(16)) | half(R[lo]))


def _rn_tf32(u: np.ndarray) -> np.ndarray:
    r = (u + u32(0xFFF) + ((u >> u32(13)) & u32(1))) & u32(0xFFFFE000)
    return np.where((u & u32(0x7F800000)) == u32(0x7F800000), u, r)


def _to_tf32(v: _Conversion) -> Execute:
    a = v.a
    if v.mode == "rna":
        return assign(v.d, lambda R: tf32_rna(R[a]))
    if v.mode == "rn":
        return assign(v.d, lambda R: _rn_tf32(R[a]))
    if v.mode == "rz":
        return assign(v.d, lambda R: R[a] & u32(0xFFFFE000))
    unsupported(v.ins)


def _integer_to_integer(v: _Conversion) -> Execute:
    db, sb, signed = v.to_bits, v.from_bits, v.to[0] == "s"
    lo, hi = (-(1 << db - 1), (1 << db - 1) - 1) if signed else (0, (1 << db) - 1)

    def f(R: Registers) -> np.ndarray:
        x = v.source(R)
        if v.sat:
            if v.of[0] == "u":
                x = np.minimum(x, x.dtype.type(min(hi, (1 << sb) - 1)))
            else:
                x = np.clip(x, max(lo, -(1 << sb - 1)), min(hi, (1 << sb - 1) - 1))
        return v.store_integer(x.astype(SINT[db] if signed else UINT[db]))

    return assign(v.d, f)


def _float_to_integer(v: _Conversion) -> Execute:
    """Clamps to the range of the type; a NaN gives 0, or in 64 bits the extreme value."""
    if v.rint is None:
        unsupported(v.ins)
    db, signed = v.to_bits, v.to[0] == "s"
    lo, hi = (-(2 ** (db - 1)), 2 ** (db - 1) - 1) if signed else (0, 2**db - 1)
    t = SINT[db] if signed else UINT[db]

    def f(R: Registers) -> np.ndarray:
        x = v.rint(v.source(R).astype(f64))
        nan, big, small = np.isnan(x), x >= float(hi), x <= float(lo)
        r = np.where(nan | big | small, 0, x).astype(i64 if signed or db < 64 else u64).astype(t)
        r = np.where(big, t(hi), np.where(small, t(lo), r))
        if db == 64:
            r = np.where(nan, t(lo if signed else 1 << 63), r)
        return v.store_integer(r)

    return assign(v.d, f)


def _integer_to_float(v: _Conversion) -> Execute:
    to = v.to
    if v.mode != "rn" and to != "f64" and (to != "f32" or v.from_bits > 32):
        unsupported(v.ins)

    def f(R: Registers) -> np.ndarray:
        x = v.source(R)
        if to == "f64":
            return x.astype(f64).view(u64)
        if to != "f32":
            return f32_to_half(x.astype(f64) if to == "f16" else x.astype(f32), to, "rn")
        if v.mode == "rn":
            return x.astype(f32).view(u32)
        return to_f32_directed(x.astype(f64), v.mode).view(u32)

    return assign(v.d, f)


def _float_to_float(v: _Conversion) -> Execute:
    to, mode = v.to, v.mode or "rn"
    flush = "ftz" in v.ins.mods

    def f(R: Registers) -> np.ndarray:
        x = v.source(R)
        if v.rint is not None:
            x = v.rint(x)
        if v.relu:
            x = np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))
        if v.sat:
            x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
        if to == "f64":
            return x.astype(f64).view(u64)
        if to == "f32":
            r = to_f32_directed(x, mode) if x.dtype == f64 else x
            return (ftz(r) if flush else r).view(u32)
        return f32_to_half(x, to, mode)

    return assign(v.d, f)
