"""A step of some members of an ensemble on plain torch: batched products on buffers allocated once.

Shapes, with e members: X [M, K] for all or [e, M, K], W [e, N, K], b [e, N], Z, A, dZ [e, M, N]. The formulas are those
of ``cpu_step``. Plain SGD multiplies dA of the last layer by each member's learning rate. All further gradients are
linear in dA, so that each weight is updated inside its gradient's product, whatever the rates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .cpu_dropout import Mask, StepDropout, masks
from .cpu_losses import LossFunction, cross_entropy_terms, loss_function, weighted_loss_function
from .cpu_member_products import Batched, Each
from .cpu_member_span import Ensemble, Span, target_dims
from .cpu_member_update import MemberUpdate
from .cpu_row_weights import WeightedLoss
from .loss_options import LossOptions


class Piece:
    """The step of the members of a ``Span`` with ``m`` rows each; ``each`` multiplies member by member."""

    def __init__(self, net: Ensemble, span: Span, m: int, *, each: bool = False) -> None:
        self.span, self.m, self._net = span, m, net
        self.ids, e = span.ids, len(span.ids)
        new, layers = net.layers[0].weight.new_empty, net.layers
        self._fs = [ACTIVATIONS[layer.activation] for layer in layers]
        self._scales = None if net.scales is None else tuple(span.take(t) for t in net.scales)
        self._rate = span.take(net.rates).view(e, 1, 1) if net.plain else None
        c = layers[-1].weight.shape[1]
        self._loss = MemberLoss(net.loss, e, m, c, net.dtype, net.device, net.options)
        products = Each if each else Batched
        self._biases: list[Tensor | None] = []
        self._products: list[Batched] = []
        self._kept: list[Tensor | None] = []
        #: dZ of each layer, and scratch of plain SGD.
        self._dz: list[Tensor] = []
        self._db: list[Tensor | None] = []
        dz = self._loss.da
        for i in range(len(layers) - 1, -1, -1):
            layer, f = layers[i], self._fs[i]
            _, n, k = layer.weight.shape
            weight, bias = span.take(layer.weight), None if layer.bias is None else span.take(layer.bias)
            dx = new((e, m, k)) if i > net.lowest else None
            z, master = new((e, m, n)), span.take(layer.master_w)
            grad = None if net.plain or not layer.train_w else span.take(net.grads[layer.grad_w])
            self._products.insert(0, products(m, layer, weight, bias, master, z, dz, dx, grad))
            self._kept.insert(0, None if f.epilogue else new((e, m, n)))
            master_b = None if layer.master_b is None else span.take(layer.master_b)
            self._biases.insert(0, master_b)
            self._db.insert(0, torch.empty_like(master_b) if net.plain and master_b is not None else None)
            self._dz.insert(0, dz)
            dz = dz if dx is None else dx
        self._dropout: StepDropout | None = None
        self._masks: list[Mask | None] = [None] * len(layers)
        self._update = None if net.plain else MemberUpdate(net, span)
        self._gradients: list[Tensor] | None = None

    def _masks_of(self, dropout: StepDropout | None) -> list[Mask | None]:
        """Of each layer that drops."""
        if self._dropout is not dropout:
            m, net, ids = self.m, self._net, self.ids
            self._masks = [None] * len(net.layers)
            if dropout is not None:
                shapes = [(len(ids), m, layer.weight.shape[1]) for layer in net.layers]
                # Masks of members side by side are made at once.
                first = [i for i, member in enumerate(ids) if not i or ids[i - 1] != member - 1]
                ends = [*first[1:], len(ids)]
                runs = [(ids[i] * m, (end - i) * m) for i, end in zip(first, ends, strict=True)]
                self._masks = masks(dropout, shapes, net.zero.new_empty(0, dtype=net.dtype), runs, net.members * m)
            self._dropout = dropout
        return self._masks

    def run(
        self,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        update: bool,
        weight: Tensor | None = None,
        of_pass: tuple[int, int] = (0, 0),
    ) -> None:
        """One step on X [M, K] or [E, M, K] in the compute dtype; writes the members' losses into ``out`` [E].

        ``weight`` are sample weights [M] or [E, M]. Without ``update`` the gradients are stored, and the parameters
        stay as they are. ``of_pass`` are the values of the state of dropout.
        """
        net, span = self._net, self.span
        masks = self._masks_of(net.dropout)
        span.load()
        plain = net.plain and update
        if not plain:
            self._take_gradients()
        a = x.expand(len(self.ids), -1, -1) if x.dim() == 2 else span.batch("x", x)
        y = y if y.dim() == target_dims(y) else span.batch("y", y)
        weight = weight if weight is None or weight.dim() == 1 else span.batch("weight", weight)
        inputs, saved = [], []
        for f, products, kept, mask in zip(self._fs, self._products, self._kept, masks, strict=True):
            inputs.append(a)
            z = products.linear(a)
            a = f.overwrite(z) if kept is None else f.into(z, kept)
            saved.append(z if f.saved == "z" else a)
            if mask is not None:
                a = mask.forward(a, of_pass)
        losses = span.put(out)
        da = self._loss(a, y, losses, None if self._scales is None else self._scales[0], weight)
        span.landed(out)
        rate = 1.0
        if plain:
            rate = net.rate
            if rate != rate:  # NaN: members have rates of their own
                assert self._rate is not None
                da.mul_(self._rate)
                rate = 1.0
        for i in range(len(inputs) - 1, net.lowest - 1, -1):
            if (mask := masks[i]) is not None:
                mask.backward(da)
            da = self._fs[i].backward(da, saved[i], inplace=True)
            below = self._products[i].dgrad() if i > net.lowest else None  # before the weight changes
            if plain:
                self._apply(i, inputs[i], rate)
            else:
                self._store(i, inputs[i])
            if below is not None:
                da = below
        if self._update is not None:
            if update:
                self._update.apply(scaled=True)
            else:
                self._update.unscale()
        span.store()

    def _take_gradients(self) -> None:
        """Those of the span's members, where the gradients are."""
        if self._gradients is None:
            self._gradients = [self.span.take(grad) for grad in self._net.grads]
            self.span.load()

    def update(self) -> None:
        """Apply the optimizer to the gradients that are stored."""
        self.span.load()
        self._take_gradients()
        if self._update is None:
            self._plain_update()
        else:
            self._update.apply(scaled=False)
        self.span.store()

    def _apply(self, i: int, x: Tensor, rate: float) -> None:
        """W -= rate dZ^T X, b -= rate sum dZ."""
        layer, bias, db = self._net.layers[i], self._biases[i], self._db[i]
        if layer.train_w:
            self._products[i].update(x, rate)
        if layer.train_b and bias is not None and db is not None:
            bias.add_(torch.sum(self._dz[i], 1, dtype=db.dtype, out=db), alpha=-rate)

    def _store(self, i: int, x: Tensor) -> None:
        """Write dW and db into the gradients."""
        layer, grads = self._net.layers[i], self._gradients
        assert grads is not None
        if layer.train_w:
            self._products[i].wgrad(x, grads[layer.grad_w])
        if layer.train_b:
            into = grads[layer.grad_b]
            torch.sum(self._dz[i], 1, dtype=into.dtype, out=into)

    def _plain_update(self) -> None:
        """Plain SGD from stored gradients."""
        net, span, grads = self._net, self.span, self._gradients
        assert grads is not None
        for master, grad in zip(net.masters, grads, strict=True):
            param = span.take(master)
            if net.rate == net.rate:
                param.add_(grad, alpha=-net.rate)
            else:
                assert self._rate is not None
                param.addcmul_(grad, self._rate.view(-1, *[1] * (param.dim() - 1)), value=-1)


class MemberLoss:
    """Each member's loss and dA [e, M, C], in buffers; cross-entropy without options for all members together."""

    def __init__(
        self, loss: str, e: int, m: int, c: int, dtype: torch.dtype, device: torch.device, options: LossOptions
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.da = torch.empty((e, m, c), dtype=dtype, device=device)
        self._a = None if wide == dtype else torch.empty((e, m, c), dtype=wide, device=device)
        self._wide_da = self.da if wide == dtype else torch.empty((e, m, c), dtype=wide, device=device)
        self._each = list(self._wide_da.unbind())
        self._y = torch.empty((e, m), dtype=torch.int64, device=device)
        self._together: Callable[..., None] | None = None
        self._of_one = loss, m, c, wide, device, None, options
        self._one: LossFunction | None = None
        self._weighted: WeightedLoss | None = None
        if loss == "cross_entropy" and options.is_plain:
            self._together = cross_entropy_terms(e, m, c, self._wide_da)

    def __call__(self, a: Tensor, y: Tensor, out: Tensor, scale: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """DA for A [e, M, C], multiplied by ``scale`` [e]; writes the losses into ``out`` [e].

        Y is [M] or [e, M] class numbers, or [M, C] or [e, M, C] floating-point: values, or probabilities. The sample
        weights are [M] or [e, M].
        """
        a = a if self._a is None else self._a.copy_(a)
        if self._together is not None and weight is None and not y.is_floating_point():
            self._together(a, self._y.copy_(y), out)
        else:
            count = len(self._each)
            ys = [y] * count if y.dim() == target_dims(y) else y.unbind()
            weights = [weight] * count if weight is None or weight.dim() == 1 else weight.unbind()
            for into, of_member, target, loss, own in zip(
                self._each, a.unbind(), ys, out.unbind(), weights, strict=True
            ):
                into.copy_(self._of_member(of_member, target, loss, own))
        if scale is not None:
            self._wide_da.mul_(scale.view(-1, 1, 1))
        return self.da if self._a is None else self.da.copy_(self._wide_da)

    def _of_member(self, a: Tensor, y: Tensor, out: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            self._one = self._one or loss_function(*self._of_one)
            return self._one(a, y, out)
        self._weighted = self._weighted or weighted_loss_function(*self._of_one)
        return self._weighted(a, y, out, weight)
