"""torch.compile on the whole step, update included, as one function; on a GPU captured in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from bench.problems import OPTIMIZERS, Problem
from bench.problems.training import ADAM_BETA_2
from bench.rivals.capture import Replay, capture
from bench.rivals.compiled import mode_runs
from bench.rivals.functional import loss_and_gradients
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem, TrainingRun

__all__ = ["WholeStep", "WholeStepRun"]


def _updating(problem: TrainingProblem, params: list[Tensor]) -> tuple[Callable[[list[Tensor]], None], list[Tensor]]:
    """(A function that takes gradients and changes the parameters, its state, which begins at 0).

    torch.optim's own functions change all parameters at once, so that Inductor makes one kernel of them.
    """
    settings: dict[str, Any] = {"foreach": True, "maximize": False, **OPTIMIZERS[problem.optimizer]}
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    if problem.optimizer == "adamw":
        counts = [torch.zeros((), device=p.device) for p in params]
        settings |= {"beta1": 0.9, "beta2": ADAM_BETA_2, "eps": 1e-8, "amsgrad": False, "capturable": True}
        return lambda grads: adamw(params, grads, first, second, [], counts, **settings), [*first, *second, *counts]
    settings = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False} | settings
    velocities: list[Tensor | None] = [*first] if settings["momentum"] else [None] * len(params)
    return lambda grads: sgd(params, grads, velocities, **settings), first


class WholeStepRun(TrainingRun):
    """``mode`` and ``backend`` are torch.compile's; with ``graph`` the compiled step is captured."""

    def __init__(
        self, problem: TrainingProblem, mode: str = "default", backend: str = "inductor", *, graph: bool
    ) -> None:
        super().__init__(problem)
        torch.compiler.reset()
        dtype = torch.float64 if problem.dtype == "float64" else torch.float32
        self.params = params = [p.to(problem.device, dtype) for p in problem.parameters()]
        gradients = self.gradients_of(problem)
        update, state = _updating(problem, params)

        def whole(x: Tensor, y: Tensor) -> Tensor:
            grads, loss = gradients(params, x, y)
            with torch.no_grad():
                update(list(grads))
            return loss

        self.compiled = torch.compile(whole, fullgraph=True, dynamic=False, mode=mode, backend=backend)
        self.replay: Replay | None = None
        if graph:
            self.replay = capture(self.compiled, self.example, params, lambda: state)

    def gradients_of(self, problem: TrainingProblem) -> Callable[..., Any]:
        """A function of (parameters, X, Y) that returns (gradients, loss)."""
        return loss_and_gradients(problem)

    def step(self, x: Tensor, y: Tensor) -> object:
        return self.compiled(x, y) if self.replay is None else self.replay(x, y)

    def gathered_step(self, x: Tensor, y: Tensor, rows: Tensor) -> object:
        return super().gathered_step(x, y, rows) if self.replay is None else self.replay.gathered(x, y, rows)


class WholeStep:
    """The strongest opponent on a GPU: Python does nothing but the replay."""

    kinds = frozenset({"step", "online", "epoch"})

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"whole_{mode.partition('-no')[0].replace('-', '_')}"
        self.label = f"whole step compiled ({mode.partition('-no')[0]})"
        self.notes = f"forward, loss, backward and update one torch.compile(mode={mode!r}); on a GPU in one CUDA graph"

    def available(self, problem: Problem) -> Availability:
        return needs(
            (problem.dtype != "float16", "written without a loss scale"),
            (getattr(problem, "optimizer", "") != "adam", "written for SGD and AdamW"),
            (not getattr(problem, "weighs_classes", False), "written without class weights"),
            (not getattr(problem, "dropout", 0), "written without dropout"),
            *mode_runs(self.mode, problem),
        )

    def build(self, problem: Problem) -> Run:
        return WholeStepRun(problem, self.mode, graph=problem.device.startswith("cuda"))  # type: ignore[arg-type]
