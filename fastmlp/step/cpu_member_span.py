"""Which members of an ensemble a piece of a step works on, and what the piece reads of the ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .cpu_dropout import StepDropout
from .loss_options import LossOptions
from .optimizers import Optimizer
from .parameters import Copies


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


def target_dims(y: Tensor) -> int:
    """Dimensions of one model's targets: 1 of class numbers, 2 of values and of probabilities."""
    return 2 if y.is_floating_point() else 1


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
    rule: Optimizer  #: of the first param group
    rules: list[Optimizer]  #: of each param group
    group_of: list[int] | None  #: the param group of each master
    loss: str
    options: LossOptions
    dropout: StepDropout | None
    members: int
    dtype: torch.dtype
    device: torch.device
    lowest: int
    plain: bool
    zero: Tensor

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the masters."""

    def look_at(self, y: Tensor) -> None:
        """IndexError for a class number of any member that is no class."""

    def settings_of(self, member: int) -> tuple[tuple[tuple[str, float], ...], ...]:
        """Those settings of a member that may be its own, of each param group."""

    def rules_with(self, settings: tuple[tuple[tuple[str, float], ...], ...]) -> list[Optimizer]:
        """The rule of each param group with a member's settings."""


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
