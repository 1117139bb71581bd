"""A step of some members of an ensemble on plain torch: batched products on buffers allocated once.

Shapes, with e members: X [M, K] for all or [e, M, K], W [e, N, K], b [e, N], Z, A, dZ [e, M, N]. The formulas are those
of ``cpu_step``. Plain SGD multiplies dA of the last layer by each member's learning rate. All further gradients are
linear in dA, so that each weight is updated inside its gradient's product, whatever the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import cpu
from ..activations import ACTIVATIONS
from ..base.losses import takes_classes
from .cpu_losses import cross_entropy_terms, loss_function
from .loss_scale import BACKOFF, GROWTH, GROWTH_STEPS, LEAST
from .optimizers import Optimizer
from .parameters import Copies

#: Batches of so many rows with slimmer weights update in two passes (``fastmlp.cpu.products``).
_SLIM_ROWS, _SLIM = 64, 16


class MemberLayer:
    """One layer's parameters of all members, and the places of its gradients among those of all trained parameters."""

    def __init__(self, module: Any, dtype: torch.dtype, index: int) -> None:
        weight = Copies(module.weight, dtype)
        bias = None if module.bias is None else Copies(module.bias, dtype)
        self.copies = [c for c in (weight, bias) if c is not None]
        self.activation: str = module.activation
        self.weight, self.master_w, self.train_w = weight.used, weight.master, weight.trained
        self.bias = None if bias is None else bias.used
        self.master_b = None if bias is None else bias.master
        self.train_b = bias is not None and bias.trained
        self.grad_w, self.grad_b = index, index + self.train_w


class Ensemble(Protocol):
    """What a piece reads of the ensemble that it is a part of."""

    layers: list[MemberLayer]
    masters: list[Tensor]
    states: dict[str, list[Tensor]]
    counts: Tensor  #: float32 [E]: updates of each member
    scales: tuple[Tensor, Tensor] | None  #: of float16: [E] loss scales, and good steps since each last moved
    rates: Tensor  #: [E] learning rates
    rate: float  #: the learning rate of all members; NaN where they have their own
    version: int  #: raised when pieces must group their members anew
    rule: Optimizer
    loss: str
    dtype: torch.dtype
    device: torch.device
    target_dims: int
    lowest: int
    plain: bool
    zero: Tensor

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the masters."""

    def settings_of(self, member: int) -> tuple[tuple[str, float], ...]:
        """Those settings of a member that may be its own."""

    def rule_with(self, settings: tuple[tuple[str, float], ...]) -> Optimizer:
        """The rule with a member's settings."""


class Span:
    """Consecutive members: views of their tensors."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._start, self._stop = ids[0], ids[-1] + 1

    def take(self, t: Tensor) -> Tensor:
        """The members' part of a tensor [E, ...] that belongs to the ensemble."""
        return t[self._start : self._stop]

    def batch(self, name: str, t: Tensor) -> Tensor:
        """The members' part of a batch [E, ...]."""
        return t[self._start : self._stop]

    def load(self) -> None:
        """Nothing: views need no copies."""

    store = load

    def put(self, out: Tensor) -> Tensor:
        """Where the members' losses go."""
        return out[self._start : self._stop]

    def landed(self, out: Tensor) -> None:
        """Nothing: the losses are in place."""


class Packed(Span):
    """Any members: copies of their tensors side by side, since batched products need even distances."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self.ids = list(ids)
        self._index = torch.tensor(self.ids, dtype=torch.int64, device=device)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._batches: dict[tuple[object, ...], Tensor] = {}
        self._losses: Tensor | None = None

    def take(self, t: Tensor) -> Tensor:
        """A copy, which ``load`` fills and ``store`` writes back."""
        if id(t) not in self._pairs:
            self._pairs[id(t)] = t, t.new_empty((len(self.ids), *t.shape[1:]))
        return self._pairs[id(t)][1]

    def batch(self, name: str, t: Tensor) -> Tensor:
        """A copy of the members' part."""
        key = name, t.shape, t.dtype
        if key not in self._batches:
            self._batches[key] = t.new_empty((len(self.ids), *t.shape[1:]))
        return torch.index_select(t, 0, self._index, out=self._batches[key])

    def load(self) -> None:
        """Copy the ensemble's tensors into those that were taken."""
        for t, copy in self._pairs.values():
            torch.index_select(t, 0, self._index, out=copy)

    def store(self) -> None:
        """Copy them back."""
        for t, copy in self._pairs.values():
            t.index_copy_(0, self._index, copy)

    def put(self, out: Tensor) -> Tensor:
        """A tensor for the losses, which ``landed`` puts into their places."""
        if self._losses is None:
            self._losses = out.new_empty(len(self.ids))
        return self._losses

    def landed(self, out: Tensor) -> None:
        """Write the losses into ``out`` [E]."""
        assert self._losses is not None
        out.index_copy_(0, self._index, self._losses)


class _Products:
    """The products of one layer for ``m`` rows of each member, into buffers.

    16 bits that the processor cannot multiply, and all 16 bits in gradients of float32 masters, are multiplied in
    float32.
    """

    def __init__(self, m: int, weight: Tensor, bias: Tensor | None, z: Tensor, dz: Tensor, wide: torch.dtype) -> None:
        self._weight, self._bias = weight, None if bias is None else bias.unsqueeze(1)
        self.z, self.dz, self.dz_t = z, dz, dz.mT
        (e, n, k), self.wide = weight.shape, wide != weight.dtype
        self._w, self._b, self._z, self._dz = weight, self._bias, z, dz
        if self.wide:
            new = weight.new_empty
            self._w = new((e, n, k), dtype=wide)
            self._b = None if bias is None else new((e, 1, n), dtype=wide)
            self._x, self._z, self._dz = (new((e, m, c), dtype=wide) for c in (k, n, n))
            self._dx = new((e, m, k), dtype=wide)
        self._w_t, self._dz_t = self._w.mT, self._dz.mT
        #: Where dW^T is computed.
        self._flat = self._w.new_empty((e, k, n)) if k < _SLIM <= n else None

    def linear(self, x: Tensor) -> Tensor:
        """Z = X W^T + b."""
        if self.wide:
            self._w.copy_(self._weight)
            x = self._x.copy_(x)
            if self._b is not None and self._bias is not None:
                self._b.copy_(self._bias)
        if self._b is None:
            torch.bmm(x, self._w_t, out=self._z)
        else:
            torch.baddbmm(self._b, x, self._w_t, out=self._z)
        return self.z.copy_(self._z) if self.wide else self.z

    def dgrad(self, dx: Tensor) -> Tensor:
        """DX = dZ W, in ``dx``; ``linear`` has been called."""
        if not self.wide:
            return torch.bmm(self.dz, self._w, out=dx)
        return dx.copy_(torch.bmm(self._dz.copy_(self.dz), self._w, out=self._dx))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(dZ^T, X) of the weight's gradient; ``linear`` has been called with the same X."""
        if not self.wide:
            return self._dz_t, x
        self._dz.copy_(self.dz)
        return self._dz_t, self._x

    def wgrad(self, x: Tensor, into: Tensor) -> Tensor:
        """DZ^T X in ``into``, or in scratch memory of its shape; BLAS is several times as fast at a long first axis."""
        dz_t, x = self.operands(x)
        if self._flat is None:
            return torch.bmm(dz_t, x, out=into)
        torch.bmm(x.mT, dz_t.mT, out=self._flat)
        return self._flat.mT


class Piece:
    """The step of the members of a ``Span`` with ``m`` rows each."""

    def __init__(self, net: Ensemble, span: Span, m: int) -> None:
        self.span, self.m, self._net = span, m, net
        self.ids, e = span.ids, len(span.ids)
        new, layers = net.layers[0].weight.new_empty, net.layers
        self._fs = [ACTIVATIONS[layer.activation] for layer in layers]
        self._scales = None if net.scales is None else tuple(span.take(t) for t in net.scales)
        self._rate = span.take(net.rates).view(e, 1, 1) if net.plain else None
        c = layers[-1].weight.shape[1]
        self._loss = MemberLoss(net.loss, e, m, c, net.dtype, net.device)
        self._weights = [
            (span.take(layer.master_w), None if layer.master_b is None else span.take(layer.master_b))
            for layer in layers
        ]
        self._dx: list[Tensor | None] = [None] * len(layers)
        self._products: list[_Products] = []
        self._kept: list[Tensor | None] = []
        dz = self._loss.da
        for i in range(len(layers) - 1, -1, -1):
            layer, f = layers[i], self._fs[i]
            _, n, k = layer.weight.shape
            wide = cpu.product_dtype(net.dtype, net.device)
            if layer.weight.dtype != layer.master_w.dtype:
                wide = layer.master_w.dtype
            weight, bias = span.take(layer.weight), None if layer.bias is None else span.take(layer.bias)
            self._products.insert(0, _Products(m, weight, bias, new((e, m, n)), dz, wide))
            self._kept.insert(0, None if f.epilogue else new((e, m, n)))
            if i > net.lowest:
                dz = self._dx[i] = new((e, m, k))
        self._slim = [m >= _SLIM_ROWS and min(layer.weight.shape[1:]) < _SLIM for layer in layers]
        #: Scratch of plain SGD.
        self._dw = [
            torch.empty_like(w) if net.plain and slim else None
            for (w, _), slim in zip(self._weights, self._slim, strict=True)
        ]
        self._db = [torch.empty_like(b) if net.plain and b is not None else None for _, b in self._weights]
        self._update = None if net.plain else _Update(net, span)
        self._gradients: list[Tensor] | None = None

    def run(self, x: Tensor, y: Tensor, out: Tensor, update: bool) -> None:
        """One step on X [M, K] or [E, M, K] in the compute dtype; writes the members' losses into ``out`` [E].

        Without ``update`` the gradients are stored, and the parameters stay as they are.
        """
        net, span = self._net, self.span
        span.load()
        plain = net.plain and update
        if not plain and self._gradients is None:
            self._gradients = [span.take(grad) for grad in net.grads]
            span.load()
        a = x.expand(len(self.ids), -1, -1) if x.dim() == 2 else span.batch("x", x)
        y = y if y.dim() == net.target_dims else span.batch("y", y)
        inputs, saved = [], []
        for f, products, kept in zip(self._fs, self._products, self._kept, strict=True):
            inputs.append(a)
            z = products.linear(a)
            a = f.overwrite(z) if kept is None else f.into(z, kept)
            saved.append(z if f.saved == "z" else a)
        losses = span.put(out)
        da = self._loss(a, y, losses, None if self._scales is None else self._scales[0])
        span.landed(out)
        rate = 1.0
        if plain:
            rate = net.rate
            if rate != rate:  # NaN: members have rates of their own
                assert self._rate is not None
                da.mul_(self._rate)
                rate = 1.0
        for i in range(len(inputs) - 1, net.lowest - 1, -1):
            products, dx = self._products[i], self._dx[i]
            da = self._fs[i].backward(da, saved[i], inplace=True)
            below = None if dx is None else products.dgrad(dx)  # before the weight changes
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

    def update(self) -> None:
        """Apply the optimizer to the gradients that are stored."""
        self.span.load()
        if self._update is None:
            self._plain_update()
        else:
            self._update.apply(scaled=False)
        self.span.store()

    def _apply(self, i: int, x: Tensor, rate: float) -> None:
        """W -= rate dZ^T X, b -= rate sum dZ."""
        layer, products, (weight, bias) = self._net.layers[i], self._products[i], self._weights[i]
        if layer.train_w:
            dw = self._dw[i]
            if dw is None:
                weight.baddbmm_(*products.operands(x), alpha=-rate)
            else:
                weight.add_(products.wgrad(x, dw), alpha=-rate)
        if layer.train_b and bias is not None:
            db = self._db[i]
            assert db is not None
            bias.add_(torch.sum(products.dz, 1, dtype=db.dtype, out=db), alpha=-rate)

    def _store(self, i: int, x: Tensor) -> None:
        """Write dW and db into the gradients."""
        layer, products, grads = self._net.layers[i], self._products[i], self._gradients
        assert grads is not None
        if layer.train_w:
            into = grads[layer.grad_w]
            made = products.wgrad(x, into)
            if made is not into:
                into.copy_(made)
        if layer.train_b:
            into = grads[layer.grad_b]
            torch.sum(products.dz, 1, dtype=into.dtype, out=into)

    def _plain_update(self) -> None:
        """Plain SGD from stored gradients."""
        net, grads = self._net, self._gradients
        assert grads is not None
        for i, (weight, bias) in enumerate(self._weights):
            for param, place, trained in (
                (weight, net.layers[i].grad_w, net.layers[i].train_w),
                (bias, net.layers[i].grad_b, net.layers[i].train_b),
            ):
                if not trained or param is None:
                    continue
                if net.rate == net.rate:
                    param.add_(grads[place], alpha=-net.rate)
                else:
                    assert self._rate is not None
                    param.addcmul_(grads[place], self._rate.view(-1, *[1] * (param.dim() - 1)), value=-1)


class _Update:
    """Clipping, the loss scale and the rule for the members of a span, whose gradients are stored."""

    def __init__(self, net: Ensemble, span: Span) -> None:
        self._net, self._ids = net, span.ids
        self._params = [span.take(t) for t in net.masters]
        self._grads = [span.take(t) for t in net.grads]
        self._states = {name: [span.take(t) for t in tensors] for name, tensors in net.states.items()}
        self._counts = span.take(net.counts) if net.rule.counted else None
        self._scales = None if net.scales is None else tuple(span.take(t) for t in net.scales)
        e = len(self._ids)
        self._rows = [grad.view(e, -1) for grad in self._grads]
        self._groups: list[tuple[Any, ...]] = []
        self._version = -1
        first = self._params[0]
        self._one = first.new_ones(())
        self._epsilon = first.new_full((), 1e-6)
        self._norms = first.new_empty((len(self._grads), e))
        self._norm = first.new_empty(e)
        self._column = self._norm.unsqueeze(1)

    def unscale(self) -> None:
        """Divide the gradients by the members' loss scales."""
        if self._scales is not None:
            inverse = (1 / self._scales[0]).unsqueeze(1)
            for rows in self._rows:
                rows.mul_(inverse)

    def apply(self, *, scaled: bool) -> None:
        """Update the members whose gradients are finite; ``scaled``: the gradients are multiplied by the scales."""
        bad: list[bool] | None = None
        if self._scales is not None:
            if scaled:
                self.unscale()
            finite = torch.ones(len(self._ids), dtype=torch.bool, device=self._norm.device)
            for rows in self._rows:
                finite &= rows.isfinite().all(1)
            bad = finite.logical_not().tolist()
        if self._net.rule.max_grad_norm is not None:
            self._clip(self._net.rule.max_grad_norm)
        if self._version != self._net.version or bad is not None:
            self._group(bad)
        rate = self._net.rate
        for rule, params, grads, states, count, counts in self._groups:
            if counts is not None:
                counts.add_(self._one)
            if rate == rate:
                rule.lr = rate
            rule.update(params, grads, states, count, None)
        if bad is not None:
            self._adjust(finite)
            self._version = -1

    def _clip(self, most: float) -> None:
        """Multiply by min(1, max_grad_norm / (|g| + 1e-6)), |g| the 2-norm of all gradients of the member."""
        for rows, norm in zip(self._rows, self._norms.unbind(), strict=True):
            torch.linalg.vector_norm(rows, dim=1, out=norm)
        torch.linalg.vector_norm(self._norms, dim=0, out=self._norm)
        torch.reciprocal(self._norm.add_(self._epsilon), out=self._norm).mul_(most).clamp_(max=1.0)
        for rows in self._rows:
            rows.mul_(self._column)

    def _group(self, bad: list[bool] | None) -> None:
        """Members side by side that have the same settings and number of updates take one call of the rule."""
        net, counts = self._net, None if self._counts is None else self._counts.tolist()
        keys = [(net.settings_of(e), None if counts is None else counts[i]) for i, e in enumerate(self._ids)]
        self._groups, start = [], 0
        for i in range(1, len(keys) + 1):
            split = i == len(keys) or keys[i] != keys[start] or (bad is not None and bad[i] != bad[start])
            if not split:
                continue
            if bad is None or not bad[start]:
                part = slice(start, i)
                count = counted = None
                if self._counts is not None:
                    counted = self._counts[part]
                    count = counted[0]
                rule = net.rule_with(keys[start][0])
                params, grads = [t[part] for t in self._params], [t[part] for t in self._grads]
                states = [[t[part] for t in self._states[name]] for name in rule.states] + self._spare(part)
                self._groups.append((rule, params, grads, states, net.zero if count is None else count, counted))
            start = i
        self._version = net.version

    def _spare(self, part: slice) -> list[list[Tensor]]:
        """What the update of a rule with ``spare`` works in."""
        return [[torch.empty_like(t[part]) for t in self._params], [self._one]] if self._net.rule.spare else []

    def _adjust(self, finite: Tensor) -> None:
        """Move the members' scales as ``LossScale.adjust`` does."""
        assert self._scales is not None
        scale, good_steps = self._scales
        good_steps.add_(1).mul_(finite)
        grows = good_steps >= GROWTH_STEPS
        grown = scale * GROWTH
        grown = torch.where(grown.isfinite(), grown, scale)
        scale.copy_(torch.where(finite, torch.where(grows, grown, scale), scale * BACKOFF).clamp_(min=LEAST))
        good_steps.mul_(grows.logical_not())


class MemberLoss:
    """Each member's loss and dA [e, M, C], in buffers; cross-entropy for all members together."""

    def __init__(self, loss: str, e: int, m: int, c: int, dtype: torch.dtype, device: torch.device) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.da = torch.empty((e, m, c), dtype=dtype, device=device)
        self._a = None if wide == dtype else torch.empty((e, m, c), dtype=wide, device=device)
        self._wide_da = self.da if wide == dtype else torch.empty((e, m, c), dtype=wide, device=device)
        self._each = list(self._wide_da.unbind())
        self._classes = takes_classes(loss)
        self._y = torch.empty((e, m), dtype=torch.int64, device=device)
        self._together: Callable[..., None] | None = None
        if loss == "cross_entropy":
            self._together = cross_entropy_terms(e, m, c, self._wide_da)
        else:
            self._one = loss_function(loss, m, c, wide, device)

    def __call__(self, a: Tensor, y: Tensor, out: Tensor, scale: Tensor | None) -> Tensor:
        """DA for A [e, M, C], multiplied by ``scale`` [e]; writes the losses into ``out`` [e].

        Y is [M] or [e, M] class numbers, or values [M, C] or [e, M, C].
        """
        a = a if self._a is None else self._a.copy_(a)
        if self._together is not None:
            self._together(a, self._y.copy_(y), out)
        else:
            shared = y.dim() == (1 if self._classes else 2)
            ys = [y] * len(self._each) if shared else y.unbind()
            for into, of_member, target, loss in zip(self._each, a.unbind(), ys, out.unbind(), strict=True):
                into.copy_(self._one(of_member, target, loss))
        if scale is not None:
            self._wide_da.mul_(scale.view(-1, 1, 1))
        return self.da if self._a is None else self.da.copy_(self._wide_da)
