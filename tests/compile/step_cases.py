"""Kernels that only the training step launches: the head, and the weight gradients of all layers with their update."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastmlp.kernels import head
from fastmlp.kernels.configs import Tile, all_tiles
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.optimizer import HYPER_COLUMNS

from .cases import KernelCases

__all__ = ["KERNELS"]

wgrad_update = importlib.import_module("fastmlp.kernels.wgrad_update")  # the module, whatever the package exports

Launcher = Callable[[torch.dtype, Any], object]


class Head(NamedTuple):
    """A last layer. Its rows decide whether programs share rows; its classes decide about the padding."""

    rows: int
    classes: int
    inputs: int = 512


HEADS = (Head(64, 2), Head(64, 10), Head(16384, 10), Head(64, 50), Head(16384, 64))


def _head(activation: str, *, odd: bool = False, pixels: bool = False, **options: Any) -> Launcher:
    def launch(dtype: torch.dtype, shape: Head) -> object:
        inputs = shape.inputs + 5 if odd else shape.inputs
        h = torch.zeros((shape.rows, inputs), dtype=torch.uint8 if pixels else dtype)
        w, b = torch.zeros((shape.classes, inputs), dtype=dtype), torch.zeros(shape.classes, dtype=dtype)
        labels = torch.zeros(shape.rows, dtype=torch.int64)
        saved = None if pixels or activation == "identity" else torch.zeros((shape.rows, inputs), dtype=dtype)
        if pixels:
            options.update(rows=torch.zeros(shape.rows, dtype=torch.int64), gather_h=True, want_dz_prev=False)
        weight = torch.zeros(shape.classes) if options.get("smoothing") else None
        correct = torch.zeros(shape.rows, dtype=torch.int32)
        return head(
            h, w, b, labels, activation=activation, saved=saved, class_weight=weight, correct=correct, **options
        )

    return launch


# 784-512-512-10 with every dimension of the hidden layers a multiple of every tile's.
WIDTHS = (784, 512, 512, 10)


def _states(layout: Layout, optimizer: str) -> list[torch.Tensor]:
    return [torch.zeros(layout.total) for _ in range({"nesterov": 1, "adamw": 2}.get(optimizer, 0))]


def _layout(dtype: torch.dtype, widths: tuple[int, ...], params: bool) -> Any:
    low = dtype if dtype.itemsize == 2 else None
    layers = []
    for inputs, outputs in pairwise(widths):
        weight, bias = torch.zeros((outputs, inputs)), torch.zeros(outputs)
        copies = (weight.to(low), bias.to(low)) if low else (None, None)
        layers.append(Layer(weight, bias, *copies))
    return Layout(layers, low_is_param=params)


def _update(
    optimizer: str, *, batch: int = 64, widths: tuple[int, ...] = WIDTHS, pixels: bool = False, unscale: bool = False,
    params: bool = False,
) -> Launcher:  # fmt: skip
    def launch(dtype: torch.dtype, tile: Tile) -> object:
        layout = _layout(dtype, widths, params)
        dzs = [torch.zeros((batch, n), dtype=dtype) for n in widths[1:]]
        xs = [torch.zeros((batch, n), dtype=dtype) for n in widths[:-1]]
        rows = None
        if pixels:
            xs[0] = torch.zeros((batch, widths[0]), dtype=torch.uint8)
            rows = torch.zeros(batch, dtype=torch.int64)
        return wgrad_update.wgrad_update(
            layout, dzs, xs, optimizer, torch.zeros(HYPER_COLUMNS),
            states=_states(layout, optimizer),
            rows=rows, unscale=torch.zeros(()) if unscale else None,
            loss_rows=torch.zeros(batch), loss=torch.zeros(()),
            grads=torch.zeros(layout.total) if optimizer == "none" else None,
        )  # fmt: skip

    return launch


@contextmanager
def _force(tile: Tile) -> Iterator[None]:
    with mock.patch.object(wgrad_update, "gemm_tile", return_value=tile):
        yield


def _reduce(optimizer: str, *, unscale: bool = False, accumulate: bool = False, params: bool = False) -> Launcher:
    def launch(dtype: torch.dtype, tile: None) -> object:
        layout = _layout(dtype, WIDTHS, params)
        flat = torch.zeros((2, layout.total))
        return wgrad_update.reduce_update(
            layout, flat[:1], 1, optimizer, torch.zeros(HYPER_COLUMNS),
            states=_states(layout, optimizer), unscale=torch.zeros(()) if unscale else None,
            grads=flat[1] if optimizer == "none" else None, accumulate=accumulate,
        )  # fmt: skip

    return launch


KERNELS = {
    "head": KernelCases(
        ("_head_kernel",),
        tiles=lambda dtype, device, variant: HEADS,
        variants={
            "sigmoid": _head("sigmoid"),
            "gelu-smoothing": _head("gelu", smoothing=0.1),
            "odd-tanh": _head("tanh", odd=True),
            "pixels-gather": _head("identity", pixels=True),
        },
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: not variant.startswith("odd"),
        gemm=("_head_kernel",),
    ),
    "wgrad_update": KernelCases(
        ("_wgrad_update_kernel", "_reduce_update_kernel"),
        tiles=lambda dtype, device, variant: tuple(all_tiles("update", dtype, device, wide=False)),
        variants={
            "sgd": _update("sgd"),
            "momentum-pixels-gather": _update("nesterov", pixels=True),
            "adamw-unscale": _update("adamw", unscale=True, params=True),
            "split-adamw": _update("adamw", batch=4096),
            "none-odd": _update("none", batch=77, widths=(77, 33, 10)),
        },
        force=_force,
        aligned=lambda variant, dtype, tile: False,  # its last layer has 10 outputs, and all layers share the code
        gemm=("_wgrad_update_kernel",),
    ),
    "reduce_update": KernelCases(
        ("_reduce_update_kernel",),
        tiles=lambda dtype, device, variant: (None,),
        variants={
            "sgd": _reduce("sgd"),
            "adamw-unscale": _reduce("adamw", unscale=True, params=True),
            "none-accumulate": _reduce("none", accumulate=True),
        },
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: False,  # W and b of each layer, b of any length, share the code
    ),
}
