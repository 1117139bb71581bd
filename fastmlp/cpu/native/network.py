"""A network as the compiled step sees it: two arrays of numbers, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import layout
from .machine_code import Units

#: Bytes of a block of rows of a weight, which stays in the first cache from its part of dX to its update.
_BLOCK_BYTES = 16_384
#: More than a vector has elements.
_PADDING = 16


class Parameter(NamedTuple):
    """A parameter and what belongs to it; ``data`` is None for a bias that a layer does not have."""

    data: Tensor | None
    trained: bool = False
    group: int = 0
    states: Sequence[Tensor] = ()
    gradient: Tensor | None = None
    average: Tensor | None = None

    def record(self) -> list[int]:
        """The numbers in ``layout``'s order."""
        states = [*map(_address, self.states), 0, 0, 0][:3]
        rest = [_address(self.gradient), _address(self.average)]
        return [_address(self.data), int(self.trained), self.group, *states, *rest]


class LayerParts(NamedTuple):
    """A layer's parameters, and the name of its activation; ``saves_z`` says whether f' needs Z."""

    weight: Parameter
    bias: Parameter
    activation: str
    saves_z: bool

    @property
    def units(self) -> tuple[str, ...]:
        """The units of f and f'."""
        if self.activation == "identity":
            return ()
        return f"activations.{self.activation}", f"activations.{self.activation}_grad"


class NativeNetwork:
    """A network with buffers for batches of up to ``m`` rows.

    Args:
        units: the machine code; what it lacks for this network is loaded or compiled.
        loss, rule: their names.
        lowest: the first layer with something to train.
        groups: number of param groups.
        count: 0-d float32, the number of updates, where ``counts``.
        clips: whether gradients are clipped; every trained parameter then has a place for its gradient.
        averages: whether there is a moving average.
        classes: whether targets are class numbers.
    """

    def __init__(
        self,
        units: Units,
        layers: Sequence[LayerParts],
        m: int,
        *,
        loss: str,
        rule: str,
        lowest: int,
        groups: int,
        count: Tensor,
        counts: bool,
        clips: bool,
        averages: bool,
        classes: bool,
    ) -> None:
        weights = [layer.weight.data for layer in layers]
        like = weights[0]
        assert like is not None
        sizes = [tuple(w.shape) for w in weights if w is not None]
        most_n, most_k = (max(of) for of in zip(*sizes, strict=True))
        padded = m + _PADDING
        blocks = [max(8, _BLOCK_BYTES // (k * like.element_size()) // 8 * 8) for _, k in sizes]
        largest = max(min(n, block) * k for (n, k), block in zip(sizes, blocks, strict=True))
        self._entry, self._m, self._layers, self._count, self._like = units.run, m, layers, count, like
        self._dtype, self._features, self._classes = like.dtype, sizes[0][1], classes
        of_da = m * max(most_n, most_k)
        #: In the order of ``layout.X`` to ``layout.DB``.
        scratch = m * sizes[0][1], most_k * padded, most_n * padded, of_da, of_da, largest, most_n
        self._buffers = [like.new_zeros(size) for size in scratch]
        head = [0] * layout.HEADER
        loss, rule = f"losses.{loss}", f"rules.{rule}"
        units.load((loss, rule, *(name for layer in layers for name in layer.units)))
        head[: layout.GROUPS + 1] = [len(layers), units[loss], units[rule], lowest, groups]
        head[layout.FORWARD], head[layout.PRODUCTS] = units["products.forward"], units["products.product"]
        head[layout.X : layout.DB + 1] = map(_address, self._buffers)
        head[layout.COUNTS], head[layout.CLIPS], head[layout.AVERAGES] = int(counts), int(clips), int(averages)
        head[layout.CLASSES] = int(classes)
        numbers = head
        for layer, (n, k), block in zip(layers, sizes, blocks, strict=True):
            a = like.new_zeros(m * n)
            z = like.new_zeros(m * n) if layer.saves_z else a
            self._buffers += [a, z]
            functions = [units[name] for name in layer.units] or [0, 0]
            record = [n, k, *functions, block, _address(a), _address(z)]
            numbers += record + layer.weight.record() + layer.bias.record()
        self.net = (ctypes.c_int64 * len(numbers))(*numbers)
        self.hyper = (ctypes.c_double * (layout.OF_GROUPS + 2 * groups))()
        self._result, self._error = ctypes.c_int64(), ctypes.c_void_p()
        self._places = [ctypes.addressof(place) for place in (self._result, self._error, self.net, self.hyper)] + [
            count.data_ptr()
        ]

    def step(self, x: Tensor, y: Tensor, losses: Tensor) -> bool:
        """One step on X [m, K], Y [m] or [m, N]; writes the loss. False where a class number is out of range."""
        m = x.shape[0]
        return self._run(x, y, 0, 0, m, m, 0, 0, losses)

    def steps(self, x: Tensor, y: Tensor, order: Tensor, batch: int, rates: Tensor | None, losses: Tensor) -> bool:
        """Steps on the rows ``order`` of X and Y, ``batch`` <= m at a time.

        ``rates`` are float64 [steps, groups], or None for the rates that are in ``hyper``.
        """
        assert batch <= self._m
        address, rated = (0, 0) if rates is None else (rates.data_ptr(), 1)
        return self._run(x, y, order.data_ptr(), 1, order.shape[0], batch, address, rated, losses)

    def _run(
        self, x: Tensor, y: Tensor, order: int, ordered: int, n: int, batch: int, rates: int, rated: int, losses: Tensor
    ) -> bool:
        x_row, x_column = x.stride()
        values, pixels = x.data_ptr(), 0
        if x.dtype != self._dtype:
            values, pixels, how = 0, values, layout.PIXELS
        elif x_column == 1 and x_row == self._features:
            how = layout.READY
        else:
            how = layout.VALUES
        if self._classes:
            targets = y.data_ptr(), 0, y.stride(0), 1
        else:
            targets = 0, y.data_ptr(), *y.stride()
        where = values, pixels, how, x_row, x_column, *targets
        self._entry(*self._places, *where, order, ordered, n, batch, rates, rated, losses.data_ptr())
        return self._result.value == 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
