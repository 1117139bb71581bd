"""The training step on plain torch: in-place BLAS on buffers allocated once, no tape. It is what a CPU runs.

A step is a fixed list of calls: forward, loss and dA, and from the last layer down the activation's derivative, dX, and
dW with its update. Plain SGD updates each weight inside its gradient's product. ``fastmlp.cpu`` chooses the products
of a layer and how the whole step runs, once per batch size.

On another device than a CPU (float64 on a GPU) aten makes all products, and nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import cpu
from ..nn import Linear
from ..online import online_epoch
from .cpu_dropout import StepDropout, advance, numbers
from .cpu_native import Again, NativeStep, has_native, native_plan
from .cpu_plan import Layer, Network, Plan
from .groups import Groups
from .loss_options import PLAIN, LossOptions
from .optimizers import Optimizer

if TYPE_CHECKING:
    from .data_parallel import DataParallel

#: Batch sizes whose plans are kept; a further one takes the place of the first.
_PLANS = 8


class TorchStep:
    """Forward, backward and update of an MLP in torch operations; ``fastmlp.TrainStep`` is the public way to it."""

    def __init__(
        self,
        layers: list[Linear],
        rule: Optimizer,
        loss: str,
        dtype: torch.dtype,
        *,
        groups: Groups | None = None,
        options: LossOptions = PLAIN,
        parallel: DataParallel | None = None,
    ) -> None:
        self.network = Network(layers, rule, loss, dtype, groups, options, parallel)
        self.optimizer = self.network.optimizer
        self._plans: dict[int, Callable[..., Again | None]] = {}

    def step(
        self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None = None, weight: Tensor | None = None
    ) -> Again | None:
        """One step on x [M, K] (float or uint8) and targets; writes the mean loss into ``out`` (0-d).

        ``rows`` int64 [M] takes those rows of x, y and the sample weights. Returns what can repeat the step, if there
        is a shorter way.
        """
        m = x.shape[0] if rows is None else rows.shape[0]
        return (self._plans.get(m) or self._planned(m))(x, y, out, rows, weight)

    @property
    def dropout(self) -> StepDropout | None:
        """What a pass drops; it may be assigned between steps."""
        return self.network.dropout

    @dropout.setter
    def dropout(self, dropout: StepDropout | None) -> None:
        self.network.dropout = dropout

    def _planned(self, m: int) -> Callable[..., Again | None]:
        """``_step`` with the plan of ``m`` rows."""
        planned = self._plans.get(m)
        if planned is None:
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            net = self.network
            weights = [layer.weight for layer in net.layers]
            plan, native = partial(_plan, net, m), native_plan(net, m)
            planned = cpu.plan_step(net.kind(), m, weights, net.dtype, plan, self._scratch, native)
            self._plans[m] = planned
        return planned

    def _scratch(
        self, m: int
    ) -> tuple[Callable[[], Callable[..., Again | None]], cpu.NativePlan | None, tuple[Tensor, ...]]:
        """What plans steps on a network to measure with, and a batch for them."""
        net = self.network.scratch()
        return partial(_plan, net, m), native_plan(net, m), net.batch(m)

    def gradients(
        self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False, weight: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients of the trained masters, in the order of the parameters; parameters stay as they are."""
        kept = [g.clone() for g in self.optimizer.grads] if accumulate else None
        self._planned(x.shape[0])(x, y, out, None, weight, update=False)
        grads = self.optimizer.grads
        if self.network.scale is not None:
            torch._foreach_mul_(grads, 1 / self.network.scale)
        if kept is not None:
            torch._foreach_add_(grads, kept)
        return grads

    def update(self) -> None:
        """Apply the optimizer to what ``gradients`` left."""
        self.network.follow()
        self.optimizer.update(scaled=False)
        self.network.publish()

    @staticmethod
    def structure(rule: Optimizer) -> tuple[object, ...]:
        """What the engine is built for. Plain SGD has steps of its own, which update within a product."""
        return *rule.structure, rule.is_plain_sgd

    def settings_changed(self) -> None:
        """Take up the rule's settings; those of its ``structure`` are as they were."""
        self.optimizer.settings_changed()
        self.network.changes += 1

    def rates_changed(self) -> None:
        """The rules have other learning rates, and every step reads them."""

    def updated(self) -> None:
        """Take the versions of the parameters for those of this engine's last update."""
        for copies in self.network.copies:
            copies.published()

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each trained parameter, live: optimizer state, and masters of 16 bits."""
        self.network.follow()
        state = dict(self.optimizer.states)
        if any(c.master is not c.data for c in self.network.copies):
            state["master"] = list(self.optimizer.params)
        return state

    def counters(self) -> dict[str, float]:
        """The number of updates, if the rule counts; float16's loss scale and the good steps since it last moved."""
        return self.optimizer.counters()

    def set_counters(self, counters: dict[str, float]) -> None:
        """What ``counters`` returned; call it after ``parameter_state`` was written to."""
        self.optimizer.set_counters(counters)
        self.network.publish()

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Tensor,
        losses: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Steps over ``order``, each with its learning rate (float64 on the host); writes each step's loss.

        With groups ``lrs`` is [steps, G].
        """
        rules = self.network.rules
        rows = min(batch_size, order.shape[0])  # of the largest step, for which buffers are allocated
        if cpu.native_rows(rows) and has_native(self.network):
            planned = self._planned(rows)
            if isinstance(planned, NativeStep) and planned.epoch(images, labels, rows, order, lrs, losses, weight):
                return
        if batch_size == 1 and weight is None and self._is_online(images, labels):
            try:
                self._online(images, labels, order, lrs, losses)
                return
            except IndexError:  # nothing has changed, and the steps below know a label that is ignored
                pass
        base = [rule.lr for rule in rules]
        try:
            rates = lrs.view(len(lrs), -1).tolist()
            for rows, lr, out in zip(order.split(batch_size), rates, losses.unbind(), strict=True):
                for rule, rate in zip(rules, lr, strict=True):
                    rule.lr = rate
                self.step(images, labels, out, rows, weight)
        finally:
            for rule, rate in zip(rules, base, strict=True):
                rule.lr = rate

    def _online(self, images: Tensor, labels: Tensor, order: Tensor, lrs: Tensor, losses: Tensor) -> None:
        layers = self.network.layers
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        activations = [layer.activation for layer in layers]
        online_epoch(weights, biases, activations, images, labels, lrs.tolist(), order, losses=losses)

    def _is_online(self, images: Tensor, labels: Tensor) -> bool:
        """Whether single-sample steps are those of the exact blocked recurrence (``fastmlp.online``)."""
        net = self.network
        return (
            net.plain
            and net.groups is None
            and not net.averages
            and net.device.type == "cpu"
            and net.loss == "cross_entropy"
            and net.options.is_plain
            and net.dropout is None
            and not labels.is_floating_point()
            and net.dtype in (torch.float32, torch.float64)
            and images.dtype in (net.dtype, torch.uint8)
            and not net.copies
            and all(x.train_w and (x.train_b or x.bias is None) for x in net.layers)
        )


def _plan(net: Network, m: int) -> Callable[..., Again | None]:
    return partial(_step, net, Plan(net, m))


def _step(
    net: Network,
    plan: Plan,
    x: Tensor,
    y: Tensor,
    out: Tensor,
    rows: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    update: bool = True,
) -> None:
    """``TorchStep.step``; without ``update`` the gradients are stored, and the parameters stay as they are."""
    net.follow()
    if rows is not None:
        if plan.y is None or plan.y.dtype != y.dtype:
            plan.y = y.new_empty((rows.shape[0], *y.shape[1:]))
        y = torch.index_select(y, 0, rows, out=plan.y)
        if weight is not None:
            if plan.weight is None or plan.weight.dtype != weight.dtype:
                plan.weight = weight.new_empty(rows.shape[0])
            weight = torch.index_select(weight, 0, rows, out=plan.weight)
    a = _input(net, plan, x, rows)
    inputs, saved = [], []
    dropout, masks = net.dropout, plan.masks(net.dropout)
    of_pass = (0, 0) if dropout is None else numbers(dropout)
    for layer, products, kept, mask in zip(net.layers, plan.products, plan.kept_a, masks, strict=True):
        inputs.append(a)
        z = products.linear(a)
        a = z if kept is None else layer.f.into(z, kept)
        saved.append(z if layer.saves_z else a)
        if mask is not None:
            a = mask.forward(a, of_pass)
    da = plan.loss(a, y, out) if weight is None else plan.weighted_loss(a, y, out, weight)
    consume = _apply if update and net.plain else _store
    for i in range(len(inputs) - 1, net.lowest - 1, -1):
        products = plan.products[i]
        if (mask := masks[i]) is not None:
            mask.backward(da)
        dz = net.layers[i].f.backward(da, saved[i], inplace=True)
        if products.dgrad is not None:  # before the weight changes
            da = products.dgrad(dz)
        consume(net, net.layers[i], products, dz, inputs[i])
    if net.parallel is not None:
        net.optimizer.reduce(out, net.parallel.counted_rows(net.loss, y, weight, net.options))
    if update:
        if not net.plain:
            net.optimizer.update(scaled=True)
        elif net.averages:
            net.optimizer.updated()
        net.publish()
    if dropout is not None:
        advance(dropout)


def _input(net: Network, plan: Plan, x: Tensor, rows: Tensor | None) -> Tensor:
    """X in the compute dtype: gathered, converted, pixels scaled; x itself when nothing is to be done."""
    if x.dtype == net.dtype:
        return x if rows is None else torch.index_select(x, 0, rows, out=plan.x)
    source = x
    if rows is not None:
        if plan.pixels is None or plan.pixels.dtype != x.dtype:
            plan.pixels = torch.empty_like(plan.x, dtype=x.dtype)
        source = torch.index_select(x, 0, rows, out=plan.pixels)
    plan.x.copy_(source)
    return plan.x.mul_(net.pixel) if x.dtype == torch.uint8 else plan.x


def _apply(net: Network, layer: Layer, products: cpu.Products, dz: Tensor, x: Tensor) -> None:
    """Plain SGD: W -= lr dZ^T X, b -= lr sum dZ."""
    db = layer.db
    if products.update is not None:
        products.update(dz, x, layer.rule_w.lr)
    if db is not None and layer.row_b is not None:
        # Of a single row, dZ is its own sum.
        is_sum = dz.shape[0] == 1 and dz.dtype == db.dtype
        summed = dz if is_sum else torch.sum(dz, 0, True, dtype=db.dtype, out=db)
        layer.row_b.add_(summed, alpha=-layer.rule_b.lr)


def _store(net: Network, layer: Layer, products: cpu.Products, dz: Tensor, x: Tensor) -> None:
    """Write dW and db into the gradients."""
    grads = net.optimizer.grads
    if layer.train_w:
        into = grads[layer.grad_w]
        if products.wgrad is None:
            torch.mm(dz.t(), x, out=into)
        else:
            grad = products.wgrad(dz, x)
            if grad.dtype == into.dtype:
                grads[layer.grad_w] = grad
            else:
                into.copy_(grad)
    if layer.train_b:
        into = grads[layer.grad_b]
        torch.sum(dz, 0, dtype=into.dtype, out=into)
