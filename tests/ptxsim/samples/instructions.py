"""Single PTX instructions on one value per lane, and values that are likely to break the instructions."""

from __future__ import annotations

import numpy as np

from tests.ptxsim import PtxKernel


def run_ptx(body: str, ins: list[np.ndarray], out_bits: int) -> np.ndarray:
    """Run a few instructions.

    Args:
        body: the instructions. They find their operands in registers %a0, %a1, ... and leave the result in %o. There
            are also %p<8> (predicates), %h<8> (16 bits), %x<20> (32 bits) and %y<20> (64 bits).
        ins: the values of each operand, one per lane, as unsigned arrays of the register's width.
        out_bits: width of %o.

    Returns:
        The result of each lane, unsigned.
    """
    n = len(ins[0])
    lanes = -(-n // 32) * 32
    ptr = "".join(f".param .u64 p{i},\n" for i in range(len(ins))) + ".param .u64 po"
    regs, loads = "", ""
    for i, a in enumerate(ins):
        b = a.dtype.itemsize * 8
        assert b in (16, 32, 64)
        regs += f".reg .b{b} %a{i};\n"
        loads += (
            f"ld.param.u64 %q1, [p{i}]; mul.wide.u32 %q2, %t, {b // 8}; add.s64 %q1, %q1, %q2; "
            f"ld.global.b{b} %a{i}, [%q1];\n"
        )
    text = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry k({ptr})
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %t, %x<20>; .reg .b64 %q<9>, %y<20>;
.reg .b{out_bits} %o;
{regs}
mov.u32 %t, %tid.x;
{loads}
{body}
ld.param.u64 %q1, [po]; mul.wide.u32 %q2, %t, {out_bits // 8}; add.s64 %q1, %q1, %q2;
st.global.b{out_bits} [%q1], %o;
ret;
}}
"""
    pad = [np.concatenate([a, np.resize(a, lanes - n)]) for a in ins]
    out = np.zeros(lanes, f"u{out_bits // 8}")
    PtxKernel(text, 0, lanes // 32).launch(1, [*pad, out])
    return out[:n]


def signed(x: int, b: int) -> int:
    """The low b bits as a signed number."""
    x &= (1 << b) - 1
    return x - (1 << b) if x >> (b - 1) else x


EDGE32 = [0, 1, 2, 3, 31, 32, 33, 127, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678]


def ints(bits: int, n: int = 96, seed: int = 0) -> np.ndarray:
    """Random integers; integers next to a boundary come first."""
    r = np.random.default_rng(seed)
    v = [int(x) for x in r.integers(0, 1 << 63, n)]
    v = [(a * 2 + 1 if i % 2 else a * 2) >> (64 - bits) for i, a in enumerate(v)]
    e = [x | (x << 32) if bits == 64 else x & ((1 << bits) - 1) for x in EDGE32]
    k = r.permutation(len(e))
    v[: len(e)] = [e[i] for i in k]
    return np.array(v, f"u{bits // 8}")


def fbits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def floats(n: int = 128, seed: int = 0, special: bool = True) -> np.ndarray:
    """Random float32 of many magnitudes. If `special`, zeros, infinities, a NaN and ties come first."""
    r = np.random.default_rng(seed)
    x = (r.standard_normal(n) * np.exp2(r.integers(-20, 20, n))).astype(np.float32)
    if special:
        x[:12] = r.permutation(
            np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, 1.5, 2.5, -2.5, 1e-40], np.float32)
        )
    return x
