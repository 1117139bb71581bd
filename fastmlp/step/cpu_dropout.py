"""Dropout in a training step on plain torch: the masks of a batch size, in buffers allocated once.

The output of a layer stays as it is, because its derivative is computed from it. What goes on is a second buffer, A_out
= A * keep / (1 - p), and the backward pass multiplies dA_out by the same factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cpu
from ..base.dropout import Dropout
from ..ops.dropout import kept


class StepDropout(NamedTuple):
    """What an engine drops.

    Attributes:
        state: int64 [2] on the model's device, (seed, step); the engine adds 1 to the step after each pass.
        rates: the probability of each hidden layer, 0 for those without.
        stream: the rank under data parallelism, else 0.
    """

    state: Tensor
    rates: tuple[float, ...]
    stream: int = 0


#: (first row, number of rows) of rows that lie side by side among the rows of all members.
Run = tuple[int, int]


class Mask:
    """One layer's mask.

    Args:
        out: a buffer for A_out, [M, N] or [e, M, N].
        runs: which rows of a layer's output, with all members below each other, the rows of ``out`` are.
        total: the number of all these rows.
    """

    def __init__(self, d: StepDropout, layer: int, out: Tensor, runs: Sequence[Run], total: int) -> None:
        self._d, self._layer, self._p, self._out = d, layer, d.rates[layer], out
        self._runs, self._total = runs, total
        rows = out.view(-1, out.shape[-1])
        self._factors = self._keep = torch.empty(0, device="cpu")
        self._arrays = None
        if out.device.type == "cpu" and out.dtype.itemsize >= 4:
            self._factors = torch.empty_like(out)
            parts = self._factors.view_as(rows).split([count for _, count in runs])
            self._arrays = [part.numpy() for part in parts]

    def forward(self, a: Tensor, numbers: tuple[int, int]) -> Tensor:
        """A_out in the buffer; ``numbers`` are the values of the state on a CPU."""
        d = self._d
        if self._arrays is not None:
            for (first, _), array in zip(self._runs, self._arrays, strict=True):
                cpu.dropout_factors(*numbers, self._layer, self._p, d.stream, array, first)
            return torch.mul(a, self._factors, out=self._out)
        n = self._out.shape[-1]
        whole = kept(Dropout(d.state, self._layer, self._p, d.stream), (self._total, n)).keep
        assert whole is not None
        self._keep = torch.cat([whole[first : first + count] for first, count in self._runs]).view(self._out.shape)
        # 1 / (1 - p) rounded to 16 bits would be an error of every element.
        return torch.mul(a, self._keep, out=self._out).mul_(1 / (1 - self._p))

    def backward(self, da: Tensor) -> None:
        """DA from dA_out, in place."""
        if self._arrays is not None:
            da.mul_(self._factors)
        else:
            da.mul_(self._keep).mul_(1 / (1 - self._p))


def masks(
    d: StepDropout, shapes: Sequence[Sequence[int]], like: Tensor, runs: Sequence[Run], total: int
) -> list[Mask | None]:
    """One for each layer that drops, None for the others; the shapes are those of the layers' outputs."""
    rates = (*d.rates, 0.0)
    return [
        Mask(d, i, like.new_empty(shape), runs, total) if p else None
        for i, (shape, p) in enumerate(zip(shapes, rates, strict=True))
    ]


def numbers(d: StepDropout) -> tuple[int, int]:
    """(seed, step) on a CPU; elsewhere zeros, because reading would wait for the device."""
    if d.state.device.type != "cpu":
        return 0, 0
    seed, step = d.state.tolist()
    return seed, step


def advance(d: StepDropout, passes: int = 1) -> None:
    """Go on to the next pass, or past so many of them."""
    d.state.select(0, 1).add_(passes)
