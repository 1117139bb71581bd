"""PTX types as numpy arrays. Registers hold bits in unsigned containers; to compute, the bits are viewed as numbers.

A register array has one element per lane, or a single element when the value is the same for every lane.
Roundings that numpy lacks are here too: one rounding of a fused product and sum, directed modes, bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

# Width in bits of every PTX type that an instruction or a declaration may name.
BITS: dict[str, int] = {f"{kind}{bits}": bits for bits in (8, 16, 32, 64) for kind in "bus"}
BITS.update(f16=16, bf16=16, f32=32, f64=64, f16x2=32, bf16x2=32, tf32=32, f32x2=64, pred=1, b128=128)

# Containers by width; signed views of them.
UINT = {1: np.bool_, 8: u8, 16: u16, 32: u32, 64: u64}
SINT = {8: i8, 16: i16, 32: i32, 64: i64}

# The bits of a register before the first write: a NaN in every float view.
POISON = {1: False, 8: 0xAD, 16: 0x7FFD, 32: 0x7FC0DEAD, 64: 0x7FF8DEADBEEFDEAD}


def byte_flags(flags: np.ndarray, n: int) -> tuple[np.ndarray, np.unsignedinteger]:
    """Flags of one byte each as [len / n, words], and the word in which all are set, to compare n flags at once."""
    width = min(n, 8)
    t = UINT[8 * width]
    return flags.view(t).reshape(-1, n // width), t(int.from_bytes(b"\1" * width, "little"))


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    return (x.astype(u32) << u32(16)).view(f32)


def f32_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest even ("rn") or towards zero ("rz"); NaNs become the canonical one."""
    u = np.ascontiguousarray(x, f32).view(u32)
    if mode == "rz":
        r = (u >> u32(16)).astype(u16)
    else:
        r = ((u + u32(0x7FFF) + ((u >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    nan = (u & u32(0x7FFFFFFF)) > u32(0x7F800000)
    return np.where(nan, u16(0x7FFF), r) if nan.any() else r


def to_f32_directed(s: np.ndarray, mode: str) -> np.ndarray:
    """float64 -> float32 with rounding mode rn / rz / rm / rp (s itself within float64 precision)."""
    r = s.astype(f32)
    if mode == "rn":
        return r
    d = r.astype(f64)
    if mode == "rz":
        bad = np.abs(d) > np.abs(s)
        return np.where(bad, np.nextafter(r, f32(0)), r)
    if mode == "rm":
        return np.where(d > s, np.nextafter(r, f32(-np.inf)), r)
    return np.where(d < s, np.nextafter(r, f32(np.inf)), r)


def round_sum_f32(p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32(p + c) with one rounding, for float64 p and c (p an exact product of float32s)."""
    s = p + c
    r = s.astype(f32)
    # Rounding twice can only matter when the float64 sum sits exactly on a float32 tie.
    tie = (s.view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)
    if tie.any():
        p, c = np.broadcast_to(p, s.shape)[tie], np.broadcast_to(np.asarray(c, f64), s.shape)[tie]
        t = s[tie]
        bv = t - p
        e = (p - (t - bv)) + (c - bv)  # the part that the float64 sum lost (Knuth's two-sum)
        t = np.where(e > 0, np.nextafter(t, np.inf), np.where(e < 0, np.nextafter(t, -np.inf), t))
        r[tie] = t.astype(f32)
    return r


def ftz(x: np.ndarray) -> np.ndarray:
    """Flush float32 subnormals to zero, keeping the sign."""
    tiny = np.abs(x) < f32(1.17549435e-38)
    return np.where(tiny, np.copysign(f32(0), x), x) if tiny.any() else x


def tf32_rna(u: np.ndarray) -> np.ndarray:
    """float32 bits rounded to tf32 (10 mantissa bits), ties away from zero."""
    r = (u + u32(0x1000)) & u32(0xFFFFE000)
    special = (u & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(special, u, r) if special.any() else r


def as_numbers(T: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns the bits of PTX type `T` into numbers (float16 and bfloat16 as float32)."""
    if T == "f16":
        return lambda x: x.view(f16).astype(f32)
    if T == "bf16":
        return bf16_to_f32
    if T in ("f32", "tf32"):
        return lambda x: x.view(f32)
    if T == "f64":
        return lambda x: x.view(f64)
    if T[0] == "s":
        return lambda x, t=SINT[BITS[T]]: x.view(t)
    return lambda x: x


def as_bits(T: str) -> Callable[[np.ndarray], np.ndarray]:
    """The inverse of `as_numbers`: the function that turns numbers, in that dtype, into the bits of PTX type `T`."""
    if T == "f16":
        return lambda x: x.astype(f16).view(u16)
    if T == "bf16":
        return f32_to_bf16
    return lambda x, t=UINT[BITS[T]]: x.view(t)


def f32_to_half(x: np.ndarray, T: str, mode: str | None) -> np.ndarray:
    """Floating-point numbers -> bits of "f16" or "bf16", rounding "rn" (or None) or "rz"."""
    if mode not in ("rn", "rz", None):
        raise NotImplementedError(f"cvt.{mode} to {T}")
    if T == "bf16":
        return f32_to_bf16(x.astype(f32), mode or "rn")
    r = x.astype(f16)
    if mode == "rz":
        r = np.where(np.abs(r.astype(f64)) > np.abs(x.astype(f64)), np.nextafter(r, f16(0)), r)
    nan = np.isnan(r)
    v = np.ascontiguousarray(r).view(u16)
    return np.where(nan, u16(0x7FFF), v) if nan.any() else v
