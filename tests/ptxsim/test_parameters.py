"""Kernel parameters, above all members of a tuple that are chosen at run time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.ptxsim import TRITON, Misaligned, OutOfBounds, PtxKernel, SimulatedGPU, compile_triton, run_triton
from tests.ptxsim.samples.linear import MODES

pytestmark = pytest.mark.execute

BY_REGISTER = re.compile(r"ld\.param\.\w+\s+%\w+, \[%")


@triton.jit
def scale_members(xs, ys, sizes, factors, offsets, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """ys[i] = xs[i] * factors[i], shifted by offsets[i]. Program i works on member i."""
    pid = tl.program_id(0)
    x, y, n, factor, offset = xs[0], ys[0], sizes[0], factors[0], offsets[0]
    for i in tl.static_range(1, COUNT):
        if pid >= i:
            x, y, n, factor, offset = xs[i], ys[i], sizes[i], factors[i], offsets[i]
    k = tl.arange(0, BLOCK)
    tl.store(y + (offset - (1 << 40)) + k, tl.load(x + k, mask=k < n) * factor, mask=k < n)


def members() -> dict:
    """Three members; sizes i32, factors f32, offsets i64 beyond 2^40."""
    lengths = [60, 128, 200]
    return {
        "xs": tuple(torch.randn(n) for n in lengths),
        "ys": tuple(torch.full((n + 3,), float("nan")) for n in lengths),
        "sizes": tuple(lengths),
        "factors": (1.5, -2.0, 4.0),
        "offsets": tuple((1 << 40) + i for i in (3, 1, 2)),
    }


def check(args: dict) -> None:
    for x, y, factor, offset in zip(args["xs"], args["ys"], args["factors"], args["offsets"], strict=True):
        start = offset - (1 << 40)
        assert torch.equal(y[start : start + len(x)], x * factor)
        assert y[:start].isnan().all()
        assert y[start + len(x) :].isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_members_chosen_at_run_time(arch: int, mode: str) -> None:
    args = members()
    compiled, _ = compile_triton(scale_members, args, {"COUNT": 3, "BLOCK": 256}, arch)
    stats = run_triton(scale_members, args, {"COUNT": 3, "BLOCK": 256}, (3,), arch, mode=mode)
    check(args)
    if TRITON >= (3, 8):  # earlier versions load every member and select
        assert len(BY_REGISTER.findall(compiled.asm["ptx"])) == 5, "Triton no longer loads parameters by register"
        assert stats.by_class["ld.param"] >= 5 * 3 * 4  # five of them in each of four warps of three programs


@pytest.mark.parametrize("mode", MODES)
def test_members_chosen_at_run_time_on_the_simulated_gpu(mode: str) -> None:
    args = members()
    with SimulatedGPU(80, mode=mode) as gpu:
        scale_members[(3,)](*args.values(), COUNT=3, BLOCK=256)
    check(args)
    assert gpu.launches[0].arguments["xs"] == args["xs"]


def test_fault_in_a_chosen_member() -> None:
    args = members()
    args["sizes"] = (60, 129, 200)
    with pytest.raises(OutOfBounds, match=r"past the end of 'xs\[1\]'"):
        run_triton(scale_members, args, {"COUNT": 3, "BLOCK": 256}, (3,))


def run_param_ptx(body: str, mode: str, *values: int) -> np.ndarray:
    """Run a few instructions on parameters p0 (8 bits), p1 (16), p2 (32), p3 and p4 (64).

    %t is the lane, %o (64 bits) the result, %x<8> and %y<8> are registers of 32 and 64 bits.
    """
    text = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u8 p0, .param .u16 p1, .param .u32 p2, .param .u64 p3, .param .u64 p4, .param .u64 po)
{{
.reg .pred %p<8>; .reg .b32 %t, %x<8>; .reg .b64 %o, %y<8>, %q<3>;
mov.u32 %t, %tid.x;
mov.b64 %o, 0;
{body}
ld.param.u64 %q1, [po]; mul.wide.u32 %q2, %t, 8; add.s64 %q1, %q1, %q2;
st.global.b64 [%q1], %o;
ret;
}}
"""
    out = np.zeros(64, np.uint64)
    PtxKernel(text, 0, 2).launch(1, [*values, out], mode=mode)
    return out


VALUES = (0xE1, 0xD2C3, 0xB4A59687, 0x1122334455667788, 0x99AABBCCDDEEFF01)

PARAM_CASES = [
    # by name, with the offset of a part
    ("ld.param.u8 %x0, [p0]; cvt.u64.u32 %o, %x0;", lambda t: 0xE1),
    ("ld.param.s8 %x0, [p0]; cvt.s64.s32 %o, %x0;", lambda t: 0xFFFFFFFFFFFFFFE1),
    ("ld.param.b32 %x0, [p3+4]; cvt.u64.u32 %o, %x0;", lambda t: 0x11223344),
    ("ld.param.v2.b32 {%x0, %x1}, [p3]; mov.b64 %o, {%x1, %x0};", lambda t: 0x5566778811223344),
    # a register wider than the loaded value: sign-extended for .s, zero-extended for .u and .b
    ("ld.param.s32 %o, [p2];", lambda t: 0xFFFFFFFFB4A59687),
    ("ld.param.u32 %o, [p2];", lambda t: 0xB4A59687),
    ("ld.param.b32 %o, [p2];", lambda t: 0xB4A59687),
    ("mov.b64 %y0, p2; ld.param.s32 %o, [%y0];", lambda t: 0xFFFFFFFFB4A59687),
    ("mov.b64 %y0, p2; ld.param.u32 %o, [%y0];", lambda t: 0xB4A59687),
    # by address: uniform, with offsets, narrower than the parameter, as a vector
    ("mov.b64 %y0, p4; ld.param.b64 %o, [%y0];", lambda t: VALUES[4]),
    ("mov.b64 %y0, p3; ld.param.b64 %o, [%y0+8];", lambda t: VALUES[4]),
    ("mov.b64 %y0, p4; ld.param.b64 %o, [%y0+-8];", lambda t: VALUES[3]),
    ("mov.b64 %y0, p3+4; ld.param.u32 %x0, [%y0]; cvt.u64.u32 %o, %x0;", lambda t: 0x11223344),
    ("mov.b64 %y0, p1; ld.param.s16 %x0, [%y0]; cvt.s64.s32 %o, %x0;", lambda t: 0xFFFFFFFFFFFFD2C3),
    ("mov.b64 %y0, p3; ld.param.v2.b32 {%x1, %x2}, [%y0+8]; mov.b64 %o, {%x1, %x2};", lambda t: VALUES[4]),
    # different in every lane
    (
        "and.b32 %x0, %t, 15; mul.wide.u32 %y1, %x0, 1; mov.b64 %y0, p3; add.s64 %y0, %y0, %y1;"
        "ld.param.u8 %x1, [%y0]; cvt.u64.u32 %o, %x1;",
        lambda t: (VALUES[3] | VALUES[4] << 64) >> 8 * (t % 16) & 0xFF,
    ),
    (
        "setp.lt.u32 %p1, %t, 40; mov.b64 %y0, p3; mov.b64 %y1, p4;"
        "selp.b64 %y2, %y0, %y1, %p1; ld.param.b64 %o, [%y2];",
        lambda t: VALUES[3] if t < 40 else VALUES[4],
    ),
    # in some lanes only; the other lanes have a wrong address
    (
        "setp.lt.u32 %p1, %t, 40; mov.b64 %y0, p3; selp.b64 %y0, %y0, 12345, %p1; @%p1 ld.param.b64 %o, [%y0];",
        lambda t: VALUES[3] if t < 40 else 0,
    ),
    # by generic address
    ("mov.b64 %y0, p4; cvta.param.u64 %y1, %y0; ld.b64 %o, [%y1];", lambda t: VALUES[4]),
    (
        "mov.b64 %y0, p3; cvta.param.u64 %y1, %y0; cvta.to.param.u64 %y2, %y1; ld.param.b64 %o, [%y2+8];",
        lambda t: VALUES[4],
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", PARAM_CASES, ids=lambda c: c[0][:48])
def test_parameter_loads(case: tuple, mode: str) -> None:
    body, reference = case
    assert [int(v) for v in run_param_ptx(body, mode, *VALUES)] == [reference(t) for t in range(64)]


def test_generic_load_from_global_memory() -> None:
    x = np.arange(64, dtype=np.uint64) * 0x0123456789
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 po)
{
.reg .b32 %t; .reg .b64 %q<5>;
mov.u32 %t, %tid.x; mul.wide.u32 %q0, %t, 8;
ld.param.u64 %q1, [px]; cvta.to.global.u64 %q1, %q1; cvta.global.u64 %q1, %q1; add.s64 %q1, %q1, %q0;
ld.b64 %q2, [%q1];
ld.param.u64 %q3, [po]; add.s64 %q3, %q3, %q0; st.global.b64 [%q3], %q2;
ret;
}"""
    out = np.zeros_like(x)
    stats = PtxKernel(text, 0, 2).launch(1, [x, out])
    np.testing.assert_array_equal(out, x)
    assert stats.global_store["bytes"] == 512
    with pytest.raises(OutOfBounds, match="past the end of 'arg0'"):
        PtxKernel(text, 0, 2).launch(1, [x[:60].copy(), out])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("mov.b64 %y0, p4; ld.param.b64 %o, [%y0+16];", OutOfBounds),  # behind the last parameter
        ("mov.b64 %y0, p0; ld.param.u8 %x0, [%y0+-1];", OutOfBounds),
        ("mov.b64 %y0, 64; ld.param.b64 %o, [%y0];", OutOfBounds),
        ("ld.param.u64 %y0, [po]; ld.param.b64 %o, [%y0];", OutOfBounds),  # a global address
        ("mov.b64 %y0, p3+4; ld.param.b64 %o, [%y0];", Misaligned),
        ("mov.b64 %y0, p3; ld.param.v2.b64 {%y1, %y2}, [%y0];", Misaligned),  # vectors count as a whole
        ("mov.b64 %y0, 64; ld.b64 %o, [%y0];", NotImplementedError),  # generic, of no known space
        ("mov.b64 %y0, p3; cvta.shared.u64 %o, %y0;", NotImplementedError),
    ],
)
def test_wrong_parameter_loads(body: str, error: type[Exception], mode: str) -> None:
    with pytest.raises(error):
        run_param_ptx(body, mode, *VALUES)


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(256)
    compiled, names = compile_triton(scale_members, members(), {"COUNT": 3, "BLOCK": 256})
    assert names == ["xs", "ys", "sizes", "factors", "offsets"]
    kernel = PtxKernel(compiled.asm["ptx"])
    with pytest.raises(ValueError, match="takes 17 parameters"):
        kernel.launch(1, [x])
    with pytest.raises(ValueError, match="mode"):
        kernel.launch(1, [x] * 15, mode="fast")
    with pytest.raises(ValueError, match="uninit"):
        kernel.launch(1, [x] * 15, uninit="ignore")
    with pytest.raises(ValueError, match="on meta"):
        kernel.launch(1, [x.to("meta")] * 15)
