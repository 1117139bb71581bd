"""A training step as a pure function, for compilers that take forward, loss and backward pass together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.rivals.formulas import activation_of
from bench.rivals.training import TrainingProblem

__all__ = ["loss_and_gradients"]


def _mean_squared_error(a: Tensor, y: Tensor) -> Tensor:
    """F.mse_loss by operations that every compiler has."""
    return ((a - y) ** 2).mean()


def loss_and_gradients(problem: TrainingProblem) -> Callable[[Sequence[Tensor], Tensor, Tensor], Any]:
    """A function of (parameters, X, Y) that returns (gradients, loss); 16 bits as autocast computes them.

    torch.func differentiates inside a compiled region with torch's default settings; torch.autograd.grad does not.
    """
    half = problem.torch_dtype if problem.itemsize == 2 else None
    activate = activation_of(problem)
    loss_of = _mean_squared_error if problem.loss == "mse" else F.cross_entropy

    def narrow(t: Tensor) -> Tensor:
        return t if half is None else t.to(half)

    def loss(params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        a = narrow(x)
        layers = problem.layers(list(params))
        for i, (w, b) in enumerate(layers):
            z = F.linear(a, narrow(w), None if b is None else narrow(b))
            a = activate(z) if i < len(layers) - 1 else z
        return loss_of(a if half is None else a.float(), y)

    return torch.func.grad_and_value(loss)
