"""A network as the compiled step sees it: two arrays of numbers, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...base.dropout import threshold
from ..threads import team
from . import layout, machine_code
from .machine_code import Units

_STATUS, _INPUTS, _TARGETS, _LOSSES = layout.STATUS, layout.INPUTS, layout.TARGETS, layout.LOSSES
_ORDER, _RATES, _ROWS, _BATCH = layout.ORDER, layout.RATES, layout.ROWS, layout.BATCH
_DROP = "dropout.dropped"
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


class LossUnit(NamedTuple):
    """What computes the loss of a batch: a unit, what its targets are, and which label need not be a class."""

    name: str  #: of the unit
    classes: bool  #: whether targets are class numbers
    ignored: int = 0  #: 0, which is a class, where no label is ignored


class LayerParts(NamedTuple):
    """A layer's parameters, and the name of its activation; ``saves_z`` says whether f' needs Z."""

    weight: Parameter
    bias: Parameter
    activation: str
    saves_z: bool


def _functions(activation: str) -> list[str]:
    """The units of f and f'."""
    return [f"{file}.{activation}" for file in ("activations", "derivatives") if activation != "identity"]


def unit_names(activations: Iterable[str], loss: str, rule: str, *, clips: bool, averages: bool) -> list[str] | None:
    """The units that a network needs beside those of every step; None where one of them was not written.

    ``loss`` is the name of a unit.
    """
    names = [loss, f"rules.{rule}"]
    names += ["backward.clipped"] * clips + ["backward.averaged"] * averages
    names += [name for activation in dict.fromkeys(activations) for name in _functions(activation)]
    return names if all(map(machine_code.written, names)) else None


class NativeNetwork:
    """A network with buffers for batches of up to ``m`` rows.

    Args:
        units: the machine code, with the ``unit_names`` of the network.
        loss: what computes the loss, until ``take_loss``.
        rule: its name.
        lowest: the first layer with something to train.
        groups: number of param groups.
        count: 0-d float32, the number of updates, where ``counts``.
        clips: whether gradients are clipped; every trained parameter then has a place for its gradient.
        averages: whether there is a moving average.
        per_class: factors of the classes; None: 1.
        beside: a network of the same sizes whose buffers this one uses too, because they never run at once.
        threads: the most threads of a step; several only where ``threads.team`` finds OpenMP.
    """

    def __init__(
        self,
        units: Units,
        layers: Sequence[LayerParts],
        m: int,
        *,
        loss: LossUnit,
        rule: str,
        lowest: int,
        groups: int,
        count: Tensor,
        counts: bool,
        clips: bool,
        averages: bool,
        per_class: Tensor | None = None,
        beside: NativeNetwork | None = None,
        threads: int = 1,
    ) -> None:
        weights = [layer.weight.data for layer in layers]
        like = weights[0]
        assert like is not None
        sizes = [tuple(w.shape) for w in weights if w is not None]
        most_n, most_k = (max(of) for of in zip(*sizes, strict=True))
        padded = m + _PADDING
        blocks = [max(8, _BLOCK_BYTES // (k * like.element_size()) // 8 * 8) for _, k in sizes]
        largest = max(min(n, block) * k for (n, k), block in zip(sizes, blocks, strict=True))
        self._run = units.run if threads == 1 else units.spread
        self._m, self._layers, self._count, self._like = m, layers, count, like
        self._dtype, self._features, self._classes = like.dtype, sizes[0][1], False
        self.one, self._per_class = like.new_ones(1), per_class
        of_da = m * max(most_n, most_k)
        of_transposed = (most_k + most_n) * padded  # X^T, or W^T where W is smaller than X and Z
        #: In the order of ``layout.X`` to ``layout.DB``, then A and Z of each layer.
        scratch = [m * sizes[0][1], of_transposed, most_n * padded]
        scratch += [threads * of_da, threads * of_da, threads * largest, most_n]
        for n, _ in sizes:
            scratch += [m * n, m * n]
        self._buffers: list[Tensor] = []
        self._buffers = [like.new_empty(size) for size in scratch] if beside is None else beside._buffers
        head = [0] * layout.HEADER
        head[: layout.GROUPS + 1] = [len(layers), 0, units[f"rules.{rule}"], lowest, groups]
        head[layout.FORWARD], head[layout.PRODUCTS] = units["products.forward"], units["products.product"]
        head[layout.X : layout.DB + 1] = map(_address, self._buffers[:_OF_LAYERS])
        head[layout.GATHER], head[layout.BACKWARD] = units["whole.gathered"], units["backward.backward"]
        head[layout.RUN], head[layout.THREADS] = units["whole.run"], threads
        head[layout.DA_ROOM], head[layout.DW_ROOM] = of_da, largest
        if threads > 1:
            head[layout.TEAM : layout.HEADER] = team()
        head[layout.CLIPS] = units["backward.clipped"] if clips else 0
        head[layout.AVERAGES] = units["backward.averaged"] if averages else 0
        head[layout.COUNTS], head[layout.STORES], head[layout.UPDATES] = int(counts), int(clips), 1
        head[layout.PER_CLASS] = _address(self.one if per_class is None else per_class)
        head[layout.PER_CLASS_STEP] = int(per_class is not None)
        numbers = head
        pairs = zip(self._buffers[_OF_LAYERS::2], self._buffers[_OF_LAYERS + 1 :: 2], strict=True)
        for layer, (n, k), block, (a, z) in zip(layers, sizes, blocks, pairs, strict=True):
            z = z if layer.saves_z else a
            functions = [units[name] for name in _functions(layer.activation)] or [0, 0]
            record = [n, k, *functions, block, _address(a), _address(z), _address(a), 0, 0]
            numbers += record + layer.weight.record() + layer.bias.record()
        self.net = (ctypes.c_int64 * len(numbers))(*numbers)
        self._rates = layout.OF_GROUPS + 2 * groups
        self.hyper = (ctypes.c_double * (self._rates + len(layers)))()
        self._gradients: list[Tensor] = []
        #: Of each layer that drops or has dropped, what the next layer reads and the factors.
        self._dropped: dict[int, tuple[Tensor, Tensor]] = {} if beside is None else beside._dropped
        self._call = (ctypes.c_int64 * layout.CALL)()
        self._call[layout.NET : layout.COUNT + 1] = [
            ctypes.addressof(self.net),
            ctypes.addressof(self.hyper),
            count.data_ptr(),
        ]
        self._nothing = ctypes.c_int64()
        nothing, call = (ctypes.c_int64(ctypes.addressof(place)) for place in (self._nothing, self._call))
        self._arguments = nothing, nothing, call, nothing
        #: Whether the last call was a step without sample weights that read X and Y where they are.
        self.is_plain = False
        self._set_loss(units, loss)

    def take_loss(self, loss: LossUnit) -> bool:
        """Use this unit of a loss from now on; False where nobody wrote it or, with a warning, it does not compile."""
        units = machine_code.units(self._dtype, [loss.name]) if machine_code.written(loss.name) else None
        if units is not None:
            self._set_loss(units, loss)
        return units is not None

    def _set_loss(self, units: Units, loss: LossUnit) -> None:
        self.net[layout.LOSS], self.net[layout.CLASSES] = units[loss.name], int(loss.classes)
        self.net[layout.IGNORED] = loss.ignored
        self._classes, self.is_plain = loss.classes, False

    def gradients_go(self, to: Sequence[Tensor]) -> None:
        """Have the gradients of the trained parameters stored in these contiguous tensors, in the parameters' order."""
        places, self._gradients = iter(to), list(to)
        for i, layer in enumerate(self._layers):
            for of, parameter in ((layout.WEIGHT, layer.weight), (layout.BIAS, layer.bias)):
                if parameter.trained:
                    place = layout.HEADER + i * layout.RECORD + of + layout.GRADIENT
                    self.net[place] = next(places).data_ptr()

    def set_updates(self, updates: bool) -> None:
        """Whether steps update the parameters; else they store gradients, where they have been told to."""
        self.net[layout.STORES], self.net[layout.UPDATES] = int(not updates or self.net[layout.CLIPS] != 0), updates

    def take_dropout(self, state: Tensor | None, rates: Sequence[float], stream: int, *, advances: bool = True) -> bool:
        """Drop elements from now on; False where the unit does not compile, or the state is not contiguous.

        Args:
            state: int64 [2], (seed, step), read at every step; None: drop nothing.
            rates: the probability of each hidden layer.
            advances: whether each step is added to the state.
        """
        net = self.net
        if state is not None:
            units = machine_code.units(self._dtype, [_DROP])
            if units is None or not state.is_contiguous():
                return False
            net[layout.DROP], net[layout.STATE], net[layout.STREAM] = units[_DROP], state.data_ptr(), stream
        net[layout.ADVANCES] = int(advances and state is not None)
        for i, p in enumerate(rates if state is not None else [0.0] * len(self._layers)):
            record = layout.HEADER + i * layout.RECORD
            net[record + layout.OUT], net[record + layout.THRESHOLD] = net[record + layout.A], 0
            if p:
                if i not in self._dropped:
                    out = self._like.new_empty(self._m * net[record + layout.N])
                    self._dropped[i] = out, torch.empty_like(out)
                net[record + layout.OUT], net[record + layout.FACTORS] = map(_address, self._dropped[i])
                net[record + layout.THRESHOLD], self.hyper[self._rates + i] = threshold(p), p
        return True

    @property
    def failed(self) -> bool:
        """Whether the last call found a class number out of range."""
        return bool(self._call[_STATUS])

    @property
    def address(self) -> int:
        """Of the array ``call``."""
        return ctypes.addressof(self._call)

    def prepare(self, member: int, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Have ``whole.members`` call the step as this member of an ensemble, on batches like x [m, K], y, weight."""
        self._say_how(x, y, weight)
        self._call[layout.MEMBER] = member
        self._call[_ORDER] = self._call[_RATES] = 0
        self._call[_ROWS] = self._call[_BATCH] = self._m

    def prepare_steps(self, order: Tensor, batch: int, rates: Tensor) -> None:
        """After ``prepare``, have steps called, as ``steps`` makes them; ``order`` and ``rates`` are contiguous."""
        assert batch <= self._m
        self._call[_ORDER], self._call[_RATES] = order.data_ptr(), rates.data_ptr()
        self._call[_ROWS], self._call[_BATCH] = order.shape[0], batch

    def step(self, x: Tensor, y: Tensor, losses: Tensor, weight: Tensor | None = None) -> bool:
        """One step on X [m, K], Y [m] or [m, N], with sample weights [m]; writes the loss.

        X and Y may have a dimension of one member in front. False where a class number is out of range.
        """
        plain = self.is_plain and weight is None
        if not (plain and x.dtype is self._dtype and x.is_contiguous() and y.is_contiguous()):
            call = self._call
            self._say_how(x, y, weight)
            call[_ORDER] = call[_RATES] = 0
            call[_ROWS] = call[_BATCH] = self._m
            self.is_plain = weight is None and call[layout.HOW] == layout.READY and y.is_contiguous()
        return self.again(x, y, losses)

    def again(self, x: Tensor, y: Tensor, losses: Tensor) -> bool:
        """``step``, where X and Y have the properties of the last ones and nothing else has changed since."""
        call = self._call
        call[_INPUTS], call[_TARGETS], call[_LOSSES] = x.data_ptr(), y.data_ptr(), losses.data_ptr()
        self._run(*self._arguments)
        return not call[_STATUS]

    def steps(
        self,
        x: Tensor,
        y: Tensor,
        order: Tensor,
        batch: int,
        rates: Tensor | None,
        losses: Tensor,
        weight: Tensor | None = None,
    ) -> bool:
        """Steps on the rows ``order`` of X, Y and the sample weights, ``batch`` <= m at a time.

        ``rates`` are float64 [steps, groups], or None for the rates that are in ``hyper``.
        """
        assert batch <= self._m
        call, self.is_plain = self._call, False
        self._say_how(x, y, weight)
        call[_INPUTS], call[_TARGETS], call[_LOSSES] = x.data_ptr(), y.data_ptr(), losses.data_ptr()
        call[_ORDER], call[_RATES] = order.data_ptr(), _address(rates)
        call[_ROWS], call[_BATCH] = order.shape[0], batch
        self._run(*self._arguments)
        return not call[_STATUS]

    def _say_how(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Write the dtype of the inputs, all strides, and where the sample weights are."""
        call, (x_row, x_column) = self._call, x.stride()[-2:]
        how = layout.VALUES if x.dtype == self._dtype else layout.PIXELS
        if how == layout.VALUES and x.is_contiguous():
            how, x_row, x_column = layout.READY, self._features, 1
        y_row, y_column = (y.stride(-1), 1) if self._classes else y.stride()[-2:]
        call[layout.HOW : layout.Y_COLUMN + 1] = [how, x_row, x_column, y_row, y_column]
        call[layout.WEIGHTS] = _address(self.one if weight is None else weight)
        call[layout.WEIGHT_ROW] = 0 if weight is None else weight.stride(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeMembers:
    """Networks that are members of an ensemble, which one call steps one after the other."""

    def __init__(self, units: Units, networks: Sequence[NativeNetwork], members: Sequence[int]) -> None:
        self._networks, self._members, self._one = networks, members, networks[0].one
        self._function = units.function("whole.members")
        self._calls = (ctypes.c_int64 * len(networks))(*[network.address for network in networks])
        self._nothing = ctypes.c_int64()
        nothing, calls = ctypes.addressof(self._nothing), ctypes.addressof(self._calls)
        #: The arguments of ``whole.members``, in its order; each step writes those that are 0 here.
        self._arguments = [ctypes.c_int64(n) for n in (nothing, nothing, calls, len(networks), *[0] * 8)]
        self._arguments.append(ctypes.c_int64(units["whole.run"]))
        self._like: tuple[object, ...] = ()

    def take_dropout(self, state: Tensor | None, rates: Sequence[float], stream: int) -> bool:
        """``NativeNetwork.take_dropout`` of every network; none of them adds the step to the state."""
        return all(network.take_dropout(state, rates, stream, advances=False) for network in self._networks)

    def take_loss(self, loss: LossUnit) -> bool:
        """``NativeNetwork.take_loss`` of every network."""
        self._like = ()
        return all(network.take_loss(loss) for network in self._networks)

    def step(self, x: Tensor, y: Tensor, losses: Tensor, weight: Tensor | None, *, own_x: bool, own_y: bool) -> bool:
        """One step on X [m, K], Y and sample weights [m], each [E, ...] where members have their own; losses are [E].

        False where a class number of any member is out of range, and nothing has changed then.
        """
        like = x.dtype, x.stride(), y.stride(), losses.stride(), None if weight is None else weight.stride()
        if like != self._like:
            self._prepare(x, y, losses, weight, own_x=own_x, own_y=own_y)
            self._like = like
        self._run(x, y, losses, weight)
        return not self._networks[0].failed

    def steps(
        self,
        x: Tensor,
        y: Tensor,
        order: Tensor,
        batch: int,
        rates: Tensor,
        losses: Tensor,
        weight: Tensor | None,
        *,
        own_x: bool,
        own_y: bool,
    ) -> None:
        """Steps of each member on the rows ``order`` [n] or [E, n], ``batch`` <= m at a time.

        All class numbers are classes. The steps leave their last learning rates as those of the networks.

        Args:
            x, y, weight: all rows, [N, ...] or where members have their own [E, N, ...].
            order, rates, losses: contiguous; ``rates`` are float64 [E, steps, groups], ``losses`` are [E, steps].
        """
        self._like = ()
        self._prepare(x, y, losses, weight, own_x=own_x, own_y=own_y)
        for member, network in zip(self._members, self._networks, strict=True):
            network.prepare_steps(order if order.dim() == 1 else order[member], batch, rates[member])
        self._run(x, y, losses, weight)

    def _prepare(
        self, x: Tensor, y: Tensor, losses: Tensor, weight: Tensor | None, *, own_x: bool, own_y: bool
    ) -> None:
        """Have the networks take tensors like these, and say how far those of the next member are."""
        own_weight = weight is not None and weight.dim() == 2
        first = weight[0] if weight is not None and own_weight else weight
        for member, network in zip(self._members, self._networks, strict=True):
            network.prepare(member, x, y, first)
        weights = self._one if weight is None else weight
        for place, t, own in ((5, x, own_x), (7, y, own_y), (9, losses, True), (11, weights, own_weight)):
            self._arguments[place].value = t.stride(0) * t.element_size() if own else 0

    def _run(self, x: Tensor, y: Tensor, losses: Tensor, weight: Tensor | None) -> None:
        arguments = self._arguments
        arguments[4].value, arguments[6].value, arguments[8].value = x.data_ptr(), y.data_ptr(), losses.data_ptr()
        arguments[10].value = (self._one if weight is None else weight).data_ptr()
        self._function(*arguments)
