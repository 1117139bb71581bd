"""The single operations of a layer and a loss, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmlp import reference

from .base import GATE_CALLS, Problem, Results, generator, randn

__all__ = ["CrossEntropyProblem", "HeadProblem", "LinearBackwardProblem", "LinearProblem", "WgradProblem"]


@dataclass(frozen=True)
class _Layer(Problem):
    M: int
    K: int
    N: int
    activation: str = "sigmoid"

    @property
    def rows(self) -> int:
        return self.M

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}x{self.N} {self.activation} {self.dtype}"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.K * self.N

    @property
    def bytes(self) -> int:
        return self.itemsize * (self.M * self.K + self.N * self.K + self.N + self.M * self.N)

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """X [M, K], W [N, K], b [N], dA [M, N]."""
        w, b = randn(self.N, self.K, seed=1, scale=self.K**-0.5), randn(self.N, seed=2, scale=0.1)
        return randn(self.M, self.K, seed=10 + index), w, b, randn(self.M, self.N, seed=50 + index)


@dataclass(frozen=True)
class LinearProblem(_Layer):
    """A = f(X W^T + b), without a tape."""

    kind: ClassVar[str] = "linear_act"

    @property
    def reduction(self) -> int:
        return self.K

    def oracle(self, dtype: torch.dtype) -> Results:
        x, w, b, _ = (t.to(dtype) for t in self.inputs(GATE_CALLS - 1))
        return {"A": reference.linear_act(x, w, b, self.activation).double()}


@dataclass(frozen=True)
class LinearBackwardProblem(_Layer):
    """(dX, dW, db) of A = f(X W^T + b) for a given dA, after the forward pass."""

    kind: ClassVar[str] = "linear_act_backward"

    @property
    def flops(self) -> int:
        return 4 * self.M * self.K * self.N

    @property
    def bytes(self) -> int:
        return self.itemsize * (2 * self.M * self.K + 2 * self.N * self.K + self.N + 3 * self.M * self.N)

    @property
    def reduction(self) -> int:
        return max(self.M, self.N)

    def oracle(self, dtype: torch.dtype) -> Results:
        x, w, b, da = (t.to(dtype) for t in self.inputs(GATE_CALLS - 1))
        dx, dw, db = reference.linear_act_backward(da, x, w, b, self.activation)
        return {"dX": dx.double(), "dW": dw.double(), "db": db.double()}


@dataclass(frozen=True)
class WgradProblem(_Layer):
    """DW = dZ^T X and db = sum dZ: the gradients of a layer's parameters."""

    kind: ClassVar[str] = "wgrad"
    activation: str = "identity"

    @property
    def reduction(self) -> int:
        return self.M

    def oracle(self, dtype: torch.dtype) -> Results:
        x, _, _, dz = (t.to(dtype) for t in self.inputs(GATE_CALLS - 1))
        dw, db = reference.linear_wgrad(dz, x)
        return {"dW": dw.double(), "db": db.double()}


@dataclass(frozen=True)
class CrossEntropyProblem(Problem):
    """Mean softmax cross-entropy of logits [M, C], and its gradient."""

    kind: ClassVar[str] = "cross_entropy"
    M: int
    C: int

    @property
    def rows(self) -> int:
        return self.M

    @property
    def name(self) -> str:
        return f"{self.M}x{self.C} {self.dtype}"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.itemsize * 2 * self.M * self.C + 8 * self.M

    @property
    def reduction(self) -> int:
        return self.C

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """Z [M, C] and labels int64 [M]."""
        labels = torch.randint(0, self.C, (self.M,), generator=generator(index))
        return randn(self.M, self.C, seed=10 + index, scale=2.0), labels

    def oracle(self, dtype: torch.dtype) -> Results:
        z, y = self.inputs(GATE_CALLS - 1)
        z = z.to(dtype).requires_grad_()
        loss = F.cross_entropy(z, y)
        (dz,) = torch.autograd.grad(loss, z)
        return {"loss": loss.detach().double(), "dZ": dz.double()}


@dataclass(frozen=True)
class HeadProblem(Problem):
    """Last layer, its loss and their backward pass down to the layer's input: (loss, dZ_L, dA_{L-1})."""

    kind: ClassVar[str] = "head"
    M: int
    K: int
    C: int

    @property
    def rows(self) -> int:
        return self.M

    @property
    def name(self) -> str:
        return f"{self.M}x{self.K}x{self.C} {self.dtype}"

    @property
    def flops(self) -> int:
        return 4 * self.M * self.K * self.C

    @property
    def bytes(self) -> int:
        return self.itemsize * (2 * self.M * self.K + self.C * self.K + self.C + self.M * self.C) + 8 * self.M

    @property
    def reduction(self) -> int:
        return max(self.K, self.C)

    def make_inputs(self, index: int) -> tuple[Tensor, ...]:
        """H [M, K], W [C, K], b [C], labels int64 [M]."""
        w, b = randn(self.C, self.K, seed=1, scale=self.K**-0.5), randn(self.C, seed=2, scale=0.1)
        labels = torch.randint(0, self.C, (self.M,), generator=generator(index))
        return randn(self.M, self.K, seed=10 + index), w, b, labels

    def oracle(self, dtype: torch.dtype) -> Results:
        h, w, b, y = self.inputs(GATE_CALLS - 1)
        h = h.to(dtype).requires_grad_()
        z = reference.linear_act(h, w.to(dtype), b.to(dtype))
        loss = F.cross_entropy(z, y)
        dz, dh = torch.autograd.grad(loss, (z, h))
        return {"loss": loss.detach().double(), "dZ": dz.double(), "dH": dh.double()}
