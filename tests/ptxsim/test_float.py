"""Floating-point instructions and conversions against exact or float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptxsim import run_triton
from tests.ptxsim.samples.elementwise import k_softmax
from tests.ptxsim.samples.instructions import fbits, floats, ints, run_ptx

pytestmark = pytest.mark.execute


def round_f32(q: Fraction) -> np.float32:
    """Exact fraction -> nearest float32 (ties to even), without float64."""
    if q == 0:
        return np.float32(0)
    sign, q = (-1, -q) if q < 0 else (1, q)
    e = max(-126, q.numerator.bit_length() - q.denominator.bit_length())
    while e > -126 and q < Fraction(2) ** e:
        e -= 1
    while q >= Fraction(2) ** (e + 1):
        e += 1
    m = q / Fraction(2) ** (e - 23)
    n = m.numerator // m.denominator
    rem = m - n
    if rem > Fraction(1, 2) or (rem == Fraction(1, 2) and n & 1):
        n += 1
    return np.float32(sign * float(Fraction(n) * Fraction(2) ** (e - 23)))


def test_fma_rounds_once() -> None:
    r = np.random.default_rng(1)
    n = 1024
    a, b, c = floats(n, 1, False), floats(n, 2, False), floats(n, 3, False)
    # products whose sum with c falls on or just beside a float32 tie
    a[:512] = (1 + r.integers(0, 1 << 12, 512) * 2.0**-12).astype(np.float32)
    b[:512] = (1 + r.integers(0, 1 << 12, 512) * 2.0**-12).astype(np.float32)
    c[:512] = (np.where(r.random(512) < 0.5, 1, -1) * 2.0 ** r.integers(-60, 1, 512)).astype(np.float32)
    a[:8], b[:8] = 1 + 2.0**-12, 1 + 2.0**-12  # 1 + 2^-11 + 2^-24: an exact tie
    c[:8] = [2.0**-60, -(2.0**-60), 0, 2.0**-80, -(2.0**-80), 2.0**-55, 1, -1]
    got = run_ptx("fma.rn.f32 %o, %a0, %a1, %a2;", [fbits(a), fbits(b), fbits(c)], 32).view(np.float32)
    for i in range(n):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert got[i] == round_f32(exact), (a[i], b[i], c[i])


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("add.f32", lambda a, b: a + b),
        ("sub.f32", lambda a, b: a - b),
        ("mul.f32", lambda a, b: a * b),
        ("div.rn.f32", lambda a, b: a / b),
        ("max.f32", np.fmax),
        ("min.f32", np.fmin),
        ("max.NaN.f32", np.maximum),
        ("div.full.f32", lambda a, b: a / b),
    ],
)
def test_float_binary(text: str, ref: Callable) -> None:
    a, b = floats(seed=1), floats(seed=2)
    with np.errstate(all="ignore"):
        want = ref(a, b)
    got = run_ptx(f"{text} %o, %a0, %a1;", [fbits(a), fbits(b)], 32).view(np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("cmp", "ref"),
    [
        ("lt", lambda a, b: a < b),
        ("ltu", lambda a, b: not a >= b),
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a < b or a > b),
        ("neu", lambda a, b: a != b),
        ("leu", lambda a, b: not a > b),
        ("nan", lambda a, b: a != a or b != b),
        ("num", lambda a, b: a == a and b == b),
        ("geu", lambda a, b: not a < b),
        ("equ", lambda a, b: not (a < b or a > b)),
    ],
)
def test_float_compare(cmp: str, ref: Callable) -> None:
    a, b = floats(seed=1), floats(seed=2)
    b[20:40] = a[20:40]
    got = run_ptx(f"setp.{cmp}.f32 %p1, %a0, %a1; selp.b32 %o, 1, 0, %p1;", [fbits(a), fbits(b)], 32)
    assert [bool(g) for g in got] == [bool(ref(x, y)) for x, y in zip(a, b, strict=False)]


@pytest.mark.parametrize(
    ("op", "ref"),
    [
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("rcp.approx", lambda x: 1 / x),
        ("sqrt.rn", np.sqrt),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx", np.tanh),
    ],
)
def test_float_unary(op: str, ref: Callable) -> None:
    x = np.abs(floats(seed=3, special=False)) % 30
    got = run_ptx(f"{op}.f32 %o, %a0;", [fbits(x)], 32).view(np.float32)
    np.testing.assert_allclose(got, ref(x.astype(np.float64)), rtol=2.0**-23)


def test_conversions() -> None:
    x = floats(seed=5)
    t = torch.from_numpy(x)
    fin = np.isfinite(x)
    g = run_ptx("cvt.rn.bf16.f32 %o, %a0;", [fbits(x)], 16)
    np.testing.assert_array_equal(g[fin], t.bfloat16().view(torch.int16).numpy().view(np.uint16)[fin])
    g = run_ptx("cvt.rn.f16.f32 %o, %a0;", [fbits(x)], 16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(g[fin], x.astype(np.float16).view(np.uint16)[fin])
    y = floats(seed=6)
    g = run_ptx("cvt.rn.bf16x2.f32 %o, %a0, %a1;", [fbits(x), fbits(y)], 32)
    ok = fin & np.isfinite(y)

    def bits(v):
        return torch.from_numpy(v).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    np.testing.assert_array_equal(g[ok], (bits(x) << 16 | bits(y))[ok])
    for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        g = run_ptx(f"cvt.{mode}.s32.f32 %o, %a0;", [fbits(x)], 32).view(np.int32)
        want = np.where(np.isnan(x), 0, np.clip(f(x.astype(np.float64)), -(2.0**31), 2.0**31 - 1))
        np.testing.assert_array_equal(g, np.nan_to_num(want).astype(np.int64))
    k = ints(32, seed=2)
    np.testing.assert_array_equal(
        run_ptx("cvt.rn.f32.s32 %o, %a0;", [k], 32).view(np.float32), k.view(np.int32).astype(np.float32)
    )
    np.testing.assert_array_equal(run_ptx("cvt.rn.f32.u32 %o, %a0;", [k], 32).view(np.float32), k.astype(np.float32))
    g = run_ptx("cvt.rna.tf32.f32 %o, %a0;", [fbits(x)], 32).view(np.float32)
    for a, b in zip(x[fin], g[fin], strict=False):
        m, e = np.frexp(np.float64(a))
        assert b == np.ldexp(np.sign(m) * np.floor(abs(m) * 2**11 + 0.5), e - 11) or abs(a) < 1e-37
    h = np.random.default_rng(0).integers(0, 0x7C00, 64).astype(np.uint16)
    np.testing.assert_array_equal(
        run_ptx("cvt.f32.f16 %o, %a0;", [h], 32).view(np.float32), h.view(np.float16).astype(np.float32)
    )


def test_approximation_noise() -> None:
    x = torch.randn(4, 1000)
    o, p = torch.zeros(4, 1000), torch.zeros(4, 1000)
    run_triton(k_softmax, {"x": x, "o": o, "n": 1000, "sx": 1000, "so": 1000}, {"B": 1024}, (4,))
    run_triton(k_softmax, {"x": x, "o": p, "n": 1000, "sx": 1000, "so": 1000}, {"B": 1024}, (4,), approx_noise=1.0)
    assert not torch.equal(o, p)
    torch.testing.assert_close(o, p, rtol=2e-6, atol=0)
