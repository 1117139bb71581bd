"""Exchange between the lanes of a warp; lanes and programs that diverge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import run_triton
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
