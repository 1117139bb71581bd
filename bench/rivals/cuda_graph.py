"""The whole step of eager PyTorch in a replayed CUDA graph: eager without its launch overhead."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problems import Problem
from bench.problems.training import ADAMS
from bench.rivals.capture import capture
from bench.rivals.eager import EagerRun
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem

__all__ = ["CudaGraph"]


class _GraphRun(EagerRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem, fused=True)
        # Not through optimizer_of: SGD does not know the option capturable, and its one kernel does not need it.
        if problem.optimizer in ADAMS:
            for group in self.optimizer.param_groups:
                group["capturable"] = True
        self.replay = capture(super().step, self.example, self.params, self.state)

    def state(self) -> list[Tensor]:
        """The optimizer's tensors: velocities, moments and counts."""
        states = self.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def step(self, x: Tensor, y: Tensor) -> object:
        return self.replay(x, y)

    def gathered_step(self, x: Tensor, y: Tensor, rows: Tensor) -> object:
        return self.replay.gathered(x, y, rows)


class CudaGraph:
    """The strongest opponent on a GPU that needs no compiler."""

    name = "cuda_graph"
    label = "PyTorch eager in a CUDA graph"
    kinds = frozenset({"step", "online", "epoch"})
    notes = "zero_grad, forward, backward and fused optimizer in one graph; the batch is copied or gathered into it"

    def available(self, problem: Problem) -> Availability:
        return needs(
            (torch.cuda.is_available() and problem.device.startswith("cuda"), "needs a GPU"),
            (problem.dtype != "float16", "GradScaler's skipped steps cannot be captured"),
        )

    def build(self, problem: Problem) -> Run:
        return _GraphRun(problem)  # type: ignore[arg-type]
