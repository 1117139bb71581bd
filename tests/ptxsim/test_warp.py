"""Exchange between the lanes of a warp; lanes and programs that diverge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import PtxKernel, run_triton
from tests.ptxsim.samples.instructions import ints, run_ptx
from tests.ptxsim.samples.linear import MODES

pytestmark = pytest.mark.execute


def test_warp_operations() -> None:
    x = ints(32, 64, seed=4)
    w = x.reshape(2, 32)
    lane = np.arange(32)
    for d in (1, 2, 16):
        g = run_ptx(f"shfl.sync.bfly.b32 %o, %a0, {d}, 31, -1;", [x], 32).reshape(2, 32)
        np.testing.assert_array_equal(g, w[:, lane ^ d])
    g = run_ptx("shfl.sync.up.b32 %o, %a0, 3, 0, -1;", [x], 32).reshape(2, 32)
    np.testing.assert_array_equal(g, w[:, np.where(lane >= 3, lane - 3, lane)])
    g = run_ptx("shfl.sync.down.b32 %o|%p1, %a0, 3, 31, -1; selp.b32 %o, %o, 99, %p1;", [x], 32).reshape(2, 32)
    np.testing.assert_array_equal(g, np.where(lane + 3 <= 31, w[:, np.minimum(lane + 3, 31)], 99))
    g = run_ptx("shfl.sync.down.b32 %o, %a0, 3, 0x181f, -1;", [x], 32).reshape(2, 32)  # width 8
    np.testing.assert_array_equal(g, w[:, np.where(lane % 8 + 3 < 8, lane + 3, lane)])
    g = run_ptx("and.b32 %x1, %a0, 31; shfl.sync.idx.b32 %o, %a0, %x1, 31, -1;", [x], 32).reshape(2, 32)
    np.testing.assert_array_equal(g, np.take_along_axis(w, (w & 31).astype(int), 1))
    g = run_ptx("setp.lt.s32 %p1, %a0, 0; vote.sync.ballot.b32 %o, %p1, -1;", [x], 32).reshape(2, 32)
    want = [sum(int(v >> 31) << i for i, v in enumerate(r)) for r in w.astype(np.uint64)]
    np.testing.assert_array_equal(g, np.array(want)[:, None].repeat(32, 1))
    g = run_ptx("redux.sync.add.s32 %o, %a0, -1;", [x], 32).reshape(2, 32)
    np.testing.assert_array_equal(g, w.sum(1, dtype=np.uint32)[:, None].repeat(32, 1))


def test_votes() -> None:
    x = ints(32, 64, seed=5)
    x[32:48] |= 1  # the lower half of the second warp has odd values only
    odd = (x & 1).astype(bool).reshape(2, 32)
    for mask in (0xFFFFFFFF, 0x0000FFFF, 0x00F0FF00):
        members = np.array([mask >> i & 1 for i in range(32)], bool)
        for mode, want in (
            ("any", (odd & members).any(1)),
            ("all", (odd | ~members).all(1)),
            ("uni", (odd | ~members).all(1) | (~odd | ~members).all(1)),
        ):
            body = f"and.b32 %x1, %a0, 1; setp.ne.u32 %p1, %x1, 0; vote.sync.{mode}.pred %p2, %p1, {mask};"
            g = run_ptx(body + "selp.b32 %o, 1, 0, %p2;", [x], 32).reshape(2, 32)
            np.testing.assert_array_equal(g, want[:, None].repeat(32, 1))


@pytest.mark.parametrize(
    ("op", "ref"),
    [
        ("min.s32", lambda w: w.view(np.int32).min(1).view(np.uint32)),
        ("max.u32", lambda w: w.max(1)),
        ("and.b32", lambda w: np.bitwise_and.reduce(w, axis=1)),
        ("or.b32", lambda w: np.bitwise_or.reduce(w, axis=1)),
        ("xor.b32", lambda w: np.bitwise_xor.reduce(w, axis=1)),
    ],
)
def test_reductions_of_a_warp(op: str, ref: Callable) -> None:
    x = ints(32, 64, seed=6)
    g = run_ptx(f"redux.sync.{op} %o, %a0, -1;", [x], 32).reshape(2, 32)
    np.testing.assert_array_equal(g, ref(x.reshape(2, 32))[:, None].repeat(32, 1))


def test_elected_lane() -> None:
    g = run_ptx("elect.sync %x1|%p1, 0xff00; selp.b32 %o, %x1, 99, %p1;", [ints(32, 64)], 32).reshape(2, 32)
    assert (g[:, 8] == 8).all()
    assert (np.delete(g, 8, 1) == 99).all()


def test_active_lanes_of_a_divergent_warp() -> None:
    body = """setp.lt.u32 %p1, %t, 10;
@%p1 bra FEW;
activemask.b32 %o;
bra DONE;
FEW: activemask.b32 %o;
DONE: mov.u32 %x1, 0;"""
    g = run_ptx(body, [ints(32, 64)], 32)
    assert (g[:10] == 0x3FF).all()
    assert (g[10:32] == 0xFFFFFC00).all()
    assert (g[32:] == 0xFFFFFFFF).all()


def test_branch_by_table() -> None:
    x = ints(32, 64, seed=8)
    body = """and.b32 %x1, %a0, 3;
TABLE: .branchtargets ZERO, ONE, TWO, ONE;
brx.idx %x1, TABLE;
ZERO: mov.u32 %o, 100; bra DONE;
ONE: mov.u32 %o, 101; bra DONE;
TWO: mov.u32 %o, 102;
DONE: add.u32 %o, %o, %x1;"""
    want = np.array([100, 101, 102, 101])[x & 3] + (x & 3)
    np.testing.assert_array_equal(run_ptx(body, [x], 32), want)


def test_exit_of_some_lanes() -> None:
    """Lanes that have left do not hold up the barriers of the others."""
    body = """mov.u32 %o, 0;
setp.ge.u32 %p1, %t, 40;
@%p1 exit;
bar.sync 0;
add.u32 %o, %t, 1;"""
    g = run_ptx(body, [ints(32, 64)], 32)
    np.testing.assert_array_equal(g[:40], np.arange(40) + 1)
    assert (g[40:] == 0).all()  # their store was never reached


@pytest.mark.parametrize("mode", MODES)
def test_barrier_for_some_warps(mode: str) -> None:
    """Two of four warps pass data through shared memory behind a barrier of 64 threads."""
    text = """.version 8.0
.target sm_80
.address_size 64
.shared .align 4 .b8 buffer[256];
.visible .entry k(.param .u64 po)
{
.reg .pred %p<2>; .reg .b32 %t, %x<5>; .reg .b64 %q<3>;
mov.u32 %t, %tid.x; mov.u32 %x0, 7;
setp.ge.u32 %p0, %t, 64;
@%p0 bra OUT;
shl.b32 %x1, %t, 2; mov.b32 %x2, buffer; add.u32 %x1, %x1, %x2;
st.shared.b32 [%x1], %t;
barrier.sync 1, 64;
xor.b32 %x3, %x1, 128;
ld.shared.b32 %x0, [%x3];
OUT: bar.sync 0;
ld.param.u64 %q0, [po]; mul.wide.u32 %q1, %t, 4; add.s64 %q0, %q0, %q1; st.global.b32 [%q0], %x0;
ret;
}"""
    out = np.zeros(128, np.uint32)
    PtxKernel(text, 0, 4).launch(1, [out], mode=mode)
    np.testing.assert_array_equal(out[:64], np.arange(64) ^ 32)
    assert (out[64:] == 7).all()


@triton.jit
def k_early(x, o, n, B: tl.constexpr):
    p = tl.program_id(0)
    if p % 2 == 0:
        return
    i = tl.arange(0, B)
    s = 0.0
    for k in range(p):
        s += tl.sum(tl.load(x + k * B + i), 0)
    tl.store(o + p, s)


@pytest.mark.parametrize("mode", MODES)
def test_divergent_ctas(mode: str) -> None:
    x, o = torch.randn(8, 128), torch.full((8,), -1.0)
    run_triton(k_early, {"x": x, "o": o, "n": 8}, {"B": 128}, (8,), mode=mode)
    for p in range(8):
        want = -1 if p % 2 == 0 else x[:p].double().sum().item()
        assert abs(o[p].item() - want) < 1e-4
