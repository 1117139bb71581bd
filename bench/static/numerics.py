"""Errors of every kernel, and of torch in the same dtype, against float64, as shares of the error budget.

The budget is that of the tests (``tests.support.harness``): twice torch's own largest error plus a floor that grows
with the square root of the reduction length. The kernels are executed on the simulated GPU (sm_80), and torch runs on
the CPU. torch has tf32 on GPUs only, so a float32 product of operands that are rounded to tf32 stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmlp import kernels, reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.wgrad_update import wgrad_update
from tests.ptxsim import SimulatedGPU
from tests.support.harness import budget

from .gpus import MODES
from .numbers import significant
from .workloads import HYPER_ROW, draw, float32_precision, labels

__all__ = ["CASES", "Result", "errors", "numerics_rows", "tf32"]

NUMERICS_MODES = ("float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class Result:
    """One output: the kernel's, the exact one, torch's own, and the number of terms in its sums."""

    name: str
    actual: Tensor
    exact: Tensor
    own: Tensor
    reduction: int


def errors(result: Result) -> dict[str, float]:
    """Largest and root-mean-square error relative to the exact result's, and the used share of the budget."""
    scale = result.exact.abs().max().item()
    rms = result.exact.square().mean().sqrt().item()
    found = {}
    for who, tensor in (("kernel", result.actual), ("torch", result.own)):
        error = (tensor.double() - result.exact).abs()
        found[f"{who}_max"] = significant(error.max().item() / scale)
        found[f"{who}_rms"] = significant(error.square().mean().sqrt().item() / rms)
    allowed = budget(result.exact, result.own, result.reduction, result.actual.dtype)
    worst = (result.actual.double() - result.exact).abs().max().item()
    found["budget_share"] = significant(worst / allowed)
    return found


def numerics_rows(mode: str) -> list[dict[str, Any]]:
    """One row per output of each case in which the mode makes a difference."""
    rows = []
    dtype = getattr(torch, MODES[mode].dtype)
    for case in CASES:
        if mode == "tf32" and not case.gemm:
            continue
        with SimulatedGPU(80), float32_precision(mode):
            results = list(case.run(dtype, tf32 if mode == "tf32" else lambda t: t))
        rows += [
            {"kernel": case.name, "shape": case.shape, "mode": mode, "output": r.name, **errors(r)} for r in results
        ]
    return rows


def tf32(t: Tensor) -> Tensor:
    """float32 rounded to tf32's 10 bits of mantissa, ties away from zero."""
    rounded = ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isnan(), t, rounded)  # a GPU's NaN, 0x7fffffff, would wrap around to -0.0


Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel on one representative shape; ``run(dtype, rounding of torch's operands)`` yields its outputs."""

    name: str
    shape: str
    run: Callable[[torch.dtype, Rounding], Iterator[Result]]
    gemm: bool = False


def _linear_fwd(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    x, w, b = draw(64, 784, dtype=dtype), draw(512, 784, dtype=dtype, seed=7, scale=0.04), draw(512, dtype=dtype)
    for f in ("identity", "sigmoid"):
        actual, _ = kernels.linear_fwd(x, w, b, f)
        exact = reference.linear_act(x.double(), w.double(), b.double(), f)
        yield Result(f"A, {f}", actual, exact, reference.activate(F.linear(cut(x), cut(w), b), f), 784)


def _linear_dgrad(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    dz, w = draw(64, 512, dtype=dtype), draw(512, 512, dtype=dtype, seed=7, scale=0.04)
    a = torch.sigmoid(draw(64, 512, seed=1)).to(dtype)
    exact = (dz.double() @ w.double()) * reference.activation_grad_from_output(a.double(), "sigmoid")
    own = (cut(dz) @ cut(w)) * reference.activation_grad_from_output(a, "sigmoid")
    yield Result("dX, sigmoid", kernels.linear_dgrad(dz, w, a, "sigmoid"), exact, own, 512)


def _linear_wgrad(m: int, n: int, k: int) -> Callable[[torch.dtype, Rounding], Iterator[Result]]:
    def run(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
        dz, x = draw(m, n, dtype=dtype), draw(m, k, dtype=dtype, seed=1)
        dw, db = kernels.linear_wgrad(dz, x)
        assert db is not None
        yield Result("dW", dw, dz.double().t() @ x.double(), cut(dz).t() @ cut(x), m)
        yield Result("db", db, dz.double().sum(0), dz.sum(0), m)

    return run


def _head(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    h, y = torch.sigmoid(draw(64, 512)).to(dtype), labels(64)
    w, b = draw(10, 512, dtype=dtype, seed=7, scale=0.1), draw(10, dtype=dtype)
    actual = kernels.head(h, w, b, y, activation="sigmoid", saved=h, scale=1 / 64)
    loss, dz, da, _ = reference.head(h.double(), w.double(), b.double(), y, scale=1 / 64)
    exact = loss, dz, da * reference.activation_grad_from_output(h.double(), "sigmoid")
    z = F.linear(cut(h), cut(w), b).requires_grad_()
    own_loss = F.cross_entropy(z, y, reduction="none")
    (own_dz,) = torch.autograd.grad(own_loss, z, torch.full_like(own_loss, 1 / 64))
    below = (cut(own_dz) @ cut(w)) * reference.activation_grad_from_output(h, "sigmoid")
    for name, a, e, o in zip(
        ("loss", "dZ", "dZ below"), actual, exact, (own_loss.detach(), own_dz, below), strict=True
    ):
        assert a is not None
        yield Result(name, a, e, o, 522)


def _wgrad_update(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    """SGD on float32 masters from products in ``dtype``."""
    sizes = (196, 128, 10)
    weights = [draw(n, k, seed=7, scale=0.04) for k, n in pairwise(sizes)]
    biases = [draw(n, scale=0.04) for n in sizes[1:]]
    dzs = [draw(64, n, dtype=dtype, seed=i) for i, n in enumerate(sizes[1:])]
    xs = [draw(64, k, dtype=dtype, seed=3 + i) for i, k in enumerate(sizes[:-1])]
    trained = [
        Layer(w.clone(), b.clone(), *((None, None) if dtype == torch.float32 else (w.to(dtype), b.to(dtype))))
        for w, b in zip(weights, biases, strict=True)
    ]
    wgrad_update(Layout(trained), dzs, xs, "sgd", torch.tensor(HYPER_ROW))
    lr = torch.tensor(HYPER_ROW[0]).double()
    for i, layer in enumerate(trained):
        exact = weights[i].double() - lr * (dzs[i].double().t() @ xs[i].double())
        own = weights[i] - HYPER_ROW[0] * (cut(dzs[i]).t() @ cut(xs[i])).float()
        yield Result(f"W_{i + 1} after SGD", layer.weight, exact, own, 64)
        assert layer.bias is not None
        exact_b = biases[i].double() - lr * dzs[i].double().sum(0)
        yield Result(f"b_{i + 1} after SGD", layer.bias, exact_b, biases[i] - HYPER_ROW[0] * dzs[i].sum(0).float(), 64)


def _activation_bwd(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    da, z = draw(64, 512, dtype=dtype), draw(64, 512, dtype=dtype, seed=1, scale=2.0)
    a = torch.sigmoid(z)
    exact = da.double() * reference.activation_grad_from_output(a.double(), "sigmoid")
    own = da * reference.activation_grad_from_output(a, "sigmoid")
    yield Result("dZ, sigmoid", kernels.activation_bwd(da, a, "sigmoid"), exact, own, 1)
    for f in (name for name, f in ACTIVATIONS.items() if f.saved == "z"):
        exact = da.double() * reference.activation_grad(z.double(), f)
        leaf = z.clone().requires_grad_()
        (own,) = torch.autograd.grad(reference.activate(leaf, f), leaf, da)
        yield Result(f"dZ, {f}", kernels.activation_bwd(da, z, f), exact, own, 1)


def _cross_entropy(m: int, c: int) -> Callable[[torch.dtype, Rounding], Iterator[Result]]:
    def run(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
        z, y = draw(m, c, dtype=dtype, scale=3.0), labels(m, c)
        loss, dz = kernels.cross_entropy(z, y, scale=1 / m)
        exact = reference.cross_entropy(z.double(), y, reduction="none")
        upstream = torch.full((m,), 1 / m, dtype=torch.float64)
        exact_dz, _ = reference.cross_entropy_backward(upstream, z.double(), y, reduction="none")
        leaf = z.clone().requires_grad_()
        own = F.cross_entropy(leaf, y, reduction="none")
        (own_dz,) = torch.autograd.grad(own, leaf, upstream.to(dtype))
        yield Result("loss", loss, exact, own.detach(), c)
        yield Result("dZ", dz, exact_dz, own_dz, c)
        mean, stats, denominator = kernels.cross_entropy_fwd(z, y)
        yield Result("mean", mean, exact.mean(), own.detach().mean(), m * c)
        dz_mean, _ = kernels.cross_entropy_bwd(torch.ones((), dtype=dtype), z, y, stats, denominator=denominator)
        assert dz_mean is not None
        yield Result("dZ of the mean", dz_mean, exact_dz, own_dz, c)

    return run


def _elementwise_loss(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    a, y = draw(256, 10, dtype=dtype), torch.sigmoid(draw(256, 10, seed=1)).to(dtype)
    for name, function in (("mse", F.mse_loss), ("bce_with_logits", F.binary_cross_entropy_with_logits)):
        loss, da = kernels.elementwise_loss(a, y, name)
        doubled, leaf = a.double().requires_grad_(), a.clone().requires_grad_()
        exact, own = function(doubled, y.double(), reduction="none"), function(leaf, y, reduction="none")
        yield Result(f"{name} loss", loss, exact.detach(), own.detach(), 1)
        (exact_da,), (own_da,) = (torch.autograd.grad(v.sum(), t) for v, t in ((exact, doubled), (own, leaf)))
        yield Result(f"{name} dA", da, exact_da, own_da, 1)


def _softmax_squared_error(dtype: torch.dtype, cut: Rounding) -> Iterator[Result]:
    z, y = draw(256, 10, dtype=dtype), labels(256)
    loss, dz = kernels.softmax_squared_error(z, y)
    found = []
    for leaf in (z.double().requires_grad_(), z.clone().requires_grad_()):
        value = (leaf.softmax(1) - F.one_hot(y, 10).to(leaf.dtype)).square().sum(1)
        found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    (exact, exact_dz), (own, own_dz) = found
    yield Result("loss", loss, exact, own, 10)
    yield Result("dZ", dz, exact_dz, own_dz, 10)


CASES = (
    Case("linear_fwd", "64 x 784 -> 512", _linear_fwd, gemm=True),
    Case("linear_dgrad", "64 x 512 -> 512", _linear_dgrad, gemm=True),
    Case("linear_wgrad", "512 x 784 over 64", _linear_wgrad(64, 512, 784), gemm=True),
    Case("linear_wgrad, split", "48 x 64 over 2048", _linear_wgrad(2048, 48, 64), gemm=True),
    Case("head", "64 x 512 -> 10", _head, gemm=True),
    Case("wgrad_update", "196-128-10, batch 64", _wgrad_update, gemm=True),
    Case("activation_bwd", "64 x 512", _activation_bwd),
    Case("cross_entropy", "256 x 10", _cross_entropy(256, 10)),
    Case("cross_entropy", "16 x 1000", _cross_entropy(16, 1000)),
    Case("elementwise_loss", "256 x 10", _elementwise_loss),
    Case("softmax_squared_error", "256 x 10", _softmax_squared_error),
)
