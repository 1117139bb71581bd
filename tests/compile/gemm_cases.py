"""The matrix products: linear_fwd, linear_dgrad, linear_wgrad."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastmlp.kernels import Dropout, linear_dgrad, linear_fwd, linear_wgrad
from fastmlp.kernels.configs import Tile, all_tiles
from fastmlp.kernels.device import Device

from .cases import KernelCases

__all__ = ["KERNELS"]

# Every dimension is a multiple of every tile's. The dimensions are so large that wgrad splits BATCH, not SHORT_BATCH.
BATCH, SHORT_BATCH, IN, OUT = 512, 256, 1024, 512
DROPOUT = Dropout(torch.zeros(2, dtype=torch.int64), 0, 0.1)


Launcher = Callable[[torch.dtype, Tile], object]


def _values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _pixels(rows: int, cols: int) -> Tensor:
    return torch.zeros((rows, cols), dtype=torch.uint8)


def _fwd(
    activation: str, *, k: int = IN, bias: bool = True, pixels: bool = False, gather: bool = False,
    columns: bool = False, save_z: bool = False, drops: bool = False,
) -> Launcher:  # fmt: skip
    def launch(dtype: torch.dtype, tile: Tile) -> object:
        x = _pixels(BATCH, k) if pixels else _values(BATCH, k, dtype=dtype)
        w = _values(OUT, k, dtype=dtype)
        if columns:
            x, w = _values(k, BATCH, dtype=dtype).t(), _values(k, OUT, dtype=dtype).t()
        rows = torch.zeros(BATCH, dtype=torch.int64) if gather else None
        b = _values(OUT, dtype=dtype) if bias else None
        return linear_fwd(x, w, b, activation, save_z=save_z, rows=rows, dropout=DROPOUT if drops else None)

    return launch


def _dgrad(activation: str, *, n: int = OUT, columns: bool = False, drops: bool = False) -> Launcher:
    def launch(dtype: torch.dtype, tile: Tile) -> object:
        dz, w = _values(BATCH, n, dtype=dtype), _values(n, IN, dtype=dtype)
        if columns:
            dz, w = _values(n, BATCH, dtype=dtype).t(), _values(IN, n, dtype=dtype).t()
        saved = None if activation in ("identity", "step") else _values(BATCH, IN, dtype=dtype)
        return linear_dgrad(dz, w, saved, activation, dropout=DROPOUT if drops else None)

    return launch


def _wgrad(
    *, m: int = BATCH, n: int = OUT, k: int = IN, bias: bool = True, pixels: bool = False, gather: bool = False,
    columns: bool = False,
) -> Launcher:  # fmt: skip
    def launch(dtype: torch.dtype, tile: Tile) -> object:
        dz = _values(m, n, dtype=dtype)
        x = _pixels(m, k) if pixels else _values(m, k, dtype=dtype)
        if columns:
            dz, x = _values(n, m, dtype=dtype).t(), _values(k, m, dtype=dtype).t()
        return linear_wgrad(dz, x, bias=bias, rows=torch.zeros(m, dtype=torch.int64) if gather else None)

    return launch


def _tiles(kind: str) -> Callable[[torch.dtype, Device, str], Sequence[Tile]]:
    def tiles(dtype: torch.dtype, device: Device, variant: str) -> Sequence[Tile]:
        pixels = kind == "wgrad" and "pixels" in variant
        return tuple(all_tiles(kind, dtype, device, wide=_wide(variant), pixels=pixels))

    return tiles


def _force(stem: str) -> Callable[[Tile], AbstractContextManager[None]]:
    @contextmanager
    def force(tile: Tile) -> Iterator[None]:
        def chosen(
            kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, device: Device, *, wide: bool,
            members: int = 1, pixels: bool = False,
        ) -> Tile:  # fmt: skip
            tiles = all_tiles(kind, dtype, device, wide=wide, pixels=pixels)
            assert tile in tiles, f"configs never choose {tile} where wide={wide}"
            return tile

        with mock.patch.object(importlib.import_module(f"fastmlp.kernels.{stem}"), "gemm_tile", chosen):
            yield

    return force


def _gemm(kind: str, kernels: tuple[str, ...], variants: dict[str, Launcher]) -> KernelCases:
    return KernelCases(kernels, _tiles(kind), variants, _force(f"linear_{kind}"), _aligned, gemm=kernels[:1])


def _wide(variant: str) -> bool:
    return not {"odd", "n10"} & set(variant.split("-"))


def _aligned(variant: str, dtype: torch.dtype, tile: Tile) -> bool:
    return _wide(variant) and "columns" not in variant.split("-")


# A variant's name has the activation. k784 is FashionMNIST's input, aligned to 16 but no multiple of a depth of 32.
# "odd" operands are aligned to one element, and so are rows of 10 (n10). "columns" operands have their first dimension
# contiguous.
KERNELS = {
    "linear_fwd": _gemm(
        "fwd",
        ("_linear_fwd_kernel",),
        {
            "sigmoid": _fwd("sigmoid"),
            "k784-relu": _fwd("relu", k=784),
            "odd-gelu-z": _fwd("gelu", k=77, save_z=True),
            "k784-pixels-gather-tanh": _fwd("tanh", k=784, pixels=True, gather=True),
            "pixels-step": _fwd("step", pixels=True),
            "columns-identity-nobias": _fwd("identity", columns=True, bias=False),
            "gather-silu-z": _fwd("silu", gather=True, save_z=True),
            "odd-pixels-leaky_relu-nobias": _fwd("leaky_relu", k=783, pixels=True, bias=False),
            "sigmoid-dropout": _fwd("sigmoid", drops=True),
            "k784-pixels-gather-gelu-z-dropout": _fwd("gelu", k=784, pixels=True, gather=True, save_z=True, drops=True),
        },
    ),
    "linear_dgrad": _gemm(
        "dgrad",
        ("_linear_dgrad_kernel",),
        {
            "sigmoid": _dgrad("sigmoid"),
            "n10-relu": _dgrad("relu", n=10),
            "odd-gelu": _dgrad("gelu", n=77),
            "identity": _dgrad("identity"),
            "columns-tanh": _dgrad("tanh", columns=True),
            "n48-silu": _dgrad("silu", n=48),
            "leaky_relu": _dgrad("leaky_relu"),
            "step": _dgrad("step"),
            "sigmoid-dropout": _dgrad("sigmoid", drops=True),
            "n10-gelu-dropout": _dgrad("gelu", n=10, drops=True),
        },
    ),
    "linear_wgrad": _gemm(
        "wgrad",
        ("_linear_wgrad_kernel", "_wgrad_reduce_kernel"),
        {
            "whole": _wgrad(m=SHORT_BATCH),
            "split": _wgrad(),
            "odd": _wgrad(m=77, n=77, k=77),
            "split-k784-pixels-gather": _wgrad(k=784, pixels=True, gather=True),
            "pixels-nobias": _wgrad(m=SHORT_BATCH, pixels=True, bias=False),
            "n10-gather": _wgrad(m=SHORT_BATCH, n=10, gather=True),
            "columns": _wgrad(m=SHORT_BATCH, columns=True),
            "split-odd-nobias": _wgrad(m=777, k=77, bias=False),
        },
    ),
}
