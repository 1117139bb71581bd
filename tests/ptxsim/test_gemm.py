"""Matrix products: tensor cores, asynchronous copies, all architectures, both schedulers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import run_triton
from tests.ptxsim.samples.linear import LINEAR_CASES, MODES, bf16, case_id, f16, f32, gemm_bound, run_linear

pytestmark = pytest.mark.execute


@triton.jit
def k_atb(a, b, c, M, N, K, sak, sbk, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        kk = k + tl.arange(0, BK)
        av = tl.load(a + kk[:, None] * sak + rm[None, :], mask=(kk[:, None] < K) & (rm[None, :] < M), other=0.0)
        bv = tl.load(b + kk[:, None] * sbk + rn[None, :], mask=(kk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(tl.trans(av), bv, acc, input_precision=PREC)
    tl.store(c + rm[:, None] * scm + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def k_idot(a, b, c, K: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    k = tl.arange(0, K)
    tl.store(
        c + i[:, None] * B + i[None, :],
        tl.dot(tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * B + i[None, :])),
    )


@pytest.mark.parametrize(("arch", "dt", "prec"), LINEAR_CASES, ids=case_id)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_linear_sigmoid(arch: int, dt: torch.dtype, prec: str, stages: int) -> None:
    run_linear(64, 64, 160, dt, prec, arch, stages)  # everything divisible by 16
    run_linear(45, 51, 117, dt, prec, arch, stages, pad=3)  # ragged, odd strides
    if stages in (1, 3):
        run_linear(48, 64, 144, dt, prec, arch, stages, act="none", xt=True, tile=(64, 32, 64 if dt != f32 else 32))


@pytest.mark.parametrize(("arch", "dt", "prec"), LINEAR_CASES[:5], ids=case_id)
@pytest.mark.parametrize("stages", [1, 3])
def test_linear_warpwise_equals_lockstep(arch: int, dt: torch.dtype, prec: str, stages: int) -> None:
    """In random warp order, with races and asynchronous copies checked, the bits equal those of lockstep."""
    for M, N, K, pad in ((32, 64, 160, 0), (45, 51, 117, 3)):
        _, a = run_linear(M, N, K, dt, prec, arch, stages, pad=pad)
        sa, b = run_linear(M, N, K, dt, prec, arch, stages, pad=pad, mode="warpwise", seed=1)
        sb, c = run_linear(
            M, N, K, dt, prec, arch, stages, pad=pad, mode="warpwise", seed=2, interleave=True, preempt=0.1
        )
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert sa.by_opcode == sb.by_opcode
        _, d = run_linear(M, N, K, dt, prec, arch, stages, pad=pad, races=True, max_lanes=256)
        assert torch.equal(a, d)


@pytest.mark.parametrize("arch", [86, 89, 90, 100])
def test_other_architectures(arch: int) -> None:
    run_linear(32, 32, 160, bf16, "ieee", arch, tile=(16, 32, 32))  # small tiles use mma.sync everywhere
    run_linear(45, 51, 117, f32, "ieee", arch, pad=3)
    if arch >= 90:
        with pytest.raises(NotImplementedError, match=r"wgmma|tcgen05"):
            run_linear(64, 64, 160, bf16, "ieee", arch, tile=(64, 64, 32))


def test_instructions_used() -> None:
    for dt, prec, want in (
        (bf16, "ieee", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        (f16, "ieee", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        (f32, "tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ):
        st, _ = run_linear(64, 64, 160, dt, prec, 80)
        assert st.by_opcode[want] > 0
        assert st.by_class["cp.async"] > 0
        assert st.by_class["ldmatrix"] > 0
        assert st.mma_flops == 2 * 64 * 64 * 160
    st, _ = run_linear(64, 64, 160, f32, "ieee", 80)
    assert st.fma_flops >= 2 * 64 * 64 * 160
    assert st.mma_flops == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("arch", "dt", "prec"), LINEAR_CASES[:5], ids=case_id)
def test_transposed_gemm(arch: int, dt: torch.dtype, prec: str, mode: str) -> None:
    for M, N, K in ((64, 64, 96), (50, 70, 77)):
        A, B = torch.randn(K, M).to(dt), torch.randn(K, N).to(dt)
        C = torch.full((M, N), float("nan"))
        run_triton(
            k_atb,
            {"a": A, "b": B, "c": C, "M": M, "N": N, "K": K, "sak": M, "sbk": N, "scm": N},
            {"BM": 32, "BN": 32, "BK": 32, "PREC": prec},
            (-(-M // 32), -(-N // 32)),
            arch=arch,
            mode=mode,
        )
        assert ((C.double() - A.double().t() @ B.double()).abs() <= gemm_bound(A.t(), B, K, prec)).all()


@pytest.mark.parametrize("arch", [80, 120])
def test_int8_dot(arch: int) -> None:
    a, b = torch.randint(-128, 128, (32, 64), dtype=torch.int8), torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    c = torch.zeros(32, 32, dtype=torch.int32)
    st = run_triton(k_idot, {"a": a, "b": b, "c": c}, {"K": 64, "B": 32}, (1,), arch=arch)
    assert torch.equal(c.long(), a.long() @ b.long())
    assert any("s8.s8" in k for k in st.by_opcode)


@triton.jit
def k_dot(a, b, c, ACC: tl.constexpr, K: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    k = tl.arange(0, K)
    av, bv = tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * B + i[None, :])
    tl.store(c + i[:, None] * B + i[None, :], tl.dot(av, bv, out_dtype=ACC))


def test_float16_accumulators() -> None:
    """Each mma rounds to float16, so sums of 64 products are rounded in steps of 16."""
    a, b, c = torch.randn(32, 64).half(), torch.randn(64, 32).half(), torch.zeros(32, 32, dtype=f16)
    st = run_triton(k_dot, {"a": a, "b": b, "c": c}, {"ACC": tl.float16, "K": 64, "B": 32}, (1,))
    assert st.by_opcode["mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"] > 0
    want, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((c.double() - want).abs() <= magnitude * 4 * 2.0**-11).all()
    assert not torch.equal(c, want.half())


def test_float64_dot() -> None:
    a, b, c = torch.randn(32, 64).double(), torch.randn(64, 32).double(), torch.zeros(32, 32).double()
    st = run_triton(k_dot, {"a": a, "b": b, "c": c}, {"ACC": tl.float64, "K": 64, "B": 32}, (1,))
    assert st.mma_flops + st.fma_flops >= 2 * 32 * 32 * 64
    torch.testing.assert_close(c, a @ b, rtol=0, atol=64 * 2.0**-50)


@pytest.mark.parametrize("tile", [(16, 32, 64), (64, 64, 32)], ids=str)
def test_layer_of_full_size(tile: tuple[int, int, int]) -> None:
    """The widest layer of the reference network at batch 64."""
    BM, BN, BK = tile
    st, _ = run_linear(64, 512, 784, bf16, "ieee", 80, tile=tile)
    assert st.ctas == (64 // BM) * (512 // BN)
    # K is no multiple of 32 or 64, so the products run over the masked rest too.
    assert st.mma_flops == 2 * 64 * 512 * (-(-784 // BK) * BK)
