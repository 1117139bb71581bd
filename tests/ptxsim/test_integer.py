"""Integer instructions against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptxsim.samples.instructions import ints, run_ptx, signed

pytestmark = pytest.mark.execute


def _bfe(x: int, p: int, n: int, sign: bool) -> int:
    p, n = p & 255, n & 255
    if n == 0:
        return 0
    bits = [(x >> min(p + i, 31)) & 1 if sign else ((x >> (p + i)) & 1 if p + i < 32 else 0) for i in range(n)]
    out = sum(b << i for i, b in enumerate(bits[:32]))
    top = (x >> min(p + n - 1, 31)) & 1
    if sign and top:
        out |= (0xFFFFFFFF << min(n, 32)) & 0xFFFFFFFF
    return out & 0xFFFFFFFF


def _bfi(a: int, b: int, p: int, n: int) -> int:
    p, n = p & 255, n & 255
    for i in range(n):
        if p + i < 32:
            b = (b & ~(1 << (p + i))) | (((a >> i) & 1) << (p + i))
    return b


def _prmt(a: int, b: int, c: int) -> int:
    v, o = a | b << 32, 0
    for i in range(4):
        k = c >> 4 * i & 15
        x = v >> 8 * (k & 7) & 255
        if k & 8:
            x = 255 if x & 128 else 0
        o |= x << 8 * i
    return o


def _divs(a: int, b: int) -> int:
    q = abs(signed(a, 32)) // abs(signed(b, 32))
    return -q if (signed(a, 32) < 0) != (signed(b, 32) < 0) else q


INT_CASES = [  # instruction, input widths, output width, exact reference
    ("add.s32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: a + b),
    ("sub.s64 %o, %a0, %a1;", (64, 64), 64, lambda a, b: a - b),
    ("add.s32 %o, %a0, -7;", (32,), 32, lambda a: a - 7),
    ("mul.lo.s32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: a * b),
    ("mul.hi.u32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: a * b >> 32),
    ("mul.hi.s32 %o, %a0, -1840700269;", (32,), 32, lambda a: signed(a, 32) * -1840700269 >> 32),
    ("mul.wide.s32 %o, %a0, %a1;", (32, 32), 64, lambda a, b: signed(a, 32) * signed(b, 32)),
    ("mul.wide.u32 %o, %a0, %a1;", (32, 32), 64, lambda a, b: a * b),
    ("mul.wide.s16 %o, %a0, %a1;", (16, 16), 32, lambda a, b: signed(a, 16) * signed(b, 16)),
    ("mul.hi.u64 %o, %a0, %a1;", (64, 64), 64, lambda a, b: a * b >> 64),
    ("mul.hi.s64 %o, %a0, %a1;", (64, 64), 64, lambda a, b: signed(a, 64) * signed(b, 64) >> 64),
    ("mad.lo.s32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: a * b + c),
    ("mad.hi.s32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: (signed(a, 32) * signed(b, 32) >> 32) + c),
    ("mad.wide.s32 %o, %a0, %a1, %a2;", (32, 32, 64), 64, lambda a, b, c: signed(a, 32) * signed(b, 32) + c),
    (
        "mad.lo.cc.u32 %x1, %a0, %a1, %a2; madc.hi.u32 %o, %a0, %a1, 0;",
        (32, 32, 32),
        32,
        lambda a, b, c: (a * b >> 32) + (((a * b & 0xFFFFFFFF) + c) >> 32),
    ),
    ("add.cc.u32 %x1, %a0, %a1; addc.u32 %o, %a2, 5;", (32, 32, 32), 32, lambda a, b, c: c + 5 + (a + b >> 32)),
    ("sub.cc.u32 %x1, %a0, %a1; subc.u32 %o, %a2, 5;", (32, 32, 32), 32, lambda a, b, c: c - 5 - (a < b)),
    ("bfe.u32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: _bfe(a, b, c, False)),
    ("bfe.s32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: _bfe(a, b, c, True)),
    ("bfe.s32 %o, %a0, 6, 1;", (32,), 32, lambda a: -1 if a >> 6 & 1 else 0),
    ("bfi.b32 %o, %a0, %a1, %a2, %a3;", (32, 32, 32, 32), 32, _bfi),
    ("shl.b32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: a << b if b < 32 else 0),
    ("shr.u32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: a >> b if b < 32 else 0),
    ("shr.s32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: signed(a, 32) >> min(b, 31)),
    ("shr.s64 %o, %a0, %a1;", (64, 32), 64, lambda a, b: signed(a, 64) >> min(b, 63)),
    ("shr.s32 %o, %a0, 31;", (32,), 32, lambda a: signed(a, 32) >> 31),
    ("shl.b64 %o, %a0, 2;", (64,), 64, lambda a: a << 2),
    ("shf.l.wrap.b32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    ("shf.r.wrap.b32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.r.clamp.b32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("prmt.b32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, _prmt),
    ("prmt.b32 %o, %a0, %a1, 0x7632U;", (32, 32), 32, lambda a, b: _prmt(a, b, 0x7632)),
    ("lop3.b32 %o, %a0, %a1, %a2, 0xca;", (32, 32, 32), 32, lambda a, b, c: (a & b) | (~a & c)),
    ("lop3.b32 %o, %a0, %a1, %a2, 0x96;", (32, 32, 32), 32, lambda a, b, c: a ^ b ^ c),
    ("popc.b32 %o, %a0;", (32,), 32, lambda a: bin(a).count("1")),
    ("clz.b32 %o, %a0;", (32,), 32, lambda a: 32 - a.bit_length()),
    ("brev.b32 %o, %a0;", (32,), 32, lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfind.u32 %o, %a0;", (32,), 32, lambda a: a.bit_length() - 1),
    ("min.s32 %o, %a0, %a1;", (32, 32), 32, lambda a, b: min(signed(a, 32), signed(b, 32))),
    ("max.u32 %o, %a0, %a1;", (32, 32), 32, max),
    ("abs.s32 %o, %a0;", (32,), 32, lambda a: abs(signed(a, 32))),
    ("neg.s32 %o, %a0;", (32,), 32, lambda a: -a),
    ("not.b32 %o, %a0;", (32,), 32, lambda a: ~a),
    ("and.b32 %x1, %a0, 1; cnot.b32 %o, %x1;", (32,), 32, lambda a: a & 1 ^ 1),
    ("or.b32 %x1, %a1, 1; div.s32 %o, %a0, %x1;", (32, 32), 32, lambda a, b: _divs(a, b | 1)),
    (
        "or.b32 %x1, %a1, 1; rem.s32 %o, %a0, %x1;",
        (32, 32),
        32,
        lambda a, b: signed(a, 32) - _divs(a, b | 1) * signed(b | 1, 32),
    ),
    ("or.b32 %x1, %a1, 1; rem.u32 %o, %a0, %x1;", (32, 32), 32, lambda a, b: a % (b | 1)),
    ("sad.s32 %o, %a0, %a1, %a2;", (32, 32, 32), 32, lambda a, b, c: abs(signed(a, 32) - signed(b, 32)) + c),
    (
        "dp4a.s32.s32 %o, %a0, %a1, %a2;",
        (32, 32, 32),
        32,
        lambda a, b, c: sum(signed(a >> 8 * i, 8) * signed(b >> 8 * i, 8) for i in range(4)) + c,
    ),
    ("setp.lt.s32 %p1, %a0, %a1; selp.b32 %o, 1, 0, %p1;", (32, 32), 32, lambda a, b: signed(a, 32) < signed(b, 32)),
    ("setp.lt.u32 %p1, %a0, %a1; selp.b32 %o, 1, 0, %p1;", (32, 32), 32, lambda a, b: a < b),
    (
        "setp.ge.s32 %p2, %a1, 0; setp.gt.and.s32 %p1, %a0, 5, !%p2; selp.b32 %o, %a0, %a1, %p1;",
        (32, 32),
        32,
        lambda a, b: a if signed(a, 32) > 5 and not signed(b, 32) >= 0 else b,
    ),
    (
        "setp.lt.s32 %p1|%p2, %a0, %a1; selp.b32 %o, 1, 0, %p2;",
        (32, 32),
        32,
        lambda a, b: not signed(a, 32) < signed(b, 32),
    ),
    ("mov.b64 %y1, {%a0, %a1}; mov.b64 {_, %x1}, %y1; mov.b32 %o, %x1;", (32, 32), 32, lambda a, b: b),
    ("mov.b32 {%h1, %h2}, %a0; mov.b32 %o, {%h2, %h1};", (32,), 32, lambda a: a >> 16 | (a & 65535) << 16),
    ("cvt.s16.s8 %h1, %a0; cvt.s32.s16 %o, %h1;", (16,), 32, lambda a: signed(a, 8)),
    ("cvt.u32.u16 %o, %a0;", (16,), 32, lambda a: a),
    ("cvt.s64.s32 %o, %a0;", (32,), 64, lambda a: signed(a, 32)),
    ("cvt.u32.u64 %o, %a0;", (64,), 32, lambda a: a),
    ("cvt.sat.s8.s32 %o, %a0;", (32,), 32, lambda a: max(-128, min(127, signed(a, 32)))),
    ("cvt.sat.u8.s32 %o, %a0;", (32,), 32, lambda a: max(0, min(255, signed(a, 32)))),
    (
        "mov.u32 %o, 0; @%p0 mov.u32 %o, 7; { .reg .b32 a0, b; mov.u32 b, 3; add.u32 a0, %a0, b; mov.u32 %o, a0; }",
        (32,),
        32,
        lambda a: a + 3,
    ),
    (
        """setp.gt.s32 %p1, %a0, 0; mov.u32 %o, 1; @%p1 bra L1; add.s32 %o, %a0, 1; bra L2;
L1: mul.lo.s32 %o, %a0, 3;
L2: add.s32 %o, %o, 1;""",
        (32,),
        32,
        lambda a: (3 * a if signed(a, 32) > 0 else a + 1) + 1,
    ),
    (
        """and.b32 %x1, %a0, 7; mov.u32 %o, 0;
LOOP: setp.eq.s32 %p1, %x1, 0; @%p1 bra DONE; add.s32 %o, %o, %a1; sub.s32 %x1, %x1, 1; bra.uni LOOP;
DONE: add.s32 %o, %o, 1;""",
        (32, 32),
        32,
        lambda a, b: (a & 7) * b + 1,
    ),
]


@pytest.mark.parametrize("case", INT_CASES, ids=lambda c: c[0].split(" ")[0] + "|" + c[0][-24:-1])
def test_integer_instructions(case: tuple) -> None:
    text, widths, ob, ref = case
    xs = [ints(w, seed=i) for i, w in enumerate(widths)]
    if (
        text.split()[0].startswith(("bfe", "bfi", "shl", "shr", "shf")) and len(xs) > 1
    ):  # small positions and lengths too
        r = np.random.default_rng(9)
        for x in xs[1 if "shf" not in text and "bfi" not in text else 2 :]:
            x[::2] = r.integers(0, 40, x[::2].shape)
    got = run_ptx(text, xs, ob)
    for i, g in enumerate(got):
        a = [int(x[i]) for x in xs]
        assert int(g) == int(ref(*a)) & ((1 << ob) - 1), (text, [hex(v) for v in a], hex(int(g)))
