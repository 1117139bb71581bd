"""scikit-learn's MLPClassifier.partial_fit: one call is one step on the batch."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import torch

from bench.problems import OPTIMIZERS, Problem, Results
from bench.rivals.protocol import Availability, Run, installed, needs
from bench.rivals.training import TrainingProblem

__all__ = ["SklearnMLP"]

_ACTIVATIONS = {"sigmoid": "logistic", "relu": "relu", "tanh": "tanh"}


class _SklearnRun:
    def __init__(self, problem: TrainingProblem) -> None:
        from sklearn.neural_network import MLPClassifier

        settings = OPTIMIZERS[problem.optimizer]
        self.model: Any = MLPClassifier(
            problem.sizes[1:-1],
            activation=_ACTIVATIONS[problem.activation],
            solver="sgd",
            alpha=0.0,
            batch_size=problem.batch,
            learning_rate_init=settings["lr"],
            momentum=settings.get("momentum", 0.0),
            nesterovs_momentum=settings.get("nesterov", False),
            shuffle=False,
        )
        self.online = problem.kind == "online"
        self.classes = np.arange(problem.sizes[-1])
        self.sets = [tuple(t.numpy() for t in problem.make_inputs(i)) for i in range(problem.input_sets)]
        self.count = 0
        x, y = self.sets[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class that the first batch lacks
            self.model.partial_fit(x[: problem.batch], y[: problem.batch], classes=self.classes)
        # Only a first fit allocates the parameters. They return to the starting values, and the velocities to zero.
        params = [p.numpy() for p in problem.parameters()]
        for mine, w in zip(self.model.coefs_, params[::2], strict=True):
            mine[...] = w.T
        for mine, b in zip(self.model.intercepts_, params[1::2], strict=True):
            mine[...] = b
        for velocity in self.model._optimizer.velocities:
            velocity[...] = 0

    def __call__(self) -> object:
        x, y = self.sets[self.count % len(self.sets)]
        self.count += 1
        if not self.online:
            return self.model.partial_fit(x, y)
        for i in range(len(y)):
            self.model.partial_fit(x[i : i + 1], y[i : i + 1])
        return self.model

    def finish(self) -> None:
        """Nothing is asynchronous."""

    def results(self) -> Results:
        """The parameters in torch's layout."""
        pairs = zip(self.model.coefs_, self.model.intercepts_, strict=True)
        params = itertools.chain.from_iterable((torch.from_numpy(w.T.copy()), torch.from_numpy(b)) for w, b in pairs)
        return {f"parameter {i}": p.double().clone() for i, p in enumerate(params)}


class SklearnMLP:
    """The classifier that most people meet first."""

    name = "sklearn"
    label = "scikit-learn partial_fit"
    kinds = frozenset({"step", "online"})
    notes = "MLPClassifier(solver='sgd', alpha=0), one partial_fit per step, which also checks its input"

    def available(self, problem: Problem) -> Availability:
        return needs(
            installed("sklearn"),
            (getattr(problem, "bias", True), "written with biases"),
            (getattr(problem, "loss", "cross_entropy") == "cross_entropy", "its classifier has cross-entropy"),
            (not problem.device.startswith("cuda"), "runs on the CPU"),
            (problem.dtype == "float32", "has no 16-bit products"),
            (getattr(problem, "optimizer", "") in ("sgd", "nesterov"), "its Adam has no decoupled weight decay"),
            (getattr(problem, "activation", "") in _ACTIVATIONS, "lacks the activation"),
        )

    def build(self, problem: Problem) -> Run:
        return _SklearnRun(problem)  # type: ignore[arg-type]
