"""What contenders for a training step on torch tensors share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.problems import OPTIMIZERS, EpochProblem, MembersProblem, OnlineProblem, Results, StepProblem
from bench.problems.training import ADAMS
from bench.rivals.protocol import OpRun
from fastmlp.activations import ACTIVATIONS

__all__ = ["TrainingProblem", "TrainingRun", "class_weight_of", "loss_module", "optimizer_of", "torch_network"]

TrainingProblem = StepProblem | OnlineProblem | EpochProblem | MembersProblem


def torch_network(
    problem: TrainingProblem, dtype: torch.dtype = torch.float32, values: Sequence[Tensor] | None = None
) -> nn.Sequential:
    """nn.Linear layers and activations on the problem's device, with its starting values or with ``values``."""
    modules: list[nn.Module] = []
    module = ACTIVATIONS[problem.activation].module
    assert module is not None
    activation = partial(module[0], **module[1])
    for k, n in zip(problem.sizes[:-1], problem.sizes[1:], strict=True):
        modules += [nn.Linear(k, n, bias=problem.bias), activation()]
        modules += [nn.Dropout(problem.dropout)] if problem.dropout else []
    while not isinstance(modules[-1], nn.Linear):
        modules.pop()
    network = nn.Sequential(*modules)
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), values or problem.parameters(), strict=True):
            parameter.copy_(value)
    return network.to(problem.device, dtype)


def loss_module(problem: TrainingProblem) -> nn.Module:
    """torch.nn's loss of that name."""
    if problem.loss == "mse":
        return nn.MSELoss()
    return nn.CrossEntropyLoss(class_weight_of(problem))


def class_weight_of(problem: TrainingProblem) -> Tensor | None:
    """The class weights on the device, in the parameters' dtype."""
    weight = problem.class_weight()
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    return None if weight is None else weight.to(problem.device, dtype)


def optimizer_of(problem: TrainingProblem, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """torch.optim's optimizer with the problem's settings."""
    kind: Any = ADAMS.get(problem.optimizer, torch.optim.SGD)
    return kind(parameters, **OPTIMIZERS[problem.optimizer], **options)


class TrainingRun(OpRun):
    """A run that trains ``params`` (W_1, b_1, ...) in place; ``step(x, y)`` is one step on a batch.

    Unless ``compute`` is overridden, online problems take the samples of a call one by one, and epochs gather the rows
    of each batch first. With members every tensor of ``params`` begins with them, as x and y do.
    """

    params: list[Tensor]

    def __init__(self, problem: TrainingProblem) -> None:
        super().__init__(problem, ())
        self.problem = problem
        self._is_step = problem.kind in ("step", "members")
        x, y = self.sets[0][:2]
        #: A batch as a step gets it, for contenders that need their inputs before the first step.
        self.example = x[: problem.leading], y[: problem.leading]

    def step(self, x: Tensor, y: Tensor) -> object:
        """Forward, loss, backward and update."""
        raise NotImplementedError

    def gathered_step(self, x: Tensor, y: Tensor, rows: Tensor) -> object:
        """A step on some rows of X and Y."""
        return self.step(x.index_select(0, rows), y.index_select(0, rows))

    def __call__(self) -> object:
        if not self._is_step:
            return super().__call__()
        # Between two steps there is as little of this suite as in a loop over batches, and as around JAX's step.
        x, y = self.sets[self.count % len(self.sets)]
        self.count += 1
        return self.step(x, y)

    def compute(self, *inputs: Tensor) -> object:
        """The steps of a call of an online problem or an epoch."""
        x, y, *order = inputs
        last: object = None
        if order:
            for rows in order[0].split(self.problem.batch):
                last = self.gathered_step(x, y, rows)
        else:
            for i in range(x.shape[0]):
                last = self.step(x[i : i + 1], y[i : i + 1])
        return last

    def results(self) -> Results:
        """The parameters, as far as the gate compares them."""
        compared = map(self.problem.compared, self.params)
        return {f"parameter {i}": p.detach().double().cpu().clone() for i, p in enumerate(compared)}
