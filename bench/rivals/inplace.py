"""The loop that an expert writes by hand in plain torch: no tape, buffers allocated once, out= and in-place updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.problems import OPTIMIZERS, Problem
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem, TrainingRun

__all__ = ["InPlace"]

_ACTIVATE: dict[str, Any] = {"sigmoid": Tensor.sigmoid_, "relu": Tensor.relu_, "tanh": Tensor.tanh_}
_DERIVE: dict[str, Any] = {
    "sigmoid": lambda da, a: torch.ops.aten.sigmoid_backward.grad_input(da, a, grad_input=da),
    "relu": lambda da, a: torch.ops.aten.threshold_backward.grad_input(da, a, 0, grad_input=da),
    "tanh": lambda da, a: torch.ops.aten.tanh_backward.grad_input(da, a, grad_input=da),
}


class _InPlaceRun(TrainingRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem)
        self.params = [p.to(problem.device, problem.torch_dtype) for p in problem.parameters()]
        self.weights, self.biases = self.params[::2], self.params[1::2]
        self.transposed = [w.t() for w in self.weights]
        m = problem.batch
        new = self.params[0].new_empty
        self.a = [new((m, n)) for n in problem.sizes[1:]]
        self.da = [new((m, n)) for n in problem.sizes[1:]]
        self.db = [new(n) for n in problem.sizes[1:]]
        # BLAS adds each row of a long batch to a slim weight itself, and each addition rounds the weight.
        self.dw = [new(w.shape) if m >= 64 and min(w.shape) < 16 else None for w in self.weights]
        self.activate, self.derive = _ACTIVATE[problem.activation], _DERIVE[problem.activation]
        self.lr = OPTIMIZERS[problem.optimizer]["lr"]
        self.scale = 1 / m
        self.minus_one = -torch.ones((m, 1), dtype=problem.torch_dtype, device=problem.device)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> object:
        h, last = x, len(self.weights) - 1
        for i, wt in enumerate(self.transposed):
            h = torch.addmm(self.biases[i], h, wt, out=self.a[i])
            if i < last:
                self.activate(h)
        log_p = torch.log_softmax(h, 1)
        loss = torch.nn.functional.nll_loss(log_p, y)
        dz = torch.exp(log_p, out=self.da[last]).scatter_add_(1, y.view(-1, 1), self.minus_one).mul_(self.scale)
        for i in range(last, -1, -1):
            below = self.a[i - 1] if i else x
            da = torch.mm(dz, self.weights[i], out=self.da[i - 1]) if i else dz
            if (dw := self.dw[i]) is None:
                self.weights[i].addmm_(dz.t(), below, alpha=-self.lr)
            else:
                self.weights[i].add_(torch.mm(dz.t(), below, out=dw), alpha=-self.lr)
            self.biases[i].add_(torch.sum(dz, 0, out=self.db[i]), alpha=-self.lr)
            dz = self.derive(da, below) if i else dz
        return loss


class InPlace:
    """Plain SGD only: gradient and update of a weight are one addmm_, except in the last layer of a long batch."""

    name = "inplace"
    label = "hand-written in-place loop"
    kinds = frozenset({"step", "online", "epoch"})
    notes = "aten on preallocated buffers, W.addmm_(dZ.T, X, alpha=-lr) but for slim W, no tape"

    def available(self, problem: Problem) -> Availability:
        return needs(
            (getattr(problem, "bias", True), "written with biases"),
            (getattr(problem, "optimizer", "sgd") == "sgd", "written for plain SGD"),
            (getattr(problem, "loss", "cross_entropy") == "cross_entropy", "written for cross-entropy"),
            (problem.itemsize >= 4, "written for one dtype, without masters"),
            (getattr(problem, "activation", "sigmoid") in _ACTIVATE, "written for sigmoid, relu and tanh"),
        )

    def build(self, problem: Problem) -> Run:
        return _InPlaceRun(problem)  # type: ignore[arg-type]
