"""The linear layer that many tests run, its inputs and its error bound."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ptxsim import Stats, run_triton

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


@triton.jit
def k_linear(
    x,
    w,
    b,
    o,
    M,
    N,
    K,
    sxm,
    sxk,
    swn,
    swk,
    som,
    son,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        a = tl.load(x + rm[:, None] * sxm + rk[None, :] * sxk, mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        c = tl.load(w + rn[None, :] * swn + rk[:, None] * swk, mask=(rn[None, :] < N) & (rk[:, None] < K), other=0.0)
        acc = tl.dot(a, c, acc, input_precision=PREC)
    acc += tl.load(b + rn, mask=rn < N, other=0.0)[None, :]
    if ACT == "sigmoid":
        acc = tl.sigmoid(acc)
    tl.store(
        o + rm[:, None] * som + rn[None, :] * son,
        acc.to(o.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


ROUNDING = {f32: 2.0**-24, bf16: 2.0**-8, f16: 2.0**-11}  # half a unit in the last place of 1
MODES = ["lockstep", "warpwise"]

# Architecture, dtype, input precision of the dot.
LINEAR_CASES = [
    (75, f32, "ieee"),
    (80, f32, "ieee"),
    (80, f32, "tf32"),
    (80, bf16, "ieee"),
    (80, f16, "ieee"),
    (75, f16, "ieee"),
    (75, bf16, "ieee"),
    (120, bf16, "ieee"),
    (120, f32, "tf32"),
    (80, f32, "tf32x3"),
]


def case_id(value: object) -> str:
    return str(value).replace("torch.", "")


def gemm_bound(X: Tensor, W: Tensor, K: int, prec: str) -> Tensor:
    """sum |a||b| times the error per product, which comes from float32 sums of K steps and from rounding to tf32."""
    per = 2.0**-24 * (K**0.5 * 4)
    if prec == "tf32":
        per += 2 * 2.0**-11 + 2.0**-20
    return (X.double().abs() @ W.double().abs()) * per + 1e-7


def linear_inputs(
    M: int, N: int, K: int, dt: torch.dtype, pad: int = 0, xt: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] (transposed in memory if xt), weights [N, K], bias [N]; rows are `pad` elements apart."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*((K, M + pad) if xt else (M, K + pad)), generator=g).to(dt)
    x = x[:, :M].t() if xt else x[:, :K]
    w = (torch.randn(N, K + pad, generator=g) / K**0.5).to(dt)[:, :K]
    return x, w, torch.randn(N, generator=g).to(dt)


def linear_args(x: Tensor, w: Tensor, b: Tensor, o: Tensor) -> dict[str, Any]:
    """The run-time arguments of k_linear."""
    sizes = {"M": x.shape[0], "N": w.shape[0], "K": x.shape[1]}
    strides = {"sxm": x.stride(0), "sxk": x.stride(1), "swn": w.stride(0), "swk": w.stride(1)}
    return {"x": x, "w": w, "b": b, "o": o, **sizes, **strides, "som": o.stride(0), "son": o.stride(1)}


def run_linear(
    M: int,
    N: int,
    K: int,
    dt: torch.dtype,
    prec: str,
    arch: int,
    stages: int = 3,
    *,
    tile: tuple[int, int, int] = (32, 32, 32),
    act: str = "sigmoid",
    pad: int = 0,
    xt: bool = False,
    **launch: Any,
) -> tuple[Stats, Tensor]:
    """Run k_linear, and compare with float64 within its error bound."""
    x, w, b = linear_inputs(M, N, K, dt, pad, xt)
    o = torch.full((M, N), float("nan"), dtype=dt)
    BM, BN, BK = tile
    constexprs = {"ACT": act, "BM": BM, "BN": BN, "BK": BK, "PREC": prec}
    grid = (-(-M // BM), -(-N // BN))
    stats = run_triton(k_linear, linear_args(x, w, b, o), constexprs, grid, arch, num_stages=stages, **launch)
    ref = x.double() @ w.double().t() + b.double()
    bound = gemm_bound(x, w.t(), K, prec)
    if act == "sigmoid":
        ref, bound = torch.sigmoid(ref), bound / 4 + 2.0**-21
    bound = bound + ref.abs() * ROUNDING[dt] * 1.01 + 2.0**-25
    err = (o.double() - ref).abs()
    assert torch.isfinite(o.double()).all()
    assert (err <= bound).all(), f"error {err.max().item():.3g}, bound there {bound.flatten()[err.argmax()].item():.3g}"
    return stats, o
