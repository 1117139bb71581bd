"""Liger Kernel's cross-entropy: a Triton kernel that writes the gradient over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problems import Problem
from bench.rivals.formulas import RESULTS
from bench.rivals.protocol import Availability, OpRun, Run, installed, needs

__all__ = ["Liger"]


class _LigerRun(OpRun):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, RESULTS[problem.kind])
        from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

        self.loss = LigerCrossEntropyLoss()
        # The loss overwrites its logits, so the run has copies of its own. After the first round over the copies it
        # works on gradients, which take as long.
        self.sets = [(z.clone().requires_grad_(), y) for z, y in self.sets]

    def compute(self, *inputs: Tensor) -> object:
        loss = self.loss(*inputs)
        return loss, *torch.autograd.grad(loss, inputs[0])


class Liger:
    """The cross-entropy that most fused-loss code uses."""

    name = "liger"
    label = "Liger Kernel"
    kinds = frozenset({"cross_entropy"})
    notes = "LigerCrossEntropyLoss; overwrites the logits, so later calls see other numbers"

    def available(self, problem: Problem) -> Availability:
        return needs(installed("liger_kernel"), (problem.device.startswith("cuda"), "needs a GPU"))

    def build(self, problem: Problem) -> Run:
        return _LigerRun(problem)
