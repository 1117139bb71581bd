"""One training step of E networks of one shape, each on its own batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import GATE_CALLS, generator, randn
from .training import LOSSES, Training

__all__ = ["MembersProblem"]

#: Members that the gate compares at most, spread evenly over all.
_COMPARED = 8


@dataclass(frozen=True)
class MembersProblem(Training):
    """One step of each of ``members`` networks on a batch of its own, X [E, M, sizes[0]]; E losses, E updates.

    Members share nothing. The gate compares 8 members at most, among them the first and the last, because the oracle's
    float64 tensors of 1,000 members would take gigabytes.
    """

    kind: ClassVar[str] = "members"
    activation: str = "relu"
    members: int = 1

    @property
    def name(self) -> str:
        many = f"{self.members:,} member{'s' if self.members > 1 else ''} of"
        return " ".join([many, *self.shape_words, f"batch {self.batch}", self.optimizer, self.dtype])

    @property
    def rows(self) -> int:
        return self.members * self.batch

    @property
    def leading(self) -> int:
        return self.members

    @property
    def flops(self) -> int:
        return self.members * super().flops

    @property
    def bytes(self) -> int:
        return self.members * super().bytes

    @property
    def roundings(self) -> int:
        return GATE_CALLS * (1 + self.batch // 256)

    def parameters(self) -> list[Tensor]:
        """The starting values W_1 [E, N, K], b_1 [E, N], ..., float32 on the CPU."""
        out = []
        for i, (k, n) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            out.append(randn(self.members, n, k, seed=100 + i, scale=k**-0.5))
            out += [torch.zeros(self.members, n)] if self.bias else []
        return out

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [E, M, K] in [0, 1) and labels int64 [E, M]; for mse one-hot rows [E, M, C]."""
        g, shape = generator(10 + index), (self.members, self.batch)
        x = torch.rand(*shape, self.sizes[0], generator=g).bfloat16().float()
        y = torch.randint(0, self.sizes[-1], shape, generator=g)
        return x, F.one_hot(y, self.sizes[-1]).float() if self.loss == "mse" else y

    def compared(self, t: Tensor) -> Tensor:
        last = self.members - 1
        return t[sorted({round(i * last / (_COMPARED - 1)) for i in range(_COMPARED)})]

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The batches of the compared members."""
        return [(self.compared(x), self.compared(y)) for x, y in super().batches()]

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.bmm(x, w.mT) if b is None else torch.baddbmm(b.unsqueeze(1), x, w.mT)

    def total_loss(self, a: Tensor, y: Tensor) -> Tensor:
        # The gradient of a sum over members is, for each member, the gradient of its own mean over its batch.
        return LOSSES[self.loss](a.flatten(0, 1), y.flatten(0, 1)) * a.shape[0]
