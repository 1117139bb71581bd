"""NVIDIA apex: apex.mlp.MLP, one CUDA extension call for the hidden layers, under autograd."""

from __future__ import annotations

import torch
from torch import nn

from bench.problems import Problem
from bench.rivals.eager import EagerRun
from bench.rivals.protocol import Availability, Run, installed, needs
from bench.rivals.training import TrainingProblem, optimizer_of

__all__ = ["ApexMLP"]


class _ApexRun(EagerRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem, fused=True)
        from apex.mlp import MLP

        # Its activation follows every layer, so the last one is a linear layer of its own.
        hidden = MLP(list(problem.sizes[:-1]), bias=True, activation=problem.activation).to(problem.device)
        last = self.model[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            for i, (w, b) in enumerate(zip(self.params[:-2:2], self.params[1:-2:2], strict=True)):
                hidden.weights[i].copy_(w)
                hidden.biases[i].copy_(b)
        self.model = nn.Sequential(hidden, last)
        pairs = zip(hidden.weights, hidden.biases, strict=True)
        self.params = [p for pair in pairs for p in pair] + list(last.parameters())
        self.optimizer = optimizer_of(problem, self.params, fused=True)


class ApexMLP:
    """Fused forward and backward of the hidden layers."""

    name = "apex"
    label = "apex.mlp"
    kinds = frozenset({"step"})
    notes = "apex.mlp.MLP for the hidden layers, nn.Linear for the last, fused torch.optim"

    def available(self, problem: Problem) -> Availability:
        return needs(
            installed("apex"),
            (getattr(problem, "bias", True), "written with biases"),
            (installed("mlp_cuda").ok, "installed without its CUDA extension"),
            (problem.device.startswith("cuda"), "needs a GPU"),
            (getattr(problem, "activation", "") in ("relu", "sigmoid"), "has relu and sigmoid only"),
            (len(getattr(problem, "sizes", ())) > 2, "needs a hidden layer"),
            (not getattr(problem, "dropout", 0), "has no dropout"),
        )

    def build(self, problem: Problem) -> Run:
        return _ApexRun(problem)  # type: ignore[arg-type]
