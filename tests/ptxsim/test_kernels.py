"""Whole Triton kernels against float64: elementwise, reductions, scans, special functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import OutOfBounds, run_triton, triton_kernel
from tests.ptxsim.samples.elementwise import k_add, k_softmax
from tests.ptxsim.samples.linear import MODES, ROUNDING, bf16, f16, f32

pytestmark = pytest.mark.execute


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", [75, 80, 90, 100, 120])
@pytest.mark.parametrize("n", [1000, 1024])
def test_add(arch: int, mode: str, n: int) -> None:
    x, y = torch.randn(n), torch.randn(n)
    o = torch.full((n,), float("nan"))
    st = run_triton(k_add, {"x": x, "y": y, "o": o, "n": n}, {"B": 256}, (triton.cdiv(n, 256),), arch=arch, mode=mode)
    assert torch.equal(o, x + y)
    assert st.global_load["bytes"] == 8 * n
    assert st.global_store["bytes"] == 4 * n
    if n == 1024:
        assert st.load_efficiency == st.store_efficiency == 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dt", "arch"), [(f32, 80), (bf16, 80), (f16, 80), (f32, 75), (f32, 90), (bf16, 100), (f16, 120)]
)
def test_softmax(dt: torch.dtype, arch: int, mode: str) -> None:
    x = torch.randn(9, 1100).to(dt)[:, :1000]
    o = torch.zeros(9, 1000, dtype=dt)
    run_triton(k_softmax, {"x": x, "o": o, "n": 1000, "sx": 1100, "so": 1000}, {"B": 1024}, (9,), arch=arch, mode=mode)
    ref = x.double().softmax(1)
    tiny = 2.0**-25 if dt == f16 else 0  # float16 subnormals
    assert ((o.double() - ref).abs() <= ref * (ROUNDING[dt] * 1.01 + 2.0**-20) + tiny).all()


@triton.jit
def k_scale(x, o, n, sc, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, (tl.load(x + i, mask=i < n, other=0).to(tl.float32) * sc).to(o.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize("arch", [75, 80, 120])
@pytest.mark.parametrize("src", [torch.uint8, torch.int8])
@pytest.mark.parametrize("dst", [f32, bf16, f16])
def test_byte_scaling(arch: int, src: torch.dtype, dst: torch.dtype) -> None:
    x = torch.randint(0, 256, (1000,)).to(src)
    o = torch.zeros(1000, dtype=dst)
    run_triton(k_scale, {"x": x, "o": o, "n": 1000, "sc": 1 / 255}, {"B": 512}, (2,), arch=arch)
    assert torch.equal(o, (x.float() * torch.tensor(1 / 255)).to(dst))


@triton.jit
def k_reduce(x, s0, m0, s1, m1, a1, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    v = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(s0 + j, tl.sum(v, 0))
    tl.store(m0 + j, tl.max(v, 0))
    tl.store(s1 + i, tl.sum(v, 1))
    tl.store(m1 + i, tl.max(v, 1))
    tl.store(a1 + i, tl.argmax(v, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_reductions(mode: str, warps: int) -> None:
    M, N = 32, 64
    x = torch.randn(M, N)
    s0, m0, s1, m1, a1 = (
        torch.zeros(N),
        torch.zeros(N),
        torch.zeros(M),
        torch.zeros(M),
        torch.zeros(M, dtype=torch.int32),
    )
    run_triton(
        k_reduce,
        {"x": x, "s0": s0, "m0": m0, "s1": s1, "m1": m1, "a1": a1},
        {"M": M, "N": N},
        (1,),
        num_warps=warps,
        mode=mode,
    )
    for total, axis in ((s0, 0), (s1, 1)):
        # A sum of n numbers in any order is off by (n - 1) u sum |x| at most, u = 2^-24.
        most = (x.shape[axis] - 1) * 2**-24 * x.double().abs().sum(axis)
        assert bool(((total.double() - x.double().sum(axis)).abs() <= most).all())
    assert torch.equal(m0, x.amax(0))
    assert torch.equal(m1, x.amax(1))
    assert torch.equal(a1.long(), x.argmax(1))


@triton.jit
def k_scan(x, c, srt, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(c + i, tl.cumsum(v, 0))
    tl.store(srt + i, tl.sort(v))


@pytest.mark.parametrize("mode", MODES)
def test_scan_and_sort(mode: str) -> None:
    x = torch.randn(256)
    c, srt = torch.zeros(256), torch.zeros(256)
    run_triton(k_scan, {"x": x, "c": c, "srt": srt}, {"B": 256}, (1,), mode=mode)
    torch.testing.assert_close(c.double(), x.double().cumsum(0), rtol=0, atol=1e-5)
    assert torch.equal(srt, x.sort().values)


@triton.jit
def k_math(x, y, o, n, seed, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    a = tl.load(x + i, mask=m, other=0.0, cache_modifier=".cg")
    b = tl.load(y + i, mask=m, other=1.0, eviction_policy="evict_last")
    tl.store(
        o + i,
        tl.sqrt(tl.abs(a)) + tl.log(tl.abs(b) + 1) + tl.rsqrt(tl.abs(b) + 1),
        mask=m,
        eviction_policy="evict_first",
    )
    tl.store(o + n + i, tl.sin(a) * tl.cos(b), mask=m)
    tl.store(o + 2 * n + i, tl.erf(a), mask=m)
    tl.store(o + 3 * n + i, tl.floor(a) + tl.ceil(b) + tl.where(a > b, a, b), mask=m)
    tl.store(o + 4 * n + i, tl.math.fma(a, b, a) + tl.sqrt_rn(tl.abs(b)) + tl.div_rn(a, b) + tl.exp2(b), mask=m)
    tl.store(o + 5 * n + i, tl.rand(seed, i), mask=m)


def philox(seed: int, c: int) -> int:
    """The first output word of Philox4x32-10 with key (seed, 0) and counter (c, 0, 0, 0)."""
    k0, k1, c0, c1, c2, c3 = seed, 0, c, 0, 0, 0
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


@pytest.mark.parametrize("arch", [75, 80, 120])
def test_math(arch: int) -> None:
    n = 300
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(n, generator=g) * 3, torch.randn(n, generator=g) + 2
    a[:3] = torch.tensor([12345.678, 3e7, -1e10])  # large arguments: the slow path of sin through local memory
    o = torch.zeros(6, n)
    run_triton(k_math, {"x": a, "y": b, "o": o, "n": n, "seed": 3}, {"B": 256}, (2,), arch=arch)
    A, B = a.double(), b.double()
    ref = [
        A.abs().sqrt() + (B.abs() + 1).log() + (B.abs() + 1).rsqrt(),
        A.sin() * B.cos(),
        torch.erf(A),
        A.floor() + B.ceil() + torch.maximum(A, B),
        A * B + A + B.abs().sqrt() + A / B + torch.exp2(B),
    ]
    for i, r in enumerate(ref):
        assert (
            (o[i].double() - r).abs() <= 2e-6 * (1 + r.abs() + (B.abs().reciprocal() * A.abs() if i == 4 else 0))
        ).all(), i
    for i in range(n):
        u = philox(3, i)
        u = u - (1 << 32) if u >> 31 else u
        u = -u - 1 if u < 0 else u
        assert o[5, i] == np.float32(np.float32(u) * np.float32(4.6566127342e-10)), i


def test_numpy_arguments_and_specialisation() -> None:
    n = 160
    x, y, o = np.arange(n + 1, dtype=np.float32)[1:], np.ones(n, np.float32), np.zeros(n, np.float32)
    _k, names = triton_kernel(k_add, {"x": x, "y": y, "o": o, "n": n}, {"B": 256})
    assert names == ["x", "y", "o", "n"]
    run_triton(k_add, {"x": x, "y": y, "o": o, "n": n}, {"B": 256}, (1,))
    np.testing.assert_array_equal(o, x + 1)
    one = np.zeros(1, np.float32)
    _, names = triton_kernel(k_add, {"x": one, "y": one, "o": one, "n": 1}, {"B": 256})
    assert names == ["x", "y", "o"]  # n == 1 became a constant, as in Triton's JIT


@pytest.mark.parametrize("offset", [0, 4, 8])
def test_storage_that_is_not_aligned(offset: int) -> None:
    """Triton specialises on addresses modulo 16, so the simulated address must agree with the host's."""
    raw = np.zeros(4096 + 16, np.uint8)
    shift = (offset - raw.__array_interface__["data"][0]) % 16
    o = torch.frombuffer(raw, dtype=torch.float32, count=1024, offset=shift)
    assert o.data_ptr() % 16 == offset
    x = torch.randn(1024)
    stats = run_triton(k_add, {"x": x, "y": x, "o": o, "n": 1024}, {"B": 256}, (4,))
    assert torch.equal(o, 2 * x)
    assert stats.global_store["requests"] == (32 if offset else 16)  # pairs only where they are aligned


@triton.jit
def k_copy_rows(x, o, rows, n, sx, so, B: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, B)
    m = (r < rows) & (c < n)
    tl.store(o + r * so + c, tl.load(x + r * sx + c, mask=m), mask=m)


@pytest.mark.parametrize("view", [np.s_[:], np.s_[::2], np.s_[5:], np.s_[:, 3:9], np.s_[:0]], ids=str)
def test_numpy_views(view: slice) -> None:
    x = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)[view]
    rows, n = x.shape
    o = np.full((40, 16), np.nan, np.float32)
    args = {"x": x, "o": o, "rows": rows, "n": n, "sx": x.strides[0] // 4, "so": 16}
    run_triton(k_copy_rows, args, {"B": 16}, (max(1, rows),))
    np.testing.assert_array_equal(o[:rows, :n], x)
    assert np.isnan(o[rows:]).all()
    if rows:
        with pytest.raises(OutOfBounds):
            run_triton(k_copy_rows, dict(args, rows=rows + 1), {"B": 16}, (rows + 1,))
