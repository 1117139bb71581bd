"""PyTorch as tutorials write it: modules, loss.backward(), optimizer.step(); the optimizer plain or fused."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bench.problems import Problem
from bench.rivals.protocol import OK, Availability, Run, needs
from bench.rivals.training import TrainingProblem, TrainingRun, loss_module, optimizer_of, torch_network

__all__ = ["Eager", "EagerFloat32", "EagerRun"]


class EagerRun(TrainingRun):
    """float32 parameters; 16-bit problems under autocast, float16 with GradScaler."""

    def __init__(self, problem: TrainingProblem, *, fused: bool) -> None:
        super().__init__(problem)
        self.model = torch_network(problem, torch.float64 if problem.dtype == "float64" else torch.float32)
        self.params = list(self.model.parameters())
        self.loss = loss_module(problem)
        # Without ``fused`` torch chooses: on a GPU it changes all parameters at once (foreach), on a CPU one by one.
        self.optimizer = optimizer_of(problem, self.params, **({"fused": True} if fused else {}))
        self.half = problem.torch_dtype if problem.itemsize == 2 else None
        kind = "cuda" if problem.device.startswith("cuda") else "cpu"
        self.kind = kind
        self.scaler = torch.amp.GradScaler(kind, init_scale=2.0**15) if problem.dtype == "float16" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast for 16-bit problems."""
        return nullcontext() if self.half is None else torch.autocast(self.kind, self.half)

    def step(self, x: Tensor, y: Tensor) -> object:
        with self.autocast():
            loss = self.loss(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss


class Eager:
    """nn.Linear, the loss of torch.nn, torch.optim."""

    kinds = frozenset({"step", "online", "epoch"})

    def __init__(self, *, fused: bool = False) -> None:
        self.fused = fused
        self.name = "eager_fused" if fused else "eager"
        self.label = "PyTorch eager, fused optimizer" if fused else "PyTorch eager"
        self.notes = (
            f"nn.Linear, the loss of torch.nn, torch.optim{' (fused=True)' if fused else ''}; 16 bits: autocast"
        )

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return EagerRun(problem, fused=self.fused)  # type: ignore[arg-type]


class EagerFloat32:
    """The float32 step beside 16-bit steps, which shows what 16-bit products gain."""

    name = "eager_float32"
    label = "PyTorch eager in float32"
    kinds = frozenset({"step"})
    notes = "the same step without autocast"

    def available(self, problem: Problem) -> Availability:
        return needs((problem.itemsize == 2, "the problem is not in 16 bits"))

    def build(self, problem: Problem) -> Run:
        return EagerRun(dataclasses.replace(problem, dtype="float32"), fused=False)  # type: ignore[arg-type]
