"""Floating-point arithmetic, scalar and packed, and the special functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decoder import Decoder, Execute, Registers, assign, opcode, operand_type, unsupported
from .dtypes import BITS, UINT, as_bits, as_numbers, f32, f64, ftz, round_sum_f32, to_f32_directed, u32
from .parser import Instruction

FLOAT_TYPES = frozenset(("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"))

FloatFunction = Callable[..., np.ndarray]


def float_arithmetic(D: Decoder, ins: Instruction) -> Execute:
    T, o = operand_type(ins), ins.op
    if T.endswith("x2"):
        return _packed(D, ins, T)
    # In a mixed form such as sub.rn.f32.bf16 d, a, c the last type belongs to the first sources.
    types = [m for m in ins.mods if m in FLOAT_TYPES]
    n_sources = len(ins.ops) - 1
    source_types = [T] * n_sources
    if len(types) == 2:
        T, mixed = types
        n_mixed = {"add": 1, "sub": 1, "fma": 2}.get(o)
        if n_mixed is None or T != "f32":
            unsupported(ins)
        source_types = [mixed] * n_mixed + [T] * (n_sources - n_mixed)
    d = D.dst(ins, ins.ops[0], BITS[T])
    s = [D.src(ins, x, BITS[t]) for x, t in zip(ins.ops[1:], source_types, strict=True)]
    f = _function(D, ins, T)
    if set(source_types) == {"f32"}:
        return assign(d, _on_f32(f, s))
    numbers, bits = [as_numbers(t) for t in source_types], as_bits(T)
    return assign(d, lambda R: bits(f(*[g(R[x]) for g, x in zip(numbers, s, strict=True)])))


def _on_f32(f: FloatFunction, s: list[int]) -> Callable[[Registers], np.ndarray]:
    """The bits of f of float32 registers, without a loop for the usual numbers of registers."""
    if len(s) == 3:
        x, y, z = s
        return lambda R: f(R[x].view(f32), R[y].view(f32), R[z].view(f32)).view(u32)
    if len(s) == 2:
        x, y = s
        return lambda R: f(R[x].view(f32), R[y].view(f32)).view(u32)
    return lambda R: f(*[R[x].view(f32) for x in s]).view(u32)


def _packed(D: Decoder, ins: Instruction, T: str) -> Execute:
    """Two values in one register."""
    E, b = T[:-2], BITS[T]
    d = D.dst(ins, ins.ops[0], b)
    s = [D.src(ins, x, b) for x in ins.ops[1:]]
    f, g, e = _function(D, ins, E), as_numbers(E), as_bits(E)
    half, t = UINT[b // 2], UINT[b]
    shift = t(b // 2)

    def fn(R: Registers) -> np.ndarray:
        lo = e(f(*[g(R[x].astype(half)) for x in s]))
        hi = e(f(*[g((R[x] >> shift).astype(half)) for x in s]))
        return lo.astype(t) | (hi.astype(t) << shift)

    return assign(d, fn)


def _function(D: Decoder, ins: Instruction, T: str) -> FloatFunction:
    """The numeric function of an opcode; its arguments and result are f32 (f64 for T = f64)."""
    f = _plain_function(D, ins, T)
    if "ftz" in ins.mods and T == "f32":
        f = _flushing(f)
    if "sat" in ins.mods:
        f = _saturating(f)
    if "relu" in ins.mods:
        f = _rectifying(f)
    return f


def _plain_function(D: Decoder, ins: Instruction, T: str) -> FloatFunction:
    o, mods = ins.op, ins.mods
    mode = next((m for m in mods if m in ("rn", "rz", "rm", "rp")), "rn")
    directed = mode != "rn" and T == "f32"
    if o in ("fma", "mad"):
        if T == "f64":
            return lambda x, y, z: x * y + z  # not fused
        if T != "f32":
            return lambda x, y, z: np.multiply(x, y, dtype=f64) + z  # rounded by the conversion to bits
        if directed:
            return lambda x, y, z: to_f32_directed(np.multiply(x, y, dtype=f64) + z, mode)
        return lambda x, y, z: round_sum_f32(np.multiply(x, y, dtype=f64), z)
    if o in ("add", "sub", "mul"):
        u = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[o]
        return (lambda x, y: to_f32_directed(u(x, y, dtype=f64), mode)) if directed else u
    if o in ("min", "max"):
        return _extremum(o == "min", "NaN" in mods)
    if o == "abs":
        return np.abs
    if o == "neg":
        return np.negative
    if o == "copysign":
        return lambda x, y: np.copysign(y, x)
    if o == "div":
        if T != "f64" and ("full" in mods or "approx" in mods):
            return lambda x, y: D.noise(np.divide(x, y, dtype=f64).astype(f32), 2.0**-22)
        return (lambda x, y: to_f32_directed(np.divide(x, y, dtype=f64), mode)) if directed else np.divide
    unsupported(ins)


def _extremum(least: bool, keep_nan: bool) -> FloatFunction:
    """Minimum or maximum of two numbers (from sm_100 on also three), with -0 < +0."""
    pick = {(True, False): np.fmin, (True, True): np.minimum, (False, False): np.fmax, (False, True): np.maximum}[
        least, keep_nan
    ]

    def f(x: np.ndarray, y: np.ndarray, *more: np.ndarray) -> np.ndarray:
        r = pick(x, y)
        zeros = (x == 0) & (y == 0)
        if zeros.any():
            negative = (np.signbit(x) | np.signbit(y)) if least else (np.signbit(x) & np.signbit(y))
            r = np.where(zeros, np.where(negative, r.dtype.type(-0.0), r.dtype.type(0.0)), r)
        return f(r, *more) if more else r

    return f


def _flushing(f: FloatFunction) -> FloatFunction:
    return lambda *a: ftz(f(*[ftz(x) for x in a]))


def _saturating(f: FloatFunction) -> FloatFunction:
    return lambda *a: np.where(np.isnan(r := f(*a)), r.dtype.type(0), np.clip(r, 0, 1))


def _rectifying(f: FloatFunction) -> FloatFunction:
    return lambda *a: np.where(np.isnan(r := f(*a)), r, np.maximum(r, r.dtype.type(0)))


# The function on float64, and the relative error that the PTX manual states for the approximate form.
_SPECIAL = {
    "ex2": (np.exp2, 2.0**-22),
    "lg2": (np.log2, 2.0**-22),
    "rcp": (lambda x: 1.0 / x, 2.0**-23),
    "sqrt": (np.sqrt, 2.0**-23),
    "rsqrt": (lambda x: 1.0 / np.sqrt(x), 2.0**-22.4),
    "sin": (np.sin, 2.0**-20),
    "cos": (np.cos, 2.0**-20),
    "tanh": (np.tanh, 2.0**-10.987),
}


@opcode(*_SPECIAL)
def special_function(D: Decoder, ins: Instruction) -> Execute:
    T = operand_type(ins)
    if T not in ("f32", "f64", "f16", "bf16"):
        unsupported(ins)
    F, error = _SPECIAL[ins.op]
    mode = next((m for m in ins.mods if m in ("rz", "rm", "rp")), "rn")
    approx, flush = "approx" in ins.mods, "ftz" in ins.mods and T == "f32"
    b = BITS[T]
    a, d, numbers, bits = D.src(ins, ins.ops[1], b), D.dst(ins, ins.ops[0], b), as_numbers(T), as_bits(T)

    def f(R: Registers) -> np.ndarray:
        x = numbers(R[a])
        r = F((ftz(x) if flush else x).astype(f64))
        if T == "f64":
            return bits(r)
        if T != "f32":
            return bits(r.astype(f32))
        r = r.astype(f32) if mode == "rn" else to_f32_directed(r, mode)
        if approx:
            r = D.noise(r, error)
        return bits(ftz(r) if flush else r)

    return assign(d, f)
