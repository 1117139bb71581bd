"""A training step as one call of machine code (``fastmlp.cpu.native``), for what the machine code has.

What it does not have goes to the step on torch's operators, which is planned when it is first needed: dropout, sample
weights, targets that are probabilities or of another dtype, class numbers out of range, and gradients without an
update. Both share the parameters and all state, so they may take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import cpu
from ..base.losses import takes_classes
from ..cpu import native_layout as layout
from .cpu_member_span import Ensemble
from .cpu_plan import Layer, Network
from .optimizers import Optimizer

if TYPE_CHECKING:
    from ..cpu import NativeParameter


def has_formulas(net: Network | Ensemble) -> bool:
    """Whether the machine code has the device, the dtype, the dropout, and the loss for labels that all count."""
    options = net.options
    return (
        net.device.type == "cpu"
        and net.dtype in (torch.float32, torch.float64)
        and net.dropout is None
        and options.class_weight is None
        and options.pos_weight is None
        and not options.label_smoothing
    )


def has_native(net: Network) -> bool:
    """Whether the machine code has what the network needs."""
    ignores = 0 <= net.options.ignored < net.modules[-1].out_features
    return has_formulas(net) and not (net.copies or net.parallel is not None or net.late or ignores)


def native_plan(net: Network, m: int) -> cpu.NativePlan | None:
    """What plans steps of ``m`` rows by machine code; None where the machine code lacks what the network needs."""
    if not has_native(net):
        return None
    activations, clips = [layer.activation for layer in net.layers], net.rule.max_grad_norm is not None
    names = cpu.unit_names(activations, net.loss, net.rule.name, clips=clips, averages=net.averages)
    return None if names is None else cpu.NativePlan(names, partial(NativeStep, net, m))


def write_settings(
    native: cpu.NativeNetwork, rule: Optimizer, of_groups: Sequence[Optimizer], delta: float, *, plain: bool
) -> None:
    """Write the settings for the machine code, except the learning rates."""
    hyper, numbers = native.hyper, rule.numbers
    hyper[layout.DELTA] = delta
    hyper[layout.MAX_NORM] = 0.0 if rule.max_grad_norm is None else rule.max_grad_norm
    hyper[layout.SIGN] = -1.0 if rule.maximize else 1.0
    hyper[layout.NUMBERS : layout.NUMBERS + len(numbers)] = list(numbers)
    hyper[layout.EMA] = 0.0 if rule.ema_decay is None else 1 - rule.ema_decay
    hyper[layout.EMA_WARMS] = float(rule.ema_warmup)
    for i, of_group in enumerate(of_groups):
        hyper[layout.OF_GROUPS + 2 * i + 1] = of_group.weight_decay
    native.net[layout.PLAIN] = int(plain)


class NativeStep:
    """Steps of up to ``m`` rows; called as ``TorchStep.step`` is.

    Args:
        units: the machine code for the network's dtype.
        plan: plans the step on torch's operators.
    """

    def __init__(self, net: Network, m: int, units: cpu.NativeUnits, plan: Callable[[], Callable[..., None]]) -> None:
        self._net, self._plan = net, plan
        self._operators: Callable[..., None] | None = None
        optimizer = net.optimizer
        clips = net.rule.max_grad_norm is not None
        self._gradients = [torch.zeros_like(t) for t in optimizer.params] if clips else []
        self._classes = takes_classes(net.loss)
        self._target = torch.int64 if self._classes else net.dtype
        self._native = cpu.NativeNetwork(
            units,
            [self._parts(layer) for layer in net.layers],
            m,
            loss=net.loss,
            rule=net.rule.name,
            lowest=net.lowest,
            groups=len(net.rules),
            count=optimizer.count,
            counts=net.rule.counted,
            clips=clips,
            averages=net.averages,
            classes=self._classes,
        )
        self._hyper, self._changes = self._native.hyper, -1
        self._rates = [(layout.OF_GROUPS + 2 * i, rule) for i, rule in enumerate(net.rules)]

    def _parts(self, layer: Layer) -> cpu.LayerParts:
        weight = self._parameter(layer.weight, layer.train_w, layer.grad_w)
        bias = self._parameter(layer.bias, layer.train_b, layer.grad_b)
        return cpu.LayerParts(weight, bias, layer.activation, layer.saves_z)

    def _parameter(self, data: Tensor | None, trained: bool, place: int) -> NativeParameter:
        if not trained:
            return cpu.NativeParameter(data)
        net, states = self._net, self._net.optimizer.states
        return cpu.NativeParameter(
            data,
            True,
            0 if net.groups is None else net.groups.numbers[place],
            [states[name][place] for name in net.rule.states],
            self._gradients[place] if self._gradients else None,
            states["ema"][place] if net.averages else None,
        )

    def _take_settings(self) -> None:
        """Write the settings for the machine code."""
        net = self._net
        write_settings(self._native, net.rule, net.rules, net.options.delta, plain=net.plain)
        self._changes = net.changes

    def _write_rates(self) -> None:
        """Write the settings that changed since the last step, and the learning rates, which may change without."""
        if self._changes != self._net.changes:
            self._take_settings()
        for place, rule in self._rates:
            self._hyper[place] = rule.lr

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        rows: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        update: bool = True,
    ) -> None:
        """``TorchStep.step``, and ``update`` as the step on operators takes it."""
        if not (update and weight is None and self.made(x, y, out, rows)):
            self.by_operators(x, y, out, rows, weight, update=update)

    def made(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None = None) -> bool:
        """Whether the machine code has made the step; if not, nothing has changed, and a class may be out of range."""
        if y.dtype is not self._target or self._net.dropout is not None:
            return False
        self._write_rates()
        return self._native.step(x, y, out) if rows is None else self._at(x, y, out, rows)

    def _at(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor) -> bool:
        return self._native.steps(x, y, rows.contiguous(), rows.shape[0], None, out)

    @property
    def by_operators(self) -> Callable[..., None]:
        """The step on torch's operators."""
        if self._operators is None:
            self._operators = self._plan()
        return self._operators

    def epoch(self, x: Tensor, y: Tensor, batch: int, order: Tensor, rates: Tensor, losses: Tensor) -> bool:
        """``TorchStep.epoch``; False where the machine code does not have it, and nothing has changed then."""
        if y.dtype != self._target or self._net.dropout is not None:
            return False
        self._write_rates()
        return self._native.steps(x, y, order.contiguous(), batch, rates.contiguous(), losses)
