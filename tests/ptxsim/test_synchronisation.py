"""Atomics, locks, grid barriers and split-K across programs."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import Deadlock, PtxKernel, SharedRace, compile_triton, run_triton
from tests.ptxsim.samples.linear import MODES, gemm_bound
from tests.ptxsim.samples.split_k import k_lastarriver, k_splitk

pytestmark = pytest.mark.execute


@triton.jit
def k_hist(x, h, fs, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(h + v, 1, mask=i < n)
    tl.atomic_add(fs, tl.sum(tl.where(i < n, v, 0).to(tl.float32), 0))


@triton.jit
def k_gridbarrier(cnt, x, o, B: tl.constexpr):
    p = tl.program_id(0)
    n = tl.num_programs(0)
    i = tl.arange(0, B)
    tl.store(x + p * B + i, (i + p).to(tl.float32))
    tl.debug_barrier()
    tl.atomic_add(cnt, 1, sem="release")
    while tl.atomic_add(cnt, 0, sem="acquire") < n:
        pass
    tl.debug_barrier()
    q = (p + 1) % n
    tl.store(o + p * B + i, tl.load(x + q * B + i, volatile=True))


@triton.jit
def k_lock(lock, v, o, B: tl.constexpr):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    i = tl.arange(0, B)
    old = tl.load(v + i)
    tl.store(v + i, old + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)
    tl.store(o + tl.program_id(0) * B + i, old)


@triton.jit
def k_chain(flag, v, B: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, B)
    while tl.atomic_add(flag + p, 0) == 0:
        pass
    x = tl.load(v + p * B + i)
    tl.store(v + (p + 1) * B + i, x * 2 + 1)
    tl.debug_barrier()
    tl.atomic_xchg(flag + p + 1, 1)


ATOMIC_CASES = [
    # instruction, its operand of lane t, the value after 64 of them on `start`
    ("add.u32", lambda t: t, 5, lambda v: 5 + sum(v)),
    ("min.s32", lambda t: t - 40, 3, lambda v: min(3, *v)),
    ("max.u32", lambda t: t * 7, 100, lambda v: max(100, *v)),
    ("and.b32", lambda t: ~(t & 15), -1, lambda v: -16),
    ("or.b32", lambda t: t << 4, 1, lambda v: 63 << 4 | 1),
    ("xor.b32", lambda t: 1 << (t % 32), 6, lambda v: 6),  # each bit twice
    ("inc.u32", lambda t: 9, 2, lambda v: (2 + 64) % 10),
    ("dec.u32", lambda t: 9, 2, lambda v: (2 - 64) % 10),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("form", ["atom", "red"])
@pytest.mark.parametrize("case", ATOMIC_CASES, ids=lambda c: c[0])
def test_atomic_instructions(case: tuple, form: str, space: str, mode: str) -> None:
    """64 lanes update one word. After a barrier the word holds the result of all updates."""
    op, operand, start, after = case
    result = "%x3, " if form == "atom" else ""
    text = f""".version 8.0
.target sm_80
.address_size 64
.shared .align 4 .b8 word[4];
.visible .entry k(.param .u64 pv, .param .u64 px, .param .u32 start)
{{
.reg .pred %p; .reg .b32 %t, %x<6>; .reg .b64 %q<5>;
mov.u32 %t, %tid.x; setp.eq.u32 %p, %t, 0;
ld.param.u32 %x0, [start]; ld.param.u64 %q0, [px]; ld.param.u64 %q1, [pv];
mul.wide.u32 %q2, %t, 4; add.s64 %q1, %q1, %q2; ld.global.b32 %x1, [%q1];
mov.b32 %x2, word;
@%p st.shared.b32 [%x2], %x0;
@%p st.global.b32 [%q0], %x0;
bar.sync 0;
{form}.{space}.{op} {result}[{"%q0" if space == "global" else "%x2"}], %x1;
bar.sync 0;
ld.{space}.b32 %x4, [{"%q0" if space == "global" else "%x2"}];
@%p st.global.b32 [%q0], %x4;
ret;
}}"""
    values = [operand(t) for t in range(64)]
    v = torch.tensor([(x + 2**31) % 2**32 - 2**31 for x in values], dtype=torch.int32)
    x = torch.zeros(1, dtype=torch.int32)
    stats = PtxKernel(text, 0, 2).launch(1, [v, x, start], mode=mode)
    assert x.item() % 2**32 == after(values) % 2**32
    assert stats.atomics == 64


@pytest.mark.parametrize("mode", MODES)
def test_atomics(mode: str) -> None:
    x = torch.randint(0, 10, (1000,), dtype=torch.int32)
    h, fs = torch.zeros(10, dtype=torch.int32), torch.zeros(1)
    st = run_triton(k_hist, {"x": x, "h": h, "fs": fs, "n": 1000}, {"B": 256}, (4,), mode=mode)
    assert torch.equal(h.long(), torch.bincount(x.long(), minlength=10))
    assert fs.item() == x.sum().item()
    assert st.atomics >= 1004


@pytest.mark.parametrize(
    "kw", [{}, {"mode": "warpwise", "interleave": True}, {"mode": "warpwise", "interleave": True, "preempt": 0.2}]
)
def test_spin_loops(kw: dict) -> None:
    n = 6
    cnt, x, o = torch.zeros(1, dtype=torch.int32), torch.full((n, 128), -1.0), torch.full((n, 128), -1.0)
    run_triton(k_gridbarrier, {"cnt": cnt, "x": x, "o": o}, {"B": 128}, (n,), **kw)
    assert torch.equal(o, torch.roll(x, -1, 0))
    assert cnt.item() == n
    lock, v, o = torch.zeros(1, dtype=torch.int32), torch.zeros(128), torch.zeros(n, 128)
    run_triton(k_lock, {"lock": lock, "v": v, "o": o}, {"B": 128}, (n,), **kw)
    assert (v == n).all()
    assert torch.equal(o.sort(0).values, torch.arange(n).float()[:, None].expand(n, 128))
    flag, v = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(n + 1, 128)
    flag[0] = 1
    run_triton(k_chain, {"flag": flag, "v": v}, {"B": 128}, (n,), **kw)
    assert torch.equal(v[:, 0], torch.tensor([2.0**i - 1 for i in range(n + 1)]))


def test_grid_barrier_without_residency_is_a_deadlock() -> None:
    cnt, x, o = torch.zeros(1, dtype=torch.int32), torch.zeros(3, 128), torch.zeros(3, 128)
    with pytest.raises(Deadlock):
        run_triton(k_gridbarrier, {"cnt": cnt, "x": x, "o": o}, {"B": 128}, (3,), mode="warpwise", max_steps=20000)


@pytest.mark.parametrize("arch", [75, 80, 120])
def test_split_k(arch: int) -> None:
    M, N, K, S = 40, 60, 300, 3
    X, W = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    ref, bound = X.double() @ W.double().t(), gemm_bound(X, W.t(), K, "ieee") * 4
    con = {"BM": 16, "BN": 32, "BK": 64}
    grid = (3, 2, S)
    for kw in ({}, {"mode": "warpwise"}, {"mode": "warpwise", "interleave": True, "preempt": 0.05, "seed": 5}):
        o = torch.zeros(M, N)
        st = run_triton(
            k_splitk,
            {"x": X, "w": W, "o": o, "M": M, "N": N, "K": K, "KS": 128},
            dict(con, ATOMIC=True),
            grid,
            arch=arch,
            **kw,
        )
        assert ((o.double() - ref).abs() <= bound).all()
        assert st.atomics > 0
        part, sem, o = (
            torch.full((S, M, N), float("nan")),
            torch.zeros(6, dtype=torch.int32),
            torch.full((M, N), float("nan")),
        )
        run_triton(
            k_lastarriver,
            {"x": X, "w": W, "o": o, "part": part, "sem": sem, "M": M, "N": N, "K": K, "KS": 128, "S": S},
            con,
            grid,
            arch=arch,
            **kw,
        )
        assert ((o.double() - ref).abs() <= bound).all()
        assert (sem == S).all()


def test_lost_update_between_ctas() -> None:
    M, N, K = 16, 32, 128
    X, W = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    ref = X.double() @ W.double().t()
    con = {"BM": 16, "BN": 32, "BK": 32, "ATOMIC": False}

    def go(**kw):
        return run_triton(k_splitk, {"x": X, "w": W, "o": o, "M": M, "N": N, "K": K, "KS": 32}, con, (1, 1, 4), **kw)

    o = torch.zeros(M, N)
    go(mode="warpwise")  # with one CTA after the other, the fault does not show
    assert (o.double() - ref).abs().max() < 1e-3
    o = torch.zeros(M, N)
    go()  # with all CTAs together, the fault shows
    assert (o.double() - ref).abs().max() > 0.1
    bad = 0
    for seed in range(4):
        o = torch.zeros(M, N)
        go(mode="warpwise", interleave=True, preempt=0.3, seed=seed)
        bad += (o.double() - ref).abs().max().item() > 0.1
    assert bad
    with pytest.raises(SharedRace, match="two CTAs"):
        go(global_races=True)


def test_missing_barrier_before_the_semaphore() -> None:
    """Without the barrier between the partial stores and the atomic of split-K, another CTA may read too early."""
    M, N, K, S = 16, 64, 192, 3
    X, W = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()

    def args():
        return {
            "x": X,
            "w": W,
            "o": torch.full((M, N), float("nan")),
            "part": torch.full((S, M, N), float("nan")),
            "sem": torch.zeros(1, dtype=torch.int32),
            "M": M,
            "N": N,
            "K": K,
            "KS": 64,
            "S": S,
        }

    c, names = compile_triton(k_lastarriver, args(), {"BM": 16, "BN": 64, "BK": 64})
    lines = c.asm["ptx"].split("\n")
    atom = next(i for i, ln in enumerate(lines) if "atom.global" in ln)
    store = max(i for i in range(atom) if "st.global" in lines[i])
    broken = [ln for i, ln in enumerate(lines) if not (store < i < atom and "bar.sync" in ln)]
    assert len(broken) < len(lines)
    outcome = []
    for text in (lines, broken):
        k = PtxKernel("\n".join(text), c.metadata.shared, c.metadata.num_warps)
        bad = 0
        for seed in range(40):
            a = {n: v for n, v in args().items() if n in names}
            k.launch((1, 1, S), a, mode="warpwise", interleave=True, preempt=0.02, seed=seed)
            bad += not torch.isfinite(a["o"]).all()
        outcome.append(bad)
    assert outcome[0] == 0
    assert outcome[1] > 0
