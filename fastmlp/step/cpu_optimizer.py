"""The optimizer of the training step on plain torch: clips and updates tensors, in memory allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .groups import Groups
from .loss_scale import LossScale
from .optimizers import Optimizer

if TYPE_CHECKING:
    from .data_parallel import DataParallel, Sums


class TorchOptimizer:
    """Clips gradients and applies them to ``params``.

    Args:
        params: float32 or float64 tensors, updated in place.
        rule: the update; ``rule.lr`` is read every time.
        loss_scale: float16's; a step whose gradients overflow is skipped.
        groups: of the params; None: all have the rule.
        parallel: the processes whose gradients are added up, or None.

    Attributes:
        states: what the rule keeps of each parameter, live, by name.
    """

    def __init__(
        self,
        params: list[Tensor],
        rule: Optimizer,
        loss_scale: LossScale | None,
        groups: Groups | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        self.params, self.rule, self.loss_scale = params, rule, loss_scale
        self._sums: Sums | None = None
        if parallel is not None:
            self._sums = parallel.sums([t.numel() for t in params], params[0].dtype)
        first = params[0]
        self._grads: list[Tensor] | None = None
        self.states = {name: [torch.zeros_like(t) for t in params] for name in rule.kept}
        self._step = torch.zeros((), dtype=torch.float32, device=first.device)
        self._one = torch.ones_like(self._step)
        self._lists = [self.states[name] for name in rule.states]
        self._averages = self.states.get("ema", [])
        if rule.spare:
            self._lists += [[torch.empty_like(t) for t in params], [first.new_ones(())]]
        #: Per group its rule, the places of its parameters, the parameters, and their part of the lists.
        self._groups: list[tuple[Optimizer, list[int], list[Tensor], list[list[Tensor]]]] = []
        for number, of_group in enumerate(groups.rules if groups is not None else ()):
            places = [i for i, own in enumerate(groups.numbers) if own == number]  # type: ignore[union-attr]
            if places:
                parts = [t if len(t) < len(params) else [t[i] for i in places] for t in self._lists]
                self._groups.append((of_group, places, [params[i] for i in places], parts))
        if rule.max_grad_norm is not None:
            self._norms = first.new_zeros(len(params))
            self._norm_of = list(self._norms.unbind())
            self._norm, self._coefficient = first.new_zeros(()), first.new_zeros(())
            self._max_norm, self._epsilon = first.new_full((), rule.max_grad_norm), first.new_full((), 1e-6)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients that ``update`` applies, one per parameter; allocated, as zeros, when asked for."""
        if self._grads is None:
            self._grads = [torch.zeros_like(t) for t in self.params]
        return self._grads

    @property
    def count(self) -> Tensor:
        """0-d float32, live: the number of updates, if the rule counts."""
        return self._step

    def reduce(self, loss: Tensor, rows: int | Tensor) -> None:
        """Make ``grads`` and ``loss``, means over ``rows`` (a sum of weights), those over the rows of all processes."""
        assert self._sums is not None
        grads, parts = self.grads, self._sums.parts
        own = [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]
        torch._foreach_copy_(own, grads)  # a product may have left a gradient in a buffer of its own
        self._sums.reduce(loss, rows)
        grads[:] = own

    def settings_changed(self) -> None:
        """Take up a changed ``rule.max_grad_norm``; every other setting is read at each update."""
        if self.rule.max_grad_norm is not None:
            self._max_norm.fill_(self.rule.max_grad_norm)

    def counters(self) -> dict[str, float]:
        """The number of updates, if the rule counts; float16's loss scale and the good steps since it last moved."""
        counters = {"step": float(self._step.item())} if self.rule.counted else {}
        return counters | (self.loss_scale.counters() if self.loss_scale is not None else {})

    def set_counters(self, counters: dict[str, float]) -> None:
        """What ``counters`` returned."""
        self._step.fill_(counters.get("step", 0.0))
        if self.loss_scale is not None:
            self.loss_scale.set_counters(counters)

    def update(self, *, scaled: bool) -> None:
        """Apply ``grads``; ``scaled`` says whether they are multiplied by the loss scale. May overwrite them."""
        grads, skip = self.grads, None
        if self.loss_scale is not None:
            self.loss_scale.check(grads, scaled=scaled)
            skip = self.loss_scale.overflow
        if self.rule.max_grad_norm is not None:
            self._clip(grads)
        if self.rule.counted:
            self._step.add_(self._one if skip is None else self._one - skip)
        if not self._groups:
            self.rule.update(self.params, grads, self._lists, self._step, skip)
        for rule, places, params, lists in self._groups:
            rule.update(params, [grads[i] for i in places], lists, self._step, skip)
        if self._averages:
            self._average(skip)
        if self.loss_scale is not None:
            self.loss_scale.adjust()

    def updated(self) -> None:
        """Do what follows an update that the products themselves have made: count it, and move the averages."""
        if self._averages:
            if self.rule.counted:
                self._step.add_(self._one)
            self._average(None)

    def _average(self, skip: Tensor | None) -> None:
        """Move the averages towards the parameters, unless the step was skipped. No GPU is waited for."""
        weight = self.rule.ema_weight(self._step)
        if self._step.is_cpu:
            if skip is None or not skip.item():
                torch._foreach_lerp_(self._averages, self.params, weight)
            return
        factor = torch.as_tensor(weight, dtype=self.params[0].dtype, device=self._step.device)
        factor = factor if skip is None else factor * (1 - skip).to(factor.dtype)
        for average, param in zip(self._averages, self.params, strict=True):
            average.lerp_(param, factor)

    def _clip(self, grads: list[Tensor]) -> None:
        """Multiply by min(1, max_grad_norm / (|g| + 1e-6)), |g| the 2-norm of all gradients together."""
        for grad, norm in zip(grads, self._norm_of, strict=True):
            torch.linalg.vector_norm(grad, out=norm)
        torch.linalg.vector_norm(self._norms, out=self._norm)
        torch.div(self._max_norm, self._norm.add_(self._epsilon), out=self._coefficient).clamp_(max=1.0)
        torch._foreach_mul_(grads, self._coefficient)
