"""torch.compile: network and loss with their backward pass, and the optimizer's step, in each of its modes."""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from bench.problems import Problem
from bench.rivals.eager import EagerRun
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem

__all__ = ["Compiled", "mode_runs"]

_numbers = itertools.count()


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


def _with_code_of_its_own(function: Any) -> Any:
    """A copy of a function. torch.compile looks for what it compiled among all that it compiled of the same code."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )  # fmt: skip


class _CompiledRun(EagerRun):
    def __init__(self, problem: TrainingProblem, mode: str) -> None:
        super().__init__(problem, fused=False)
        # The step of torch.optim is one code for all problems.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 12

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            with self.autocast():
                return self.loss(self.model(x), y)

        self.loss_of = torch.compile(_with_code_of_its_own(loss_of), mode=mode)
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
