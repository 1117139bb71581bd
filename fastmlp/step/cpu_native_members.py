"""Steps of some members of an ensemble as one call of machine code, as ``cpu_members.Piece`` makes one on operators.

What the machine code does not have goes to pieces on operators, as in ``cpu_native``. The class numbers of all members
were checked before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import nan

import torch
from torch import Tensor

from .. import cpu
from ..activations import ACTIVATIONS
from ..cpu import native_layout as layout
from .cpu_member_span import Ensemble, MemberLayer, target_dims
from .cpu_members import Piece
from .cpu_native import Taken, has_formulas, write_settings
from .cpu_native_losses import LossUnits


def native_units(net: Ensemble, m: int) -> cpu.NativeUnits | None:
    """The machine code for steps of ``m`` rows; None where it lacks what the ensemble needs, or is not wanted."""
    copies = any(not copies.is_one for layer in net.layers for copies in layer.copies)
    if not has_formulas(net) or copies or not net.layers[-1].weight.shape[1]:
        return None
    activations, clips = [layer.activation for layer in net.layers], net.rule.max_grad_norm is not None
    loss = LossUnits(net.loss, net.options, net.dtype).usual.name
    names = cpu.unit_names(activations, loss, net.rule.name, clips=clips, averages=net.rule.ema_decay is not None)
    if names is None:
        return None
    work = m * sum(layer.weight[0].numel() for layer in net.layers)
    return cpu.native_units(m, work, net.dtype, ["whole.members", *names])


class NativePiece:
    """Steps of the members ``ids`` with ``m`` rows each.

    Args:
        units: the machine code.
        operators: makes the pieces on operators.
    """

    def __init__(
        self,
        net: Ensemble,
        ids: Sequence[int],
        m: int,
        units: cpu.NativeUnits,
        operators: Callable[[], list[Piece]],
    ) -> None:
        self._net, self._ids, self._make = net, ids, operators
        self._pieces: list[Piece] | None = None
        clips = net.rule.max_grad_norm is not None
        self._losses = LossUnits(net.loss, net.options, net.dtype)
        #: Where the networks store gradients, once they have been asked for.
        self._gradients: list[Tensor] | None = None
        gradients = [torch.zeros_like(t[0]) for t in net.masters] if clips else []
        self._networks: list[cpu.NativeNetwork] = []
        for e in ids:
            self._networks.append(
                cpu.NativeNetwork(
                    units,
                    [_parts(net, layer, e, gradients) for layer in net.layers],
                    m,
                    loss=self._losses.usual,
                    rule=net.rule.name,
                    lowest=net.lowest,
                    groups=len(net.rules),
                    count=net.counts[e],
                    counts=net.rule.counted,
                    clips=clips,
                    averages=net.rule.ema_decay is not None,
                    per_class=self._losses.per_class,
                    beside=self._networks[0] if self._networks else None,
                )
            )
        self._members = cpu.NativeMembers(units, self._networks, ids)
        self._taken = Taken(self._members, self._losses.usual)
        self._version, self._rate = -1, float("nan")

    def _take_settings(self) -> None:
        """Write the settings of every member, if any has changed."""
        net = self._net
        if self._version != net.version:
            for e, network in zip(self._ids, self._networks, strict=True):
                rules = net.rules_with(net.settings_of(e))
                write_settings(network, rules[0], rules, net.options, plain=net.plain)
                for i, rule in enumerate(rules):
                    network.hyper[layout.OF_GROUPS + 2 * i] = rule.lr
            self._version, self._rate = net.version, float("nan")
        if net.rate == net.rate and net.rate != self._rate:
            self._rate = net.rate
            for network in self._networks:
                network.hyper[layout.OF_GROUPS] = net.rate

    def run(
        self,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        update: bool,
        weight: Tensor | None = None,
        of_pass: tuple[int, int] = (0, 0),
    ) -> None:
        """``Piece.run``."""
        if not self.ready(y, out, weight):
            self._net.look_at(y)
            for piece in self._operators():
                piece.run(x, y, out, update, weight, of_pass)
            return
        if weight is not None:
            weight = weight.to(self._net.dtype)
        if not update:
            self._set_updates(False)
        made = self._members.step(x, y, out, weight, own_x=x.dim() == 3, own_y=y.dim() > target_dims(y))
        if not update:
            self._set_updates(True)
        if not made:
            self._net.look_at(y)

    def epoch(
        self,
        x: Tensor,
        y: Tensor,
        batch: int,
        order: Tensor,
        rates: Tensor,
        losses: Tensor,
        weight: Tensor | None,
    ) -> None:
        """Steps that are ``ready``, with the arguments of ``NativeMembers.steps``."""
        own_x, own_y = x.dim() == 3, y.dim() > target_dims(y)
        self._members.steps(x, y, order, batch, rates, losses, weight, own_x=own_x, own_y=own_y)
        self._version = -1  # the settings are written anew, since the networks have the learning rates of the last step

    def _set_updates(self, updates: bool) -> None:
        grads = self._net.grads
        if grads is not self._gradients:
            self._gradients = grads
            for e, network in zip(self._ids, self._networks, strict=True):
                network.gradients_go([grad[e] for grad in grads])
        for network in self._networks:
            network.set_updates(updates)

    def ready(self, y: Tensor, out: Tensor, weight: Tensor | None) -> bool:
        """Write all settings for batches like this one; False where the machine code does not have them."""
        net = self._net
        if out.dtype != net.dtype or not self._taken.take(net.dropout, self._losses.of(y, weight)):
            return False
        self._take_settings()
        return True

    def update(self) -> None:
        """``Piece.update``."""
        for piece in self._operators():
            piece.update()

    def _operators(self) -> list[Piece]:
        if self._pieces is None:
            self._pieces = self._make()
        return self._pieces


def native_epoch(
    pieces: Sequence[NativePiece],
    x: Tensor,
    y: Tensor,
    batch: int,
    order: Tensor,
    lrs: Tensor,
    losses: Tensor,
    weight: Tensor | None,
) -> bool:
    """``TorchEnsemble.epoch`` of these pieces at once; False where they lack anything, and nothing has changed then."""
    if not all(piece.ready(y, losses, weight) for piece in pieces):
        return False
    steps, members = losses.shape
    rates = lrs.view(steps, members, -1).transpose(0, 1).contiguous()
    # Each member writes its losses side by side. Those of no piece stay NaN.
    of_members = losses.new_full((members, steps), nan)
    weight, order = None if weight is None else weight.to(losses.dtype), order.contiguous()
    runs = [partial(piece.epoch, x, y, batch, order, rates, of_members, weight) for piece in pieces]
    if len(runs) == 1:
        runs[0]()
    else:
        cpu.at_once(runs)
    losses.copy_(of_members.t())
    return True


def _parts(net: Ensemble, layer: MemberLayer, e: int, gradients: Sequence[Tensor]) -> cpu.LayerParts:
    """A layer of member e."""

    def parameter(data: Tensor | None, trained: bool, place: int) -> cpu.NativeParameter:
        if data is None or not trained:
            return cpu.NativeParameter(None if data is None else data[e])
        states = [net.states[name][place][e] for name in net.rule.states]
        group = 0 if net.group_of is None else net.group_of[place]
        average = None if net.rule.ema_decay is None else net.states["ema"][place][e]
        return cpu.NativeParameter(data[e], True, group, states, gradients[place] if gradients else None, average)

    return cpu.LayerParts(
        parameter(layer.weight, layer.train_w, layer.grad_w),
        parameter(layer.bias, layer.train_b, layer.grad_b),
        layer.activation,
        ACTIVATIONS[layer.activation].saved == "z",
    )
