"""Rows of numbers with class numbers or values, and how their features are standardized."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .described import Described

_BLOCK = 65536  # rows that are in memory in float64 together


@dataclass(frozen=True, eq=False, repr=False)
class Table(Described):
    """Inputs and targets of one split of a data set, all in memory.

    Attributes:
        x: [N, features], floating point, or uint8 pixels.
        y: int64 [N], values in [0, len(classes)), or floating-point values [N, outputs].
        name: of the data set.
        split: "train", "validation" or "test".
        origin: where the data was read from; for people.
        classes: the class names; None where y has values.
        shape: of one row before it was flattened.
        sample_weight: [N] floating point, the weight of each row in the training; None: all rows count alike.
    """

    x: Tensor
    y: Tensor
    name: str
    split: str
    origin: str
    classes: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None
    sample_weight: Tensor | None = None

    def __len__(self) -> int:
        return self.y.shape[0]

    def __repr__(self) -> str:
        return f"Table({self.source}, device={self.x.device})"

    def rows(self, rows: Tensor, split: str) -> Table:
        """A copy of some rows, under another name of the split."""
        rows = rows.to(self.x.device)
        weight = None if self.sample_weight is None else self.sample_weight[rows]
        return dataclasses.replace(self, x=self.x[rows], y=self.y[rows], split=split, sample_weight=weight)

    def to(self, device: torch.device | str) -> Table:
        """The same data on ``device``; a tensor that is already there is shared, not copied."""
        weight = None if self.sample_weight is None else self.sample_weight.to(device)
        return dataclasses.replace(self, x=self.x.to(device), y=self.y.to(device), sample_weight=weight)


@dataclass(frozen=True, eq=False)
class Standardization:
    """(x - mean) / std for each feature, computed in float64.

    Attributes:
        mean, std: float64 [features] on the CPU. A feature that is constant has std 1.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Standardization:
        """Mean and standard deviation (of the population) of the rows of x [N, features], finite numbers, N >= 1."""
        # A power of 2 for each feature: float64 has no squares of 1e200 and 1e-200, and this division does not round.
        power = torch.frexp(x.abs().amax(0).double()).exponent - 1
        unit = torch.ldexp(torch.ones_like(power, dtype=torch.float64), power)
        blocks = x.split(_BLOCK)
        mean = sum((block.double() / unit).sum(0) for block in blocks) / len(x)
        squares = sum(((block.double() / unit - mean) ** 2).sum(0) for block in blocks)
        mean, std = mean * unit, (squares / len(x)).sqrt() * unit
        # The mean of equal numbers is rounded, so their deviation is not exactly 0.
        constant = std <= 1e-12 * mean.abs()
        return cls(mean.cpu(), torch.where(constant, 1.0, std).cpu())

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The standardized rows of x [N, features] in ``dtype``."""
        mean, std = self.mean.to(x.device), self.std.to(x.device)
        result = torch.empty(x.shape, dtype=dtype, device=x.device)
        for block, to in zip(x.split(_BLOCK), result.split(_BLOCK), strict=True):
            to.copy_((block.double() - mean) / std)
        return result

    def as_dict(self) -> dict[str, list[float]]:
        """Plain numbers, for the configuration of a checkpoint."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, values: Any, features: int) -> Standardization:
        """What ``as_dict`` returned; ValueError for anything else."""
        found: list[Any] = [values.get(name) for name in ("mean", "std")] if isinstance(values, Mapping) else []
        for numbers in found:
            if not (isinstance(numbers, list) and len(numbers) == features and all(map(_is_finite, numbers))):
                found = []
        if not found or min(found[1]) <= 0:
            raise ValueError(f"expected mean and std as {features} finite numbers each, std above 0")
        return cls(*(torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in found))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
