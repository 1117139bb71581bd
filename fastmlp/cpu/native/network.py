"""A network as the compiled step sees it: two arrays of numbers, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from . import layout, machine_code
from .machine_code import Units

_STATUS, _INPUTS, _TARGETS, _LOSSES = layout.STATUS, layout.INPUTS, layout.TARGETS, layout.LOSSES
_ORDER, _RATES, _ROWS, _BATCH = layout.ORDER, layout.RATES, layout.ROWS, layout.BATCH
#: Bytes of a block of rows of a weight, which stays in the first cache from its part of dX to its update.
_BLOCK_BYTES = 16_384
#: The number of buffers before those of the layers.
_OF_LAYERS = layout.DB - layout.X + 1
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


def _functions(activation: str) -> list[str]:
    """The units of f and f'."""
    return [f"activations.{activation}{end}" for end in ("", "_grad") if activation != "identity"]


def unit_names(activations: Iterable[str], loss: str, rule: str, *, clips: bool, averages: bool) -> list[str] | None:
    """The units that a network needs beside those of every step; None where one of them was not written."""
    names = [f"losses.{loss}", f"rules.{rule}"]
    names += ["whole.clipped"] * clips + ["whole.averaged"] * averages
    names += [name for activation in dict.fromkeys(activations) for name in _functions(activation)]
    return names if all(map(machine_code.written, names)) else None


class NativeNetwork:
    """A network with buffers for batches of up to ``m`` rows.

    Args:
        units: the machine code, with the ``unit_names`` of the network.
        loss, rule: their names.
        lowest: the first layer with something to train.
        groups: number of param groups.
        count: 0-d float32, the number of updates, where ``counts``.
        clips: whether gradients are clipped; every trained parameter then has a place for its gradient.
        averages: whether there is a moving average.
        classes: whether targets are class numbers.
        beside: a network of the same sizes whose buffers this one uses too, because they never run at once.
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
        beside: NativeNetwork | None = None,
    ) -> None:
        weights = [layer.weight.data for layer in layers]
        like = weights[0]
        assert like is not None
        sizes = [tuple(w.shape) for w in weights if w is not None]
        most_n, most_k = (max(of) for of in zip(*sizes, strict=True))
        padded = m + _PADDING
        blocks = [max(8, _BLOCK_BYTES // (k * like.element_size()) // 8 * 8) for _, k in sizes]
        largest = max(min(n, block) * k for (n, k), block in zip(sizes, blocks, strict=True))
        self._run, self._m, self._layers, self._count, self._like = units.run, m, layers, count, like
        self._dtype, self._features, self._classes = like.dtype, sizes[0][1], classes
        of_da = m * max(most_n, most_k)
        #: In the order of ``layout.X`` to ``layout.DB``, then A and Z of each layer.
        scratch = [m * sizes[0][1], most_k * padded, most_n * padded, of_da, of_da, largest, most_n]
        for n, _ in sizes:
            scratch += [m * n, m * n]
        self._buffers: list[Tensor] = []
        self._buffers = [like.new_empty(size) for size in scratch] if beside is None else beside._buffers
        head = [0] * layout.HEADER
        head[: layout.GROUPS + 1] = [len(layers), units[f"losses.{loss}"], units[f"rules.{rule}"], lowest, groups]
        head[layout.FORWARD], head[layout.PRODUCTS] = units["products.forward"], units["products.product"]
        head[layout.X : layout.DB + 1] = map(_address, self._buffers[:_OF_LAYERS])
        head[layout.GATHER], head[layout.BACKWARD] = units["whole.gathered"], units["whole.backward"]
        head[layout.CLIPS] = units["whole.clipped"] if clips else 0
        head[layout.AVERAGES] = units["whole.averaged"] if averages else 0
        head[layout.COUNTS], head[layout.CLASSES] = int(counts), int(classes)
        numbers = head
        pairs = zip(self._buffers[_OF_LAYERS::2], self._buffers[_OF_LAYERS + 1 :: 2], strict=True)
        for layer, (n, k), block, (a, z) in zip(layers, sizes, blocks, pairs, strict=True):
            z = z if layer.saves_z else a
            functions = [units[name] for name in _functions(layer.activation)] or [0, 0]
            record = [n, k, *functions, block, _address(a), _address(z)]
            numbers += record + layer.weight.record() + layer.bias.record()
        self.net = (ctypes.c_int64 * len(numbers))(*numbers)
        self.hyper = (ctypes.c_double * (layout.OF_GROUPS + 2 * groups))()
        self._call = (ctypes.c_int64 * layout.CALL)()
        self._call[layout.NET : layout.COUNT + 1] = [
            ctypes.addressof(self.net),
            ctypes.addressof(self.hyper),
            count.data_ptr(),
        ]
        self._nothing = ctypes.c_int64()
        nothing, call = (ctypes.c_int64(ctypes.addressof(place)) for place in (self._nothing, self._call))
        self._arguments = nothing, nothing, call, nothing
        self._is_plain = False

    @property
    def address(self) -> int:
        """Of the array ``call``."""
        return ctypes.addressof(self._call)

    def prepare(self, member: int, x: Tensor, y: Tensor) -> None:
        """Have ``whole.members`` call the step as this member of an ensemble, on batches like x [m, K] and y."""
        self._say_how(x, y)
        self._call[layout.MEMBER] = member
        self._call[_ORDER] = self._call[_RATES] = 0
        self._call[_ROWS] = self._call[_BATCH] = self._m

    def step(self, x: Tensor, y: Tensor, losses: Tensor) -> bool:
        """One step on X [m, K], Y [m] or [m, N]; writes the loss. False where a class number is out of range.

        X and Y may have a dimension of one member in front.
        """
        call = self._call
        if not (self._is_plain and x.dtype is self._dtype and x.is_contiguous() and y.is_contiguous()):
            self._say_how(x, y)
            call[_ORDER] = call[_RATES] = 0
            call[_ROWS] = call[_BATCH] = self._m
            self._is_plain = call[layout.HOW] == layout.READY and y.is_contiguous()
        call[_INPUTS], call[_TARGETS], call[_LOSSES] = x.data_ptr(), y.data_ptr(), losses.data_ptr()
        self._run(*self._arguments)
        return not call[_STATUS]

    def steps(self, x: Tensor, y: Tensor, order: Tensor, batch: int, rates: Tensor | None, losses: Tensor) -> bool:
        """Steps on the rows ``order`` of X and Y, ``batch`` <= m at a time.

        ``rates`` are float64 [steps, groups], or None for the rates that are in ``hyper``.
        """
        assert batch <= self._m
        call, self._is_plain = self._call, False
        self._say_how(x, y)
        call[_INPUTS], call[_TARGETS], call[_LOSSES] = x.data_ptr(), y.data_ptr(), losses.data_ptr()
        call[_ORDER], call[_RATES] = order.data_ptr(), _address(rates)
        call[_ROWS], call[_BATCH] = order.shape[0], batch
        self._run(*self._arguments)
        return not call[_STATUS]

    def _say_how(self, x: Tensor, y: Tensor) -> None:
        """Write the dtype of the inputs and all strides."""
        call, (x_row, x_column) = self._call, x.stride()[-2:]
        how = layout.VALUES if x.dtype == self._dtype else layout.PIXELS
        if how == layout.VALUES and x.is_contiguous():
            how, x_row, x_column = layout.READY, self._features, 1
        y_row, y_column = (y.stride(-1), 1) if self._classes else y.stride()[-2:]
        call[layout.HOW : layout.Y_COLUMN + 1] = [how, x_row, x_column, y_row, y_column]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeMembers:
    """Networks that are members of an ensemble, which one call steps one after the other."""

    def __init__(self, units: Units, networks: Sequence[NativeNetwork], members: Sequence[int]) -> None:
        self._networks, self._members = networks, members
        self._function = units.function("whole.members")
        self._calls = (ctypes.c_int64 * len(networks))(*[network.address for network in networks])
        self._nothing = ctypes.c_int64()
        nothing, calls = ctypes.addressof(self._nothing), ctypes.addressof(self._calls)
        #: Those of ``whole.members``, in its order; a step writes the rest.
        self._arguments = [ctypes.c_int64(n) for n in (nothing, nothing, calls, len(networks), *[0] * 6)]
        self._arguments.append(ctypes.c_int64(units["whole.run"]))
        self._like: tuple[object, ...] = ()

    def step(self, x: Tensor, y: Tensor, losses: Tensor, *, own_x: bool, own_y: bool) -> None:
        """One step on X [m, K] and Y, or where members have their own, [E, m, K] and [E, ...]; losses are [E]."""
        like = x.dtype, x.stride(), y.stride(), losses.stride()
        arguments = self._arguments
        if like != self._like:
            for member, network in zip(self._members, self._networks, strict=True):
                network.prepare(member, x, y)
            for place, t, own in ((5, x, own_x), (7, y, own_y), (9, losses, True)):
                arguments[place].value = t.stride(0) * t.element_size() if own else 0
            self._like = like
        arguments[4].value, arguments[6].value, arguments[8].value = x.data_ptr(), y.data_ptr(), losses.data_ptr()
        self._function(*arguments)
