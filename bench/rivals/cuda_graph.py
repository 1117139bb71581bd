"""The whole step of eager PyTorch captured in a CUDA graph and replayed: eager without its launch overhead."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problems import Problem
from bench.rivals.eager import EagerRun
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem

__all__ = ["CudaGraph"]


class _GraphRun(EagerRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem, fused=True)
        # Not through optimizer_of: capturable is an option that SGD does not know and, being one kernel, does not need.
        if problem.optimizer == "adamw":
            for group in self.optimizer.param_groups:
                group["capturable"] = True
        x, y = self.sets[0]
        x, y = (x[:1], y[:1]) if self.online else (x, y)
        self.x, self.y = x.clone(), y.clone()
        saved = [p.detach().clone() for p in self.params]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().step(self.x, self.y)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss_value = super().step(self.x, self.y)
        with torch.no_grad():  # undo the warm-up, in the memory that the graph knows
            for p, value in zip(self.params, saved, strict=True):
                p.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def step(self, x: Tensor, y: Tensor) -> object:
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss_value


class CudaGraph:
    """The strongest opponent on a GPU that needs no compiler."""

    name = "cuda_graph"
    label = "PyTorch eager in a CUDA graph"
    kinds = frozenset({"step", "online"})
    notes = "zero_grad, forward, backward and fused optimizer in one graph; the batch is copied into it"

    def available(self, problem: Problem) -> Availability:
        return needs(
            (torch.cuda.is_available() and problem.device.startswith("cuda"), "needs a GPU"),
            (problem.dtype != "float16", "GradScaler's skipped steps cannot be captured"),
        )

    def build(self, problem: Problem) -> Run:
        return _GraphRun(problem)  # type: ignore[arg-type]
