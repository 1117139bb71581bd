"""Many networks trained one after the other: a loop of eager PyTorch, and a loop of fastmlp.TrainStep."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

import fastmlp
from bench.problems import MembersProblem, Problem, Results
from bench.rivals.fastmlp_step import train_step
from bench.rivals.protocol import OK, Availability, Run, needs
from bench.rivals.training import TrainingRun, loss_module, optimizer_of, torch_network

__all__ = ["EagerLoop", "FastMLPLoop"]


class _Loop(TrainingRun):
    """One network per member. A step takes the members' batches one by one."""

    def __init__(self, problem: MembersProblem) -> None:
        super().__init__(problem)
        dtype = torch.float64 if problem.dtype == "float64" else torch.float32
        values = zip(*(p.unbind() for p in problem.parameters()), strict=True)
        self.networks = [torch_network(problem, dtype, list(own)) for own in values]

    def results(self) -> Results:
        """The parameters, stacked."""
        members = (network.parameters() for network in self.networks)
        self.params = [torch.stack(list(same)) for same in zip(*members, strict=True)]
        return super().results()

    @abstractmethod
    def member_step(self, member: int, x: Tensor, y: Tensor) -> Tensor:
        """One step of one member."""

    def step(self, x: Tensor, y: Tensor) -> object:
        batches = zip(x.unbind(), y.unbind(), strict=True)
        return [self.member_step(member, *batch) for member, batch in enumerate(batches)]


class _EagerLoop(_Loop):
    def __init__(self, problem: MembersProblem) -> None:
        super().__init__(problem)
        self.loss = loss_module(problem)
        self.optimizers = [optimizer_of(problem, network.parameters(), fused=True) for network in self.networks]

    def member_step(self, member: int, x: Tensor, y: Tensor) -> Tensor:
        optimizer = self.optimizers[member]
        loss: Tensor = self.loss(self.networks[member](x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss


class _FastMLPLoop(_Loop):
    def __init__(self, problem: MembersProblem) -> None:
        super().__init__(problem)
        models = [fastmlp.MLP.from_torch(network) for network in self.networks]
        self.networks = [nn.Sequential(*model.layers) for model in models]  # for the results
        self.steps = [train_step(model, problem) for model in models]

    def member_step(self, member: int, x: Tensor, y: Tensor) -> Tensor:
        return self.steps[member](x, y)


class EagerLoop:
    """What people write first."""

    name = "eager"
    label = "loop of PyTorch eager (fused)"
    kinds = frozenset({"members"})
    notes = "one nn.Sequential and one fused torch.optim per member, trained one after the other"

    def available(self, problem: Problem) -> Availability:
        return needs((problem.itemsize >= 4, "written without autocast"))

    def build(self, problem: Problem) -> Run:
        return _EagerLoop(problem)  # type: ignore[arg-type]


class FastMLPLoop:
    """One TrainStep per member."""

    name = "fastmlp_loop"
    label = "loop of fastmlp TrainStep"
    kinds = frozenset({"members"})
    notes = "one fastmlp.MLP and one TrainStep per member, called one after the other"

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return _FastMLPLoop(problem)  # type: ignore[arg-type]
