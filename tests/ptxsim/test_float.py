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
    # Products whose sum with c falls on a float32 tie or just beside it.
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


@pytest.mark.parametrize("T", ["bf16", "f16"])
@pytest.mark.parametrize(("cmp", "ref"), [("lt", lambda a, b: a < b), ("neu", lambda a, b: a != b)])
def test_compare_of_pairs(cmp: str, ref: Callable, T: str) -> None:
    """The low halves set the first predicate, the high halves the second."""
    dtype = torch.bfloat16 if T == "bf16" else torch.float16
    low, high = (torch.from_numpy(floats(seed=s)).to(dtype) for s in (1, 2))
    low[20:40] = high[20:40]

    def pair(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
        return torch.stack((first, second), 1).contiguous().view(torch.int32).flatten().numpy().view(np.uint32)

    text = f"setp.{cmp}.{T}x2 %p1|%p2, %a0, %a1; selp.b32 %x1, 1, 0, %p1; selp.b32 %x2, 2, 0, %p2; or.b32 %o, %x1, %x2;"
    got = run_ptx(text, [pair(low, high), pair(high, low)], 32)
    a, b = low.float().numpy(), high.float().numpy()
    want = [int(ref(x, y)) + 2 * int(ref(y, x)) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == want


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


def moderate(n: int = 256, seed: int = 0) -> np.ndarray:
    """float32 of magnitudes so close that sums and products are exact in float64."""
    r = np.random.default_rng(seed)
    return (r.standard_normal(n) * np.exp2(r.integers(-8, 8, n))).astype(np.float32)


def directed(q: Fraction, mode: str) -> np.float32:
    """Exact fraction -> float32: towards zero, minus or plus infinity."""
    r = round_f32(q)
    exact = Fraction(float(r))
    if mode == "rz":
        mode = "rm" if q > 0 else "rp"
    if mode == "rm" and exact > q:
        return np.nextafter(r, np.float32(-np.inf))
    if mode == "rp" and exact < q:
        return np.nextafter(r, np.float32(np.inf))
    return r


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_directed_rounding(op: str, mode: str) -> None:
    values = [moderate(seed=i) for i in range(3 if op == "fma" else 2)]
    names = ", ".join(f"%a{i}" for i in range(len(values)))
    got = run_ptx(f"{op}.{mode}.f32 %o, {names};", [fbits(v) for v in values], 32).view(np.float32)
    exact = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }[op]
    inexact = 0
    for g, *v in zip(got, *values, strict=True):
        q = exact(*[Fraction(float(x)) for x in v])
        assert g == directed(q, mode), v
        inexact += Fraction(float(g)) != q
    assert inexact > 100


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("abs.f32 %o, %a0;", lambda a, b: np.abs(a)),
        ("neg.f32 %o, %a0;", lambda a, b: -a),
        ("copysign.f32 %o, %a0, %a1;", lambda a, b: np.copysign(b, a)),
        ("add.sat.f32 %o, %a0, %a1;", lambda a, b: np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1))),
        ("mul.ftz.f32 %o, %a0, %a1;", lambda a, b: flush(flush(a) * flush(b))),
        ("add.ftz.f32 %o, %a0, %a1;", lambda a, b: flush(flush(a) + flush(b))),
        ("cvt.sat.f32.f32 %o, %a0;", lambda a, b: np.where(np.isnan(a), 0, np.clip(a, 0, 1))),
        ("cvt.rni.f32.f32 %o, %a0;", lambda a, b: np.rint(a)),
    ],
)
def test_float_modifiers(text: str, ref: Callable) -> None:
    a, b = floats(seed=7), floats(seed=8)
    a[20:30], b[20:30] = 2.0**-100, 2.0**-40  # the product underflows
    with np.errstate(all="ignore"):
        want = ref(a, b).astype(np.float32)
    got = run_ptx(text, [fbits(a), fbits(b)], 32).view(np.float32)
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(want)[numbers])


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def test_smaller_zero_is_negative() -> None:
    a = np.resize(np.array([0.0, -0.0, 0.0, -0.0], np.float32), 32)
    b = np.resize(np.array([0.0, 0.0, -0.0, -0.0], np.float32), 32)
    least = run_ptx("min.f32 %o, %a0, %a1;", [fbits(a), fbits(b)], 32).view(np.float32)
    most = run_ptx("max.f32 %o, %a0, %a1;", [fbits(a), fbits(b)], 32).view(np.float32)
    assert np.signbit(least[:4]).tolist() == [False, True, True, True]
    assert np.signbit(most[:4]).tolist() == [False, False, False, True]


@pytest.mark.parametrize("op", ["sin", "cos"])
def test_trigonometry(op: str) -> None:
    x = np.linspace(-3, 3, 64, dtype=np.float32)
    got = run_ptx(f"{op}.approx.f32 %o, %a0;", [fbits(x)], 32).view(np.float32)
    np.testing.assert_allclose(got, getattr(np, op)(x.astype(np.float64)), rtol=2.0**-23)


def halves(T: str, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Random pairs of half-precision numbers [n, 2], and the registers that hold them."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(seed))
    x = x.to(torch.float16 if T == "f16" else torch.bfloat16)
    return x, x.view(torch.int32).view(-1).numpy().view(np.uint32)


@pytest.mark.parametrize("T", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma.rn", "max", "neg", "fma.rn.relu"])
def test_packed_halves(op: str, T: str) -> None:
    (a, ra), (b, rb), (c, rc) = (halves(T, i) for i in range(3))
    A, B, C = a.double(), b.double(), c.double()
    n, want = {
        "add": (2, A + B),
        "sub": (2, A - B),
        "mul": (2, A * B),
        "fma.rn": (3, A * B + C),
        "fma.rn.relu": (3, (A * B + C).relu()),
        "max": (2, torch.maximum(A, B)),
        "neg": (1, -A),
    }[op]
    text = f"{op}.{T}x2 %o, " + ", ".join(f"%a{i}" for i in range(n)) + ";"
    got = torch.from_numpy(run_ptx(text, [ra, rb, rc], 32).view(np.int32)).view(a.dtype).view(-1, 2)
    # float64 holds every sum and product of these exactly, so there is only one rounding.
    assert torch.equal(got, want.to(a.dtype))


def test_float64() -> None:
    r = np.random.default_rng(0)
    a, b = r.standard_normal(64), r.standard_normal(64)
    bits = [a.view(np.uint64), b.view(np.uint64)]
    for text, want in (("add", a + b), ("mul", a * b), ("div.rn", a / b), ("min", np.minimum(a, b))):
        got = run_ptx(f"{text}.f64 %o, %a0, %a1;", bits, 64).view(np.float64)
        np.testing.assert_array_equal(got, want)
    got = run_ptx("cvt.rn.f32.f64 %o, %a0;", bits[:1], 32).view(np.float32)
    np.testing.assert_array_equal(got, a.astype(np.float32))
    got = run_ptx("cvt.f64.f32 %o, %a0;", [fbits(a.astype(np.float32))], 64).view(np.float64)
    np.testing.assert_array_equal(got, a.astype(np.float32))
    got = run_ptx("cvt.rzi.s64.f64 %y1, %a0; cvt.rn.f64.s64 %o, %y1;", [(a * 1e6).view(np.uint64)], 64)
    np.testing.assert_array_equal(got.view(np.float64), np.trunc(a * 1e6))
