"""Kernels that only the training step launches: the head, and the weight gradients of all layers with their update."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastmlp.kernels import Dropout, head
from fastmlp.kernels.before_update import LossScaleState, before_update
from fastmlp.kernels.column_sums import ColumnSums
from fastmlp.kernels.configs import LARGEST_UPDATED, Tile, all_tiles
from fastmlp.kernels.device import Device
from fastmlp.kernels.layout import SEGMENT, Layer, Layout
from fastmlp.kernels.optimizer import EMA_COLUMNS, HYPER_COLUMNS
from fastmlp.kernels.reduce_update import reduce_update

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


def _head(
    activation: str, *, odd: bool = False, pixels: bool = False, weighted: bool = False, probabilities: bool = False,
    drops: bool = False, **options: Any,
) -> Launcher:  # fmt: skip
    def launch(dtype: torch.dtype, shape: Head) -> object:
        inputs = shape.inputs + 5 if odd else shape.inputs
        h = torch.zeros((shape.rows, inputs), dtype=torch.uint8 if pixels else dtype)
        w, b = torch.zeros((shape.classes, inputs), dtype=dtype), torch.zeros(shape.classes, dtype=dtype)
        labels = torch.zeros(shape.rows, dtype=torch.int64)
        if probabilities:
            labels = torch.zeros((shape.rows, shape.classes), dtype=dtype)
        saved = None if pixels or activation == "identity" else torch.zeros((shape.rows, inputs), dtype=dtype)
        if pixels:
            options.update(rows=torch.zeros(shape.rows, dtype=torch.int64), gather_h=True, want_dz_prev=False)
        if weighted:
            options.update(sample_weight=torch.zeros(shape.rows), divisor=torch.zeros(()))
        if drops:
            options.update(dropout=Dropout(torch.zeros(2, dtype=torch.int64), 1, 0.1))
        weight = torch.zeros(shape.classes) if options.get("smoothing") else None
        correct = torch.zeros(shape.rows, dtype=torch.int32)
        return head(
            h, w, b, labels, activation=activation, saved=saved, class_weight=weight, correct=correct, **options
        )

    return launch


# The rows of wide operands can be loaded 16 bytes at a time, and so can those of the biases.
WIDTHS, NARROW = (784, 512, 512, 16), (784, 512, 512, 10)


def _states(layout: Layout, optimizer: str) -> list[torch.Tensor]:
    rule, *options = optimizer.split()
    count = {"sgd": 0, "none": 0, "adam": 2, "adamw": 2}.get(rule, 1)
    count += len({"amsgrad", "centered", "momentum", "ema"}.intersection(options))
    return [torch.zeros(layout.total) for _ in range(count)]


def _layout(dtype: torch.dtype, widths: tuple[int, ...], params: bool, groups: bool = False) -> Any:
    low = dtype if dtype.itemsize == 2 else None
    layers = []
    for inputs, outputs in pairwise(widths):
        weight, bias = torch.zeros((outputs, inputs)), torch.zeros(outputs)
        copies = (weight.to(low), bias.to(low)) if low else (None, None)
        layers.append(Layer(weight, bias, *copies))
    settings = [HYPER_COLUMNS * (i % 2) for i in range(2 * len(layers))] if groups else None
    return Layout(layers, low_is_param=params, settings=settings)


def _update(
    optimizer: str, *, batch: int = 64, widths: tuple[int, ...] = WIDTHS, pixels: bool = False, params: bool = False,
    overflow: bool = False, summed: bool = True, groups: bool = False, drops: bool = False,
) -> Launcher:  # fmt: skip
    def launch(dtype: torch.dtype, tile: Tile) -> object:
        layout = _layout(dtype, widths, params, groups)
        dzs = [torch.zeros((batch, n), dtype=dtype) for n in widths[1:]]
        sums = [ColumnSums(batch, n, torch.device("cpu")) for n in widths[1:]] if summed else []
        for of in sums:
            of.written(4)
        xs = [torch.zeros((batch, n), dtype=dtype) for n in widths[:-1]]
        rows = None
        if pixels:
            xs[0] = torch.zeros((batch, widths[0]), dtype=torch.uint8)
            rows = torch.zeros(batch, dtype=torch.int64)
        return wgrad_update.wgrad_update(
            layout, dzs, xs, optimizer, torch.zeros(HYPER_COLUMNS),
            states=_states(layout, optimizer),
            rows=rows,
            # Only float16 has a loss scale.
            overflow=torch.zeros((), dtype=torch.int32) if overflow and dtype == torch.float16 else None,
            loss_rows=torch.zeros(batch), loss=torch.zeros(()), divisor=torch.zeros(()) if overflow else None,
            grads=torch.zeros(layout.total) if optimizer == "none" and not overflow else None, sums=sums,
            dropout_state=torch.zeros(2, dtype=torch.int64) if drops else None,
        )  # fmt: skip

    return launch


def _update_tiles(dtype: torch.dtype, device: Device, variant: str) -> list[Tile]:
    """The largest tiles only where the batch is split."""
    tiles = all_tiles("update", dtype, device, wide="narrow" not in variant, pixels="pixels" in variant)
    return [tile for tile in tiles if "split" in variant or tile.rows * tile.cols <= LARGEST_UPDATED]


@contextmanager
def _force(tile: Tile) -> Iterator[None]:
    with mock.patch.object(wgrad_update, "gemm_tile", return_value=tile):
        yield


def _reduce(
    optimizer: str, *, unscale: bool = False, accumulate: bool = False, params: bool = False, outputs: bool = False,
    groups: bool = False,
) -> Launcher:  # fmt: skip
    def launch(dtype: torch.dtype, tile: None) -> object:
        layout = _layout(dtype, WIDTHS, params, groups)
        flat, squares = torch.zeros((2, layout.total)), torch.zeros(layout.total // SEGMENT)
        flag = torch.zeros((), dtype=torch.int32)
        return reduce_update(
            layout, flat[:1], 1, optimizer, torch.zeros(HYPER_COLUMNS),
            states=_states(layout, optimizer), unscale=torch.zeros(()) if unscale else None,
            grads=flat[1] if optimizer == "none" else None, accumulate=accumulate,
            squares=squares if outputs else None, overflow=flag if outputs else None, skip=flag if unscale else None,
        )  # fmt: skip

    return launch


def _before(optimizer: str, *, clips: bool, scales: bool, rows: tuple[int, ...] = ()) -> Launcher:
    def launch(dtype: torch.dtype, tile: None) -> object:
        number, integer = torch.zeros(()), torch.zeros((), dtype=torch.int32)
        counts, row = scales and optimizer != "sgd", (*rows, EMA_COLUMNS if "ema" in optimizer else HYPER_COLUMNS)
        return before_update(
            optimizer, torch.zeros(row), number, squares=torch.zeros(656) if clips else None,
            loss_scale=LossScaleState(number, number, *[integer] * 3, 2000, 2.0, 0.5, 1.0) if scales else None,
            scaled=scales and not clips, count=integer if counts else None,
            decays=torch.zeros(2, dtype=torch.float64) if counts else None,
            counted_row=torch.zeros(row) if counts else None,
        )  # fmt: skip

    return launch


KERNELS = {
    "head": KernelCases(
        ("_head_kernel", "_total_weight_kernel"),
        tiles=lambda dtype, device, variant: HEADS,
        variants={
            "sigmoid": _head("sigmoid"),
            "gelu-smoothing": _head("gelu", smoothing=0.1),
            "odd-tanh": _head("tanh", odd=True),
            "pixels-gather": _head("identity", pixels=True),
            "relu-weighted-smoothing": _head("relu", weighted=True, smoothing=0.1),
            "sigmoid-weighted-probabilities": _head("sigmoid", weighted=True, probabilities=True),
            "sigmoid-dropout": _head("sigmoid", drops=True),
            "odd-gelu-dropout": _head("gelu", odd=True, drops=True),
            "pixels-gather-weighted": _head("identity", pixels=True, weighted=True),
        },
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: not variant.startswith("odd") and "weighted" not in variant,
        gemm=("_head_kernel",),
    ),
    "wgrad_update": KernelCases(
        ("_wgrad_update_kernel", "_reduce_update_kernel"),
        tiles=_update_tiles,
        variants={
            "sgd": _update("sgd"),
            "momentum-pixels-gather": _update("nesterov", pixels=True),
            "adamw-params": _update("adamw", params=True),
            "split-adamw": _update("adamw", batch=4096),
            "split-pixels-gather": _update("sgd", batch=4096, pixels=True),
            "narrow-adamw-pixels": _update("adamw", widths=NARROW, pixels=True, summed=False),
            "rmsprop-params": _update("rmsprop centered momentum maximize ema", params=True),
            "narrow-lion": _update("lion ema", widths=NARROW, summed=False, groups=True),
            "none-overflow": _update("none", overflow=True),
            "momentum-dropout": _update("momentum", drops=True),
            "narrow-none-odd": _update("none", batch=77, widths=(77, 33, 10)),
        },
        force=_force,
        aligned=lambda variant, dtype, tile: "narrow" not in variant,
        gemm=("_wgrad_update_kernel",),
    ),
    "reduce_update": KernelCases(
        ("_reduce_update_kernel",),
        tiles=lambda dtype, device, variant: (None,),
        variants={
            "sgd": _reduce("sgd"),
            "adamw-unscale": _reduce("adamw", unscale=True, params=True),
            "amsgrad": _reduce("adam amsgrad ema", unscale=True, groups=True),
            "none-accumulate": _reduce("none", accumulate=True),
            "none-outputs": _reduce("none", unscale=True, outputs=True),
        },
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: False,  # W and b of each layer, b of any length, share the code
    ),
    "before_update": KernelCases(
        ("_before_update_kernel",),
        tiles=lambda dtype, device, variant: (None,),
        variants={
            "clip": _before("sgd", clips=True, scales=False),
            "scale": _before("sgd", clips=False, scales=True),
            "clip-scale-adamw": _before("adamw", clips=True, scales=True),
            "scale-adam-groups": _before("adam ema", clips=False, scales=True, rows=(3,)),
        },
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: True,
    ),
}
