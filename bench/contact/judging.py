"""Results against float64 as shares of the error budget of the tests, all on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.static.gpus import MODES
from bench.static.numerics import Result, errors, tf32
from bench.tune import Product

__all__ = ["NUMERICS", "Tf32Products", "dtype_of", "product_share", "run_share"]

#: The modes of ``bench.static.gpus.MODES`` that fastmlp has.
NUMERICS = ("float32", "tf32", "bfloat16", "float16")


class Tf32Products(TorchDispatchMode):
    """Within it torch rounds the factors of float32 products to tf32, forward and backward, on any device.

    cuBLAS on a GPU may or may not do so by itself; a CPU never does.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            factors = [tf32(t) if t.dtype == torch.float32 else t for t in args[-2:]]
            args = (*args[:-2], *factors)
        return func(*args, **(kwargs or {}))


def dtype_of(mode: str) -> torch.dtype:
    """The dtype of the products' factors."""
    dtype = getattr(torch, MODES[mode].dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def product_share(product: Product, mode: str) -> tuple[float, str]:
    """(error / budget, name) of a product's worst result."""
    product.launch()
    results = product.results()
    expected = product.oracle(torch.float64)
    own = product.oracle(dtype_of(mode), tf32) if mode == "tf32" else product.oracle(dtype_of(mode))
    shares = {}
    for name, actual in results.items():
        found = errors(Result(name, actual, expected[name], own[name], product.depth))
        shares[name] = found["budget_share"]
    what = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return shares[what], what


def run_share(actual: Tensor, expected: Tensor, own: Tensor, steps: int) -> float:
    """Error of all parameters after ``steps`` steps / its budget: twice torch's own error and a rounding per step."""
    rounding = math.sqrt(steps) * torch.finfo(torch.float32).eps * expected.norm().item()
    return (actual - expected).norm().item() / (2 * (own - expected).norm().item() + rounding)
