"""Split-K matrix products: by atomics, by a lost update on purpose, and by the last program that arrives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _partial(x, w, M, N, K, KS, ps, rm, rn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(ps * KS, min(K, ps * KS + KS), BK):
        kk = k + tl.arange(0, BK)
        a = tl.load(x + rm[:, None] * K + kk[None, :], mask=(rm[:, None] < M) & (kk[None, :] < K), other=0.0)
        b = tl.load(w + rn[None, :] * K + kk[:, None], mask=(rn[None, :] < N) & (kk[:, None] < K), other=0.0)
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def k_splitk(x, w, o, M, N, K, KS, ATOMIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = _partial(x, w, M, N, K, KS, tl.program_id(2), rm, rn, BM, BN, BK)
    p = o + rm[:, None] * N + rn[None, :]
    m = (rm[:, None] < M) & (rn[None, :] < N)
    if ATOMIC:
        tl.atomic_add(p, acc, mask=m)
    else:
        tl.store(p, tl.load(p, mask=m) + acc, mask=m)  # wrong on purpose: a lost update


@triton.jit
def k_lastarriver(x, w, o, part, sem, M, N, K, KS, S, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pm, pn, ps = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    acc = _partial(x, w, M, N, K, KS, ps, rm, rn, BM, BN, BK)
    offs = rm[:, None] * N + rn[None, :]
    m = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(part + ps * M * N + offs, acc, mask=m)
    tl.debug_barrier()
    t = tl.atomic_add(sem + pm * tl.num_programs(1) + pn, 1, sem="acq_rel")
    if t == S - 1:
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(S):
            acc += tl.load(part + i * M * N + offs, mask=m, other=0.0)
        tl.store(o + offs, acc, mask=m)
