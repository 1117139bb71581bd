"""TrainKernel: a whole training step compiled into one cooperative CUDA kernel, captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.problems import OPTIMIZERS, Problem
from bench.rivals.capture import Replay
from bench.rivals.functional import loss_and_gradients
from bench.rivals.protocol import Availability, Run, installed, needs
from bench.rivals.training import TrainingProblem, TrainingRun

__all__ = ["TrainKernel"]

#: The oldest architecture that its kernels run on.
_CAPABILITY = (8, 0)


class _TrainKernelRun(TrainingRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem)
        import trainkernel

        lr = OPTIMIZERS[problem.optimizer]["lr"]
        gradients = loss_and_gradients(problem)

        def step(params: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Any:
            grads, loss = gradients(params, x, y)
            return loss, tuple(grads), tuple(p - lr * g for p, g in zip(params, grads, strict=True))

        state = tuple(p.to(problem.device) for p in problem.parameters())
        inputs = (state, *(t.clone() for t in self.example))  # a step overwrites them
        program: Any = trainkernel.compile_training(step, inputs).capture(*inputs)
        # A replay may write the new state over the old one, or only return it.
        params, x, y = program.inputs
        moved = [(p, new) for p, new in zip(params, program.outputs[2], strict=True) if p.data_ptr() != new.data_ptr()]

        def run() -> object:
            loss = program.replay()[0]
            if moved:
                torch._foreach_copy_([p for p, _ in moved], [new for _, new in moved])
            return loss

        self.params, self.replay = list(params), Replay(x, y, run)

    def step(self, x: Tensor, y: Tensor) -> object:
        return self.replay(x, y)

    def gathered_step(self, x: Tensor, y: Tensor, rows: Tensor) -> object:
        return self.replay.gathered(x, y, rows)


class TrainKernel:
    """One launch per step; the package knows relu and squared errors, but neither exponentials nor class numbers."""

    name = "trainkernel"
    label = "TrainKernel"
    kinds = frozenset({"step", "epoch"})
    notes = "compile_training(...).capture(...): forward, loss, backward and SGD in one kernel of a CUDA graph"

    def available(self, problem: Problem) -> Availability:
        here = installed("trainkernel")
        return needs(
            here,
            (getattr(problem, "loss", "") == "mse", "has no softmax"),
            (getattr(problem, "activation", "") == "relu", "has relu only"),
            (getattr(problem, "optimizer", "") == "sgd", "has plain SGD only"),
            (problem.dtype in ("float32", "bfloat16"), "written without a loss scale"),
            (problem.device.startswith("cuda"), "needs a GPU"),
            (here.ok and _compiles(), "needs nvcc and a GPU from sm_80 on"),
        )

    def build(self, problem: Problem) -> Run:
        return _TrainKernelRun(problem)  # type: ignore[arg-type]


def _compiles() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= _CAPABILITY
