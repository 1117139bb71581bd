"""torch.compile: network and loss with their backward pass, and the optimizer's step, in each of its modes."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problems import Problem
from bench.rivals.eager import EagerRun
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem

__all__ = ["Compiled", "mode_runs"]


def mode_runs(mode: str, problem: Problem) -> tuple[tuple[bool, str], ...]:
    """Conditions for a mode of torch.compile, as ``needs`` takes them."""
    on_gpu = problem.device.startswith("cuda")
    return (
        (on_gpu or mode != "reduce-overhead", "is CUDA graphs: the default mode without a GPU"),
        # On a CPU Inductor's GEMM templates are for constant weights.
        (
            on_gpu or not mode.startswith("max-autotune"),
            "tunes products of constant weights only: the default mode here",
        ),
    )


class _CompiledRun(EagerRun):
    def __init__(self, problem: TrainingProblem, mode: str) -> None:
        super().__init__(problem, fused=False)
        torch.compiler.reset()

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            with self.autocast():
                return self.loss(self.model(x), y)

        self.loss_of = torch.compile(loss_of, mode=mode)
        self.update = torch.compile(self.optimizer.step, mode=mode)

    def step(self, x: Tensor, y: Tensor) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss_of(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self.update()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss


class Compiled:
    """torch.compile(mode=...)."""

    kinds = frozenset({"step", "online", "epoch"})

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"compile_{mode.replace('-', '_')}"
        self.label = f"torch.compile ({mode})"
        self.notes = f"forward, loss, backward and optimizer step compiled, mode={mode!r}"

    def available(self, problem: Problem) -> Availability:
        return needs(*mode_runs(self.mode, problem))

    def build(self, problem: Problem) -> Run:
        return _CompiledRun(problem, self.mode)  # type: ignore[arg-type]
