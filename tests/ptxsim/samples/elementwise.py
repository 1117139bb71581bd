"""Small kernels that several tests run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def k_add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m, other=1.0), mask=m)


@triton.jit
def k_softmax(x, o, n, sx, so, B: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, B)
    v = tl.load(x + r * sx + c, mask=c < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(o + r * so + c, (e / tl.sum(e, 0)).to(o.dtype.element_ty), mask=c < n)
