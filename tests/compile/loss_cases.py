"""Losses other than cross-entropy: elementwise ones, and squared error on softmax probabilities."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from fastmlp import kernels
from fastmlp.reference import ELEMENTWISE_LOSSES

from .cases import KernelCases

__all__ = ["KERNELS"]

#: The variants whose operands are column-major.
COLUMNS = ("l1", "nllm-columns")
#: The variants whose rows have weights.
WEIGHTED = ("weighted-huber", "weighted-pos_weight", "weighted-long")
Launcher = Callable[[torch.dtype, Any], object]


class Logits(NamedTuple):
    """Shape of the logits of a softmax, with few classes, many classes, or more classes than registers hold."""

    rows: int
    classes: int


SHAPES = (Logits(64, 10), Logits(64, 100), Logits(64, 1000), Logits(16, 8192), Logits(16, 50264))


def _matrix(rows: int, cols: int, dtype: torch.dtype, columns: bool = False) -> torch.Tensor:
    return torch.zeros((cols, rows), dtype=dtype).t() if columns else torch.zeros((rows, cols), dtype=dtype)


def _elementwise(launch: Callable[..., object], loss: str, *, columns: bool = False, **options: Any) -> Launcher:
    def run(dtype: torch.dtype, tile: None) -> object:
        a, y = (_matrix(64, 512, dtype, columns) for _ in range(2))
        upstream = [torch.zeros((64, 512), dtype=dtype)] if launch is kernels.elementwise_loss_bwd else []
        return launch(*upstream, a, y, loss, **options)

    return run


def _weighted(loss: str, *, pos_weight: bool = False, rows: int = 64) -> Launcher:
    """Sample weights, the weight of the batch, and weights of outputs."""

    def run(dtype: torch.dtype, tile: None) -> object:
        a, y = (_matrix(rows, 512, dtype) for _ in range(2))
        return kernels.elementwise_loss(
            a, y, loss, sample_weight=torch.zeros(rows), divisor=torch.zeros(()),
            pos_weight=torch.zeros(512) if pos_weight else None,
        )  # fmt: skip

    return run


def _elementwise_cases(variants: dict[str, Launcher]) -> KernelCases:
    return KernelCases(
        ("_elementwise_loss_kernel", "_reduce_sum_kernel", "_total_weight_kernel"),
        tiles=lambda dtype, device, variant: (None,),
        variants=variants,
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: variant not in (*COLUMNS, *WEIGHTED),
    )


def _softmax(launch: Callable[..., object], *, labels: bool, weighted: bool = False, **options: Any) -> Launcher:
    def run(dtype: torch.dtype, shape: Logits) -> object:
        if weighted:
            options.update(sample_weight=torch.zeros(shape.rows), divisor=torch.zeros(()))
        target = torch.zeros(shape.rows, dtype=torch.int64) if labels else torch.zeros(shape, dtype=dtype)
        upstream = [torch.zeros(shape.rows)] if launch is kernels.softmax_squared_error_bwd else []
        return launch(*upstream, torch.zeros(shape, dtype=dtype), target, **options)

    return run


def _softmax_cases(variants: dict[str, Launcher], shapes: tuple[Logits, ...]) -> KernelCases:
    return KernelCases(
        ("_softmax_squared_error_kernel", "_reduce_sum_kernel", "_total_weight_kernel"),
        tiles=lambda dtype, device, variant: shapes,
        variants=variants,
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: tile.classes * dtype.itemsize % 16 == 0 and "weighted" not in variant,
    )


KERNELS = {
    "elementwise_loss": _elementwise_cases(
        {f: _elementwise(kernels.elementwise_loss, f, columns=f in COLUMNS) for f in ELEMENTWISE_LOSSES}
        | {
            WEIGHTED[0]: _weighted("huber"),
            WEIGHTED[1]: _weighted("bce_with_logits", pos_weight=True),
            WEIGHTED[2]: _weighted("mse", rows=4096),
        }
    ),
    "elementwise_loss_fwd": _elementwise_cases(
        {
            "binary_cross_entropy-mean": _elementwise(kernels.elementwise_loss_fwd, "binary_cross_entropy", scale=0.5),
            "bce_with_logits": _elementwise(kernels.elementwise_loss_fwd, "bce_with_logits"),
        }
    ),
    "elementwise_loss_bwd": _elementwise_cases(
        {
            "binary_cross_entropy": _elementwise(kernels.elementwise_loss_bwd, "binary_cross_entropy", want_dy=True),
            "nllm-columns": _elementwise(kernels.elementwise_loss_bwd, "nllm", columns=True, want_dy=False),
        }
    ),
    "softmax_squared_error": _softmax_cases(
        {
            "labels": _softmax(kernels.softmax_squared_error, labels=True),
            "values": _softmax(kernels.softmax_squared_error, labels=False),
            "labels-weighted": _softmax(kernels.softmax_squared_error, labels=True, weighted=True),
        },
        SHAPES,
    ),
    "softmax_squared_error_fwd": _softmax_cases(
        {
            "labels-mean": _softmax(kernels.softmax_squared_error_fwd, labels=True, scale=0.5),
            "values": _softmax(kernels.softmax_squared_error_fwd, labels=False),
        },
        SHAPES[1::2],
    ),
    "softmax_squared_error_bwd": _softmax_cases(
        {
            "labels": _softmax(kernels.softmax_squared_error_bwd, labels=True),
            "values-dy": _softmax(kernels.softmax_squared_error_bwd, labels=False, want_dy=True),
        },
        SHAPES[::2],
    ),
}
