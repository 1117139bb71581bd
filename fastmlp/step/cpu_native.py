"""A training step as one call of machine code (``fastmlp.cpu.native``), for what the machine code has.

Targets of another dtype, and class numbers out of range, go to the step on torch's operators, which is planned when it
is first needed. Both share the parameters and all state, so they may take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import cpu
from ..base.losses import IGNORED
from ..cpu import native_layout as layout
from .cpu_dropout import StepDropout
from .cpu_member_span import Ensemble
from .cpu_native_losses import LossUnits
from .cpu_plan import Layer, Network
from .loss_options import LossOptions
from .optimizers import Optimizer

#: Repeats a step: with X and Y that have the properties of the last ones, where nothing else has changed, it makes the
#: step and writes its loss into the third tensor. False where a class number is out of range, and nothing was done.
Again = Callable[[Tensor, Tensor, Tensor], bool]

if TYPE_CHECKING:
    from ..cpu import NativeParameter


def has_formulas(net: Network | Ensemble) -> bool:
    """Whether the machine code has the device and the dtype, and the parameters have memory."""
    has_dtype = net.device.type == "cpu" and net.dtype in (torch.float32, torch.float64)
    return has_dtype and not isinstance(net.layers[0].weight, FakeTensor)


def has_native(net: Network) -> bool:
    """Whether the machine code has what the network needs."""
    return has_formulas(net) and not (net.copies or net.parallel is not None or net.late)


def native_plan(net: Network, m: int) -> cpu.NativePlan | None:
    """What plans steps of ``m`` rows by machine code; None where the machine code lacks what the network needs."""
    if not has_native(net):
        return None
    activations, clips = [layer.activation for layer in net.layers], net.rule.max_grad_norm is not None
    loss = LossUnits(net.loss, net.options, net.dtype).usual.name
    names = cpu.unit_names(activations, loss, net.rule.name, clips=clips, averages=net.averages)
    return None if names is None else cpu.NativePlan(names, partial(NativeStep, net, m))


def write_settings(
    native: cpu.NativeNetwork, rule: Optimizer, of_groups: Sequence[Optimizer], options: LossOptions, *, plain: bool
) -> None:
    """Write the settings for the machine code, except the learning rates."""
    hyper, numbers = native.hyper, rule.numbers
    hyper[layout.DELTA], hyper[layout.SMOOTHING] = options.delta, options.label_smoothing
    hyper[layout.MAX_NORM] = 0.0 if rule.max_grad_norm is None else rule.max_grad_norm
    hyper[layout.SIGN] = -1.0 if rule.maximize else 1.0
    hyper[layout.NUMBERS : layout.NUMBERS + len(numbers)] = list(numbers)
    hyper[layout.EMA] = 0.0 if rule.ema_decay is None else 1 - rule.ema_decay
    hyper[layout.EMA_WARMS] = float(rule.ema_warmup)
    for i, of_group in enumerate(of_groups):
        hyper[layout.OF_GROUPS + 2 * i + 1] = of_group.weight_decay
    native.net[layout.PLAIN] = int(plain)


class Taken:
    """What the machine code drops at present (nothing at first), and the unit by which it computes the loss."""

    def __init__(self, native: cpu.NativeNetwork | cpu.NativeMembers, loss: cpu.LossUnit) -> None:
        self.dropout: StepDropout | None = None
        self.loss, self._native, self._place = loss, native, 0

    def take(self, dropout: StepDropout | None, loss: cpu.LossUnit | None) -> bool:
        """Take up this dropout and this unit of the loss; False where the machine code does not have them."""
        place = 0 if dropout is None else dropout.state.data_ptr()
        if dropout is not self.dropout or place != self._place:
            take = self._native.take_dropout
            if not (take(None, (), 0) if dropout is None else take(*dropout)):
                return False
            self.dropout, self._place = dropout, place
        if loss is not self.loss:
            if loss is None or not self._native.take_loss(loss):
                return False
            self.loss = loss
        return True


class NativeStep:
    """Steps of up to ``m`` rows; called as ``TorchStep.step`` is.

    Args:
        units: the machine code for the network's dtype.
        plan: plans the step on torch's operators.
        threads: the most threads of a step.
    """

    def __init__(
        self, net: Network, m: int, units: cpu.NativeUnits, plan: Callable[[], Callable[..., None]], threads: int = 1
    ) -> None:
        self._net, self._plan = net, plan
        self._operators: Callable[..., None] | None = None
        optimizer = net.optimizer
        clips = net.rule.max_grad_norm is not None
        self._gradients = [torch.zeros_like(t) for t in optimizer.params] if clips else []
        self._losses = LossUnits(net.loss, net.options, net.dtype)
        self._usual = self._losses.usual
        self._native = cpu.NativeNetwork(
            units,
            [self._parts(layer) for layer in net.layers],
            m,
            loss=self._usual,
            rule=net.rule.name,
            lowest=net.lowest,
            groups=len(net.rules),
            count=optimizer.count,
            counts=net.rule.counted,
            clips=clips,
            averages=net.averages,
            per_class=self._losses.per_class,
            threads=threads,
        )
        self._taken = Taken(self._native, self._usual)
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
        write_settings(self._native, net.rule, net.rules, net.options, plain=net.plain)
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
    ) -> Again | None:
        """``TorchStep.step``, and ``update`` as the step on operators takes it."""
        if update and self.made(x, y, out, rows, weight):
            return self._native.again if self._native.is_plain and self._net.dropout is None else None
        if not self._made_otherwise(x, y, out, rows, weight, update):
            self.by_operators(x, y, out, rows, weight, update=update)
        return None

    def _made_otherwise(
        self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None, weight: Tensor | None, update: bool
    ) -> bool:
        """``made`` for gradients without an update, and for labels that torch ignores unasked."""
        if not update:
            grads = self._net.optimizer.grads
            for i, grad in enumerate(grads):
                if not grad.is_contiguous():  # operators may have left a gradient in a product's own buffer
                    grads[i] = grad.contiguous()
            self._native.gradients_go(grads)
            self._native.set_updates(False)
        try:
            if not update and self.made(x, y, out, rows, weight):
                return True
            ignoring = self._ignoring(y)
            return ignoring is not None and self.made(x, y, out, rows, weight, ignoring)
        finally:
            self._native.set_updates(True)

    def made(
        self,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        rows: Tensor | None = None,
        weight: Tensor | None = None,
        loss: cpu.LossUnit | None = None,
    ) -> bool:
        """Whether the machine code has made the step; if not, nothing has changed, and a class may be out of range.

        ``loss`` is the unit that computes the loss; None: what targets and weights say.
        """
        taken = self._taken
        usual = weight is None and loss is None and y.dtype is self._losses.target and taken.loss is self._usual
        drops = self._net.dropout is not None or taken.dropout is not None
        if (drops or not usual) and not self._ready(y, weight, loss):
            return False
        self._write_rates()
        if weight is not None:
            weight = weight.to(self._net.dtype)
        return self._native.step(x, y, out, weight) if rows is None else self._at(x, y, out, rows, weight)

    def _at(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor, weight: Tensor | None) -> bool:
        return self._native.steps(x, y, rows.contiguous(), rows.shape[0], None, out, weight)

    def epoch(
        self,
        x: Tensor,
        y: Tensor,
        batch: int,
        order: Tensor,
        rates: Tensor,
        losses: Tensor,
        weight: Tensor | None = None,
    ) -> bool:
        """``TorchStep.epoch``; False where the machine code does not have it, and nothing has changed then."""
        weight = None if weight is None else weight.to(self._net.dtype)
        ready = self._ready(y, weight)
        while ready:
            self._write_rates()
            if self._native.steps(x, y, order.contiguous(), batch, rates.contiguous(), losses, weight):
                return True
            ignoring = self._ignoring(y)
            ready = ignoring is not None and self._ready(y, weight, ignoring)
        return False

    def _ignoring(self, y: Tensor) -> cpu.LossUnit | None:
        """The unit that ignores labels as torch does unasked, if there are such labels and it is not in use yet."""
        unit = self._losses.ignoring
        ignores = unit is not None and unit is not self._taken.loss and not y.is_floating_point()
        return unit if ignores and bool((y == IGNORED).any()) else None

    def _ready(self, y: Tensor, weight: Tensor | None, loss: cpu.LossUnit | None = None) -> bool:
        """Take up dropout and the unit of the loss; False where the machine code does not have them."""
        return self._taken.take(self._net.dropout, loss or self._losses.of(y, weight))

    @property
    def by_operators(self) -> Callable[..., None]:
        """The step on torch's operators."""
        if self._operators is None:
            self._operators = self._plan()
        return self._operators
