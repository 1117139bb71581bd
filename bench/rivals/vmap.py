"""torch.func.vmap over networks: the tutorial's model ensembling with a gradient, and the whole step compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from bench.problems import MembersProblem, Problem
from bench.rivals.functional import loss_and_gradients
from bench.rivals.protocol import Availability, Run, needs
from bench.rivals.training import TrainingProblem, TrainingRun, loss_module, optimizer_of, torch_network
from bench.rivals.whole import WholeStepRun

__all__ = ["Vmap", "VmapCompiled", "VmapCompiledRun"]


class _VmapRun(TrainingRun):
    """The update is a fused torch.optim of the stacked parameters, whose arithmetic is elementwise."""

    def __init__(self, problem: MembersProblem) -> None:
        super().__init__(problem)
        dtype = torch.float64 if problem.dtype == "float64" else torch.float32
        values = zip(*(p.unbind() for p in problem.parameters()), strict=True)
        networks = [torch_network(problem, dtype, list(own)) for own in values]
        stacked, _ = stack_module_state(networks)
        skeleton, loss = networks[0].to("meta"), loss_module(problem)

        def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            value: Tensor = loss(functional_call(skeleton, params, (x,)), y)
            return value

        self.gradients = vmap(grad_and_value(loss_of))
        self.values = {name: p.detach() for name, p in stacked.items()}
        self.params = list(self.values.values())
        self.optimizer = optimizer_of(problem, self.params, fused=True)

    def step(self, x: Tensor, y: Tensor) -> object:
        grads, losses = self.gradients(self.values, x, y)
        for name, p in self.values.items():
            p.grad = grads[name]
        self.optimizer.step()
        return losses


class VmapCompiledRun(WholeStepRun):
    """The whole step in one torch.compile, with a mapped gradient."""

    def gradients_of(self, problem: TrainingProblem) -> Callable[..., Any]:
        return vmap(loss_and_gradients(problem))


class Vmap:
    """vmap, functional_call and grad, uncompiled."""

    name = "vmap"
    label = "torch.func.vmap"
    kinds = frozenset({"members"})
    notes = "vmap of grad_and_value of functional_call; fused torch.optim of the stacked parameters"

    def available(self, problem: Problem) -> Availability:
        return needs((problem.itemsize >= 4, "written without autocast"))

    def build(self, problem: Problem) -> Run:
        return _VmapRun(problem)  # type: ignore[arg-type]


class VmapCompiled:
    """The same in one torch.compile."""

    name = "vmap_compiled"
    label = "torch.func.vmap, step compiled"
    kinds = frozenset({"members"})
    notes = "vmap of grad_and_value and update in one torch.compile; on a GPU in one CUDA graph"

    def available(self, problem: Problem) -> Availability:
        return needs((problem.dtype != "float16", "written without a loss scale"))

    def build(self, problem: Problem) -> Run:
        return VmapCompiledRun(problem, graph=problem.device.startswith("cuda"))  # type: ignore[arg-type]
