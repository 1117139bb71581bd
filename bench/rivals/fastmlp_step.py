"""fastmlp: TrainStep, the online epoch, and its modules under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastmlp
from bench.problems import OPTIMIZERS, MembersProblem, Problem
from bench.problems.training import ADAMS
from bench.rivals.protocol import OK, Availability, Run, needs
from bench.rivals.training import TrainingProblem, TrainingRun, class_weight_of, optimizer_of

__all__ = ["FastMLP", "FastMLPEnsemble", "FastMLPModules", "FastMLPOneByOne", "train_step"]


def _model(problem: TrainingProblem) -> fastmlp.MLP | fastmlp.MLPEnsemble:
    model: fastmlp.MLP | fastmlp.MLPEnsemble
    rest: dict[str, Any] = {"activation": problem.activation, "bias": problem.bias, "device": problem.device}
    rest["dtype"] = torch.float64 if problem.dtype == "float64" else torch.float32
    rest["dropout"] = problem.dropout
    if isinstance(problem, MembersProblem):
        model = fastmlp.MLPEnsemble(problem.sizes, problem.members, **rest)
    else:
        model = fastmlp.MLP(problem.sizes, **rest)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), problem.parameters(), strict=True):
            parameter.copy_(value)
    return model


def train_step(model: fastmlp.MLP | fastmlp.MLPEnsemble, problem: TrainingProblem) -> fastmlp.TrainStep:
    """A TrainStep with the problem's settings."""
    settings: dict[str, Any] = OPTIMIZERS[problem.optimizer]
    return fastmlp.TrainStep(
        model,
        problem.optimizer if problem.optimizer in ADAMS else "sgd",
        loss=problem.loss,
        class_weight=class_weight_of(problem),
        dtype=problem.torch_dtype,
        **settings,
    )


class _StepRun(TrainingRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem)
        model = _model(problem)
        self.params = list(model.parameters())
        self.train = train_step(model, problem)
        self.step = self.train  # type: ignore[method-assign]


class _EpochRun(_StepRun):
    def compute(self, *inputs: Tensor) -> object:
        x, y, *order = inputs
        return self.train.epoch(x, y, self.problem.batch, order[0] if order else None)


class _ModulesRun(TrainingRun):
    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem)
        self.model = _model(problem)
        self.loss = fastmlp.functional.mse_loss
        if problem.loss != "mse":
            self.loss = fastmlp.CrossEntropyLoss(class_weight_of(problem))
        self.params = list(self.model.parameters())
        self.optimizer = optimizer_of(problem, self.params, fused=True)

    def step(self, x: Tensor, y: Tensor) -> object:
        loss = self.loss(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss


class FastMLP:
    """fastmlp.TrainStep; single samples are an epoch with a batch size of 1."""

    name = "fastmlp"
    label = "fastmlp TrainStep"
    kinds = frozenset({"step", "online", "epoch"})
    notes = "float32 parameters; 16 bits: TrainStep(dtype=...); online and epoch: TrainStep.epoch"

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return (_StepRun if problem.kind == "step" else _EpochRun)(problem)  # type: ignore[arg-type]


class FastMLPEnsemble:
    """fastmlp.TrainStep of a fastmlp.MLPEnsemble: all members in one call."""

    name = "fastmlp"
    label = "fastmlp TrainStep(MLPEnsemble)"
    kinds = frozenset({"members"})
    notes = "one TrainStep call for all members"

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return _StepRun(problem)  # type: ignore[arg-type]


class FastMLPOneByOne:
    """Online training by one call of the step per sample."""

    name = "fastmlp_one_by_one"
    label = "fastmlp TrainStep, called per sample"
    kinds = frozenset({"online"})
    notes = "one TrainStep call per sample"

    def available(self, problem: Problem) -> Availability:
        return OK

    def build(self, problem: Problem) -> Run:
        return _StepRun(problem)  # type: ignore[arg-type]


class FastMLPModules:
    """fastmlp.MLP as a drop-in module: autograd's tape, torch.optim."""

    name = "fastmlp_modules"
    label = "fastmlp modules, autograd"
    kinds = frozenset({"step"})
    notes = "fastmlp.MLP, fastmlp's loss, fused torch.optim"

    def available(self, problem: Problem) -> Availability:
        return needs((problem.itemsize >= 4, "16 bits go through TrainStep"))

    def build(self, problem: Problem) -> Run:
        return _ModulesRun(problem)  # type: ignore[arg-type]
