"""The online loop of the source documents: numpy, one sample per step, gradients as outer products, float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from bench.problems import OPTIMIZERS, OnlineProblem, Problem, Results
from bench.rivals.protocol import Availability, Run, needs

__all__ = ["NumpyLoop"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def _softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


class _NumpyRun:
    """Row vectors and weights [in, out], as in the notebook "Introduction to Neural Networks"."""

    def __init__(self, problem: OnlineProblem) -> None:
        params = [p.double().numpy().copy() for p in problem.parameters()]
        self.weights = [np.ascontiguousarray(w.T) for w in params[::2]]
        self.biases = params[1::2]
        self.lr = OPTIMIZERS[problem.optimizer]["lr"]
        self.sets = [tuple(t.numpy() for t in problem.make_inputs(i)) for i in range(problem.input_sets)]
        self.sets = [(x.astype(np.float64), y) for x, y in self.sets]
        self.count = 0

    def __call__(self) -> object:
        images, labels = self.sets[self.count % len(self.sets)]
        self.count += 1
        for x, label in zip(images, labels, strict=True):
            self.train(x.reshape(1, -1), int(label))
        return None

    def train(self, x: Array, label: int) -> None:
        """Forward and backward by the chain rule, then the update of every layer."""
        outputs = [x]
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            z = outputs[-1] @ w + b
            outputs.append(z if i == len(self.weights) - 1 else 1 / (1 + np.exp(-z)))
        delta = _softmax(outputs[-1])
        delta[0, label] -= 1
        gradients = []
        for i in reversed(range(len(self.weights))):
            gradients.append((outputs[i].T @ delta, delta[0]))
            if i:
                delta = (delta @ self.weights[i].T) * outputs[i] * (1 - outputs[i])
        for i, (dw, db) in zip(reversed(range(len(self.weights))), gradients, strict=True):
            self.weights[i] -= self.lr * dw
            self.biases[i] -= self.lr * db

    def finish(self) -> None:
        """Nothing is asynchronous."""

    def results(self) -> Results:
        """The parameters in torch's layout."""
        params = itertools.chain.from_iterable(
            (torch.from_numpy(w.T.copy()), torch.from_numpy(b.copy()))
            for w, b in zip(self.weights, self.biases, strict=True)
        )
        return {f"parameter {i}": p for i, p in enumerate(params)}


class NumpyLoop:
    """The by-hand code that the project starts from."""

    name = "numpy"
    label = "numpy, by hand"
    kinds = frozenset({"online"})
    notes = "float64, W -= lr * (a.T @ delta) sample by sample, as in the source documents"

    def available(self, problem: Problem) -> Availability:
        return needs(
            (getattr(problem, "bias", True), "written with biases"),
            (not problem.device.startswith("cuda"), "runs on the CPU"),
            (getattr(problem, "activation", "") == "sigmoid", "written for sigmoid"),
            (getattr(problem, "optimizer", "") == "sgd", "written for plain SGD"),
        )

    def build(self, problem: Problem) -> Run:
        assert isinstance(problem, OnlineProblem)
        return _NumpyRun(problem)
