"""Planted faults, each of which must be found."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import (
    Deadlock,
    Misaligned,
    OutOfBounds,
    PtxKernel,
    SimError,
    Trap,
    UninitShared,
    compile_triton,
    run_triton,
)
from tests.ptxsim.samples.elementwise import k_add
from tests.ptxsim.samples.instructions import ints, run_ptx
from tests.ptxsim.samples.linear import MODES, bf16, f16, f32, k_linear, linear_args, linear_inputs

pytestmark = pytest.mark.execute


@triton.jit
def k_add_oob(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m, other=1.0), mask=i < n + 1)


@triton.jit
def k_assert(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.device_assert(v < n, "too large")
    tl.device_print("v", v)
    tl.store(o + i, v)


def test_unknown_opcode_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence\.sync\.aligned"):
        run_ptx("wgmma.fence.sync.aligned;", [ints(32)], 32)


def test_out_of_bounds_store() -> None:
    x, y, o = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    for mode in MODES:
        with pytest.raises(OutOfBounds) as e:
            run_triton(k_add_oob, {"x": x, "y": y, "o": o, "n": 1000}, {"B": 256}, (4,), mode=mode)
        assert "past the end of 'o'" in str(e.value)
        assert "st.global" in str(e.value)
        assert "ctaid (3,0,0)" in str(e.value)
        assert "test_faults.py" in str(e.value)


def test_access_between_strided_rows() -> None:
    args = {"x": torch.randn(1000)[::2], "y": torch.randn(500), "o": torch.zeros(500), "n": 500}
    with pytest.raises(OutOfBounds, match="strides skip"):
        run_triton(k_add, args, {"B": 512}, (1,))
    run_triton(k_add, args, {"B": 512}, (1,), strict_views=False)


def test_misaligned_vector_access() -> None:
    x = torch.randn(1024)
    c, _names = compile_triton(k_add, {"x": x, "y": x, "o": x, "n": 1024}, {"B": 512})
    k = PtxKernel(c.asm["ptx"], c.metadata.shared, 4)
    base = torch.randn(1025)
    with pytest.raises(Misaligned):
        k.launch(2, {"x": base[1:], "y": x, "o": torch.zeros(1024), "n": 1024})


def _mutants(
    pattern: str,
    replace: Callable[[str], str],
    arch: int = 80,
    dt: torch.dtype = bf16,
    prec: str = "ieee",
    stages: int = 3,
) -> list[tuple[int, str]]:
    """(line, outcome) for every line of a linear kernel's PTX that matches, when it alone is replaced."""
    x, w, b = linear_inputs(32, 32, 160, dt)
    o = torch.zeros(32, 32, dtype=dt)
    args = linear_args(x, w, b, o)
    constexprs = {"ACT": "sigmoid", "BM": 32, "BN": 32, "BK": 32, "PREC": prec}
    c, names = compile_triton(k_linear, args, constexprs, arch, num_stages=stages)
    ref = torch.sigmoid(x.double() @ w.double().t() + b.double())
    lines = c.asm["ptx"].split("\n")
    out = []
    for i, ln in enumerate(lines):
        if not re.search(pattern, ln):
            continue
        k = PtxKernel("\n".join([*lines[:i], replace(ln), *lines[i + 1 :]]), c.metadata.shared, c.metadata.num_warps)
        o.fill_(float("nan"))
        try:
            k.launch(1, {n: args[n] for n in names}, mode="warpwise", seed=i)
            ok = (o.double() - ref).abs().max().item() < 5e-3
            out.append((i, "unnoticed" if ok else "wrong result"))
        except SimError as e:
            out.append((i, type(e).__name__))
    return out


@pytest.mark.parametrize(
    "kw",
    [{}, {"dt": f16, "stages": 4}, {"dt": f32, "prec": "tf32"}, {"dt": f32, "arch": 75}, {"stages": 1}],
    ids=["bf16", "f16", "tf32", "sm75", "1stage"],
)
def test_missing_barrier_is_caught(kw: dict) -> None:
    r = _mutants(r"\bbar\.sync", lambda s: "", **kw)
    caught = [x for x in r if x[1] != "unnoticed"]
    # The first barrier only guards shared memory that is not used yet, and other barriers can imply one or two more.
    assert len(caught) >= max(2, len(r) / 2), r


@pytest.mark.parametrize(
    "kw", [{}, {"dt": f16, "stages": 4}, {"dt": f32, "prec": "tf32", "stages": 2}], ids=["bf16", "f16", "tf32"]
)
def test_missing_cp_async_wait_is_caught(kw: dict) -> None:
    r = _mutants(r"cp\.async\.wait_group", lambda s: "", **kw)
    assert len(r) >= 2
    assert [x for x in r if x[1] in ("AsyncHazard", "UninitShared", "wrong result")], r
    r = _mutants(r"cp\.async\.wait_group", lambda s: re.sub(r"(\d+);", lambda m: f"{int(m[1]) + 2};", s), **kw)
    assert [x for x in r if x[1] != "unnoticed"], r


@pytest.mark.parametrize("mode", MODES)
def test_device_assert(mode: str) -> None:
    x, o = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    run_triton(k_assert, {"x": x, "o": o, "n": 200}, {"B": 128}, (1,), mode=mode, options={"debug": True})
    assert torch.equal(x, o)
    with pytest.raises(Trap, match="assert"):
        run_triton(k_assert, {"x": x, "o": o, "n": 100}, {"B": 128}, (1,), mode=mode, options={"debug": True})


def test_uninitialised_shared_read() -> None:
    text = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p0)
{
.reg .b32 %r<4>; .reg .b64 %rd<4>;
mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.b32 %r3, smem; add.s32 %r2, %r2, %r3;
ld.shared.b32 %r0, [%r2];
ld.param.u64 %rd1, [p0]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2; st.global.b32 [%rd1], %r0;
ret;
}"""
    k = PtxKernel(text, 128, 1)
    o = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(UninitShared):
        k.launch(1, [o])
    assert k.launch(1, [o], uninit="count").uninit_reads == 32
    with pytest.raises(OutOfBounds):
        PtxKernel(text, 64, 1).launch(1, [o])


def test_barrier_not_reached_by_all() -> None:
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p0)
{
.reg .pred %p<2>; .reg .b32 %r<4>;
mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32;
@%p1 bra A;
bar.sync 0;
bar.sync 1;
ret;
A: bar.sync 0;
bar.sync 2;
ret;
}"""
    for mode in MODES:
        with pytest.raises(Deadlock):
            PtxKernel(text, 0, 2).launch(1, [None], mode=mode)
