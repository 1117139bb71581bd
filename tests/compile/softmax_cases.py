"""Softmax cross-entropy: the tile follows from the shape of the logits, so the cases are shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmlp.kernels import cross_entropy, cross_entropy_bwd, cross_entropy_fwd, cross_entropy_of_members

from .cases import KernelCases

__all__ = ["KERNELS", "Logits"]


class Logits(NamedTuple):
    """Shape of the logits: [rows, classes], or [rows / 16, classes, 16] where classes are not contiguous."""

    rows: int
    classes: int
    contiguous: int = 1

    def make(self, dtype: torch.dtype) -> Tensor:
        if self.contiguous:
            return torch.zeros((self.rows, self.classes), dtype=dtype)
        return torch.zeros((self.rows // 16, self.classes, 16), dtype=dtype)

    def labels(self) -> Tensor:
        return torch.zeros(self.rows if self.contiguous else (self.rows // 16, 16), dtype=torch.int64)


# Launches of few rows have one warp per program, launches of many rows have four. A row of 16,384 classes is the
# longest that stays in registers.
ONE_PASS = (
    Logits(64, 2), Logits(64, 10), Logits(65536, 10), Logits(4096, 100), Logits(64, 256), Logits(64, 1000),
    Logits(64, 4096), Logits(64, 16384), Logits(16, 50257), Logits(16, 131072), Logits(64, 10, 0), Logits(64, 100, 0),
)  # fmt: skip
FORWARD = (
    Logits(64, 10), Logits(4096, 10), Logits(4096, 100), Logits(64, 1000), Logits(64, 16384), Logits(16, 131072),
    Logits(64, 100, 0),
)  # fmt: skip
BACKWARD = (Logits(64, 2), Logits(64, 10), Logits(64, 100), Logits(64, 1000), Logits(16, 50257), Logits(64, 100, 0))

Launcher = Callable[[torch.dtype, Logits], object]


def _target(shape: Logits, dtype: torch.dtype, probabilities: bool) -> Tensor:
    return shape.make(dtype) if probabilities else shape.labels()


def _members(*, probabilities: bool = False, weighted: bool = False, **options: Any) -> Launcher:
    """Three members, one of which may pause, with a factor each, and of gathered rows the weight of each batch."""

    def launch(dtype: torch.dtype, shape: Logits) -> object:
        logits, target = (of.expand(3, -1, -1).contiguous() for of in (shape.make(dtype), shape.make(dtype)))
        if not probabilities:
            target = torch.zeros(3, shape.rows, dtype=torch.int64)
        if weighted:
            rows = torch.zeros(3, shape.rows, dtype=torch.int64)
            weights = {"weight": torch.zeros(shape.classes), "sample_weight": torch.zeros(3, shape.rows)}
            options.update(rows=rows, divisor=torch.zeros(3), **weights)
        active = torch.zeros(3, dtype=torch.bool)
        return cross_entropy_of_members(logits, target, factor=torch.zeros(3), active=active, **options)

    return launch


def _one_pass(*, probabilities: bool = False, weight: bool = False, **options: Any) -> Launcher:
    def launch(dtype: torch.dtype, shape: Logits) -> object:
        weights = torch.zeros(shape.classes, dtype=dtype) if weight else None
        return cross_entropy(shape.make(dtype), _target(shape, dtype, probabilities), weight=weights, **options)

    return launch


def _training_step(dtype: torch.dtype, shape: Logits) -> object:
    """Every option that the training step uses: gathered uint8 labels, a scale on the device, correct predictions."""
    if not shape.contiguous:
        return cross_entropy(shape.make(dtype), shape.labels(), factor=torch.zeros(()))
    labels, rows = torch.zeros(shape.rows, dtype=torch.uint8), torch.zeros(shape.rows, dtype=torch.int64)
    correct = torch.zeros(shape.rows, dtype=torch.int32)
    return cross_entropy(shape.make(dtype), labels, rows=rows, factor=torch.zeros(()), correct=correct)


def _weighted(*, probabilities: bool = False, **options: Any) -> Launcher:
    """Sample weights of gathered rows, and the weight of the batch."""

    def launch(dtype: torch.dtype, shape: Logits) -> object:
        if not shape.contiguous:
            return cross_entropy(shape.make(dtype), _target(shape, dtype, probabilities))
        weights = {"weight": torch.zeros(shape.classes), "sample_weight": torch.zeros(shape.rows)}
        rows = torch.zeros(shape.rows, dtype=torch.int64)
        target = _target(shape, dtype, probabilities)
        return cross_entropy(shape.make(dtype), target, rows=rows, divisor=torch.zeros(()), **weights, **options)

    return launch


def _forward(*, probabilities: bool = False, weight: bool = False, **options: Any) -> Launcher:
    def launch(dtype: torch.dtype, shape: Logits) -> object:
        weights = torch.zeros(shape.classes, dtype=dtype) if weight else None
        return cross_entropy_fwd(shape.make(dtype), _target(shape, dtype, probabilities), weight=weights, **options)

    return launch


def _backward(*, probabilities: bool = False, weight: bool = False, mean: bool = True, **options: Any) -> Launcher:
    def launch(dtype: torch.dtype, shape: Logits) -> object:
        weights = torch.zeros(shape.classes, dtype=dtype) if weight else None
        dloss = torch.zeros((), dtype=dtype) if mean else torch.zeros(shape.labels().shape, dtype=dtype)
        return cross_entropy_bwd(
            dloss,
            shape.make(dtype),
            _target(shape, dtype, probabilities),
            torch.zeros((3, shape.rows)),
            weight=weights,
            denominator=torch.zeros(()) if mean else None,
            want_dt=probabilities,
            **options,
        )

    return launch


def _cases(kernels: tuple[str, ...], shapes: tuple[Logits, ...], variants: dict[str, Launcher]) -> KernelCases:
    return KernelCases(
        kernels,
        tiles=lambda dtype, device, variant: shapes,
        variants=variants,
        force=lambda tile: nullcontext(),
        aligned=lambda variant, dtype, tile: (
            bool(tile.contiguous) and tile.classes * dtype.itemsize % 16 == 0 and not variant.startswith("weighted")
        ),
    )


KERNELS = {
    "cross_entropy": _cases(
        ("_cross_entropy_kernel", "_total_weight_kernel"),
        ONE_PASS,
        {
            "labels": _one_pass(),
            "step": _training_step,
            "weight-smoothing": _one_pass(weight=True, smoothing=0.1),
            "probabilities-weight": _one_pass(probabilities=True, weight=True),
            "probabilities-smoothing": _one_pass(probabilities=True, smoothing=0.1),
            "weighted-smoothing": _weighted(smoothing=0.1),
            "weighted-probabilities": _weighted(probabilities=True),
        },
    ),
    "cross_entropy_fwd": _cases(
        ("_cross_entropy_kernel", "_reduce_kernel"),
        FORWARD,
        {
            "mean": _forward(),
            "none-smoothing": _forward(reduction="none", smoothing=0.1),
            "sum-weight": _forward(reduction="sum", weight=True),
            "mean-probabilities": _forward(probabilities=True),
        },
    ),
    "cross_entropy_bwd": _cases(
        ("_cross_entropy_bwd_kernel",),
        BACKWARD,
        {
            "mean": _backward(),
            "none-weight-smoothing": _backward(mean=False, weight=True, smoothing=0.1),
            "mean-probabilities-weight": _backward(probabilities=True, weight=True),
            "mean-weight": _backward(weight=True),
        },
    ),
    "cross_entropy_of_members": _cases(
        ("_cross_entropy_kernel", "_total_weight_kernel"),
        (Logits(64, 10), Logits(4096, 100), Logits(16, 50257)),
        {
            "labels": _members(),
            "weighted-smoothing": _members(weighted=True, smoothing=0.1),
            "weighted-probabilities": _members(weighted=True, probabilities=True),
        },
    ),
}
