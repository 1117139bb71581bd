"""What a contender is: a name, whether it runs here, and how it is made ready for a problem."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bench.problems import Problem, Results

__all__ = ["OK", "Availability", "OpRun", "Rival", "Run", "installed", "needs"]


class Availability(NamedTuple):
    """Whether a contender runs, and why not: "not installed", "needs a GPU", ..."""

    ok: bool
    reason: str = ""


OK = Availability(True)


class Run(Protocol):
    """A contender made ready; each call solves the problem once, on the next input set."""

    def __call__(self) -> object: ...

    def finish(self) -> None:
        """Wait for the work that the calls have started."""

    def results(self) -> Results:
        """What the gate compares after the calls so far, float64 on the CPU."""


class Rival(Protocol):
    """A contender.

    Attributes:
        name: short and unique, the key in the JSON.
        label: for tables and plots.
        kinds: the kinds of problem that it takes part in.
        notes: what a reader of its numbers should know.
    """

    name: str
    label: str
    kinds: frozenset[str]
    notes: str

    def available(self, problem: Problem) -> Availability:
        """Whether it can run the problem on this machine."""

    def build(self, problem: Problem) -> Run:
        """Do everything that happens once: allocation, compilation, capture."""


def installed(package: str) -> Availability:
    """OK, or "not installed"."""
    return OK if importlib.util.find_spec(package) is not None else Availability(False, "not installed")


def needs(*conditions: tuple[bool, str]) -> Availability:
    """OK, or the reason of the first condition that is false; what ``installed`` returns is such a condition."""
    return next((Availability(False, reason) for condition, reason in conditions if not condition), OK)


class OpRun:
    """A run of one operation on torch tensors: ``compute(*inputs)`` on every input set in turn.

    ``names`` names the tensors that ``compute`` returns (a tensor or a tuple of them).
    """

    def __init__(self, problem: Problem, names: tuple[str, ...]) -> None:
        self.device = problem.device
        self.names = names
        self.sets = problem.on_device()
        self.count = 0
        self.last: object = None

    def compute(self, *inputs: Tensor) -> object:
        """The operation."""
        raise NotImplementedError

    def __call__(self) -> object:
        self.last = self.compute(*self.sets[self.count % len(self.sets)])
        self.count += 1
        return self.last

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def results(self) -> Results:
        """The tensors of the last call."""
        values = self.last if isinstance(self.last, tuple) else (self.last,)
        return {
            name: value.detach().double().cpu()
            for name, value in zip(self.names, values, strict=True)
            if isinstance(value, Tensor)
        }
