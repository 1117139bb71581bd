"""The optimizer of some members of an ensemble on plain torch: clipping, loss scale and rule, member by member."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu_member_span import Ensemble, Span
from .loss_scale import BACKOFF, GROWTH, GROWTH_STEPS, LEAST
from .optimizers import Optimizer


class MemberUpdate:
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
        for rule, params, grads, states, count, counts, averages in self._groups:
            if counts is not None:
                counts.add_(self._one)
            if rate == rate:
                rule.lr = rate
            rule.update(params, grads, states, count, None)
            if averages:
                torch._foreach_lerp_(averages, params, rule.ema_weight(count))
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
                self._take(slice(start, i), net.rules_with(keys[start][0]))
            start = i
        self._version = net.version

    def _take(self, part: slice, rules: list[Optimizer]) -> None:
        """Members side by side, whose param groups have these rules, take a call for each."""
        counted = None if self._counts is None else self._counts[part]
        count = self._net.zero if counted is None else counted[0]
        numbers = self._net.group_of or [0] * len(self._params)
        for number, rule in enumerate(rules):
            places = [i for i, of in enumerate(numbers) if of == number]
            if not places:
                continue
            params, grads = ([tensors[i][part] for i in places] for tensors in (self._params, self._grads))
            states = [[self._states[name][i][part] for i in places] for name in rule.states]
            if rule.spare:
                states += [[torch.empty_like(param) for param in params], [self._one]]
            averages = [self._states["ema"][i][part] for i in places] if "ema" in self._states else []
            self._groups.append((rule, params, grads, states, count, counted, averages))
            counted = None  # counted once

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
