"""What is timed: problems with fixed inputs, counted arithmetic and traffic, and an oracle in plain torch."""

from .base import GATE_CALLS, Problem, Results, generator
from .operations import CrossEntropyProblem, HeadProblem, LinearBackwardProblem, LinearProblem, WgradProblem
from .training import OPTIMIZERS, OnlineProblem, StepProblem

__all__ = [
    "GATE_CALLS",
    "OPTIMIZERS",
    "CrossEntropyProblem",
    "HeadProblem",
    "LinearBackwardProblem",
    "LinearProblem",
    "OnlineProblem",
    "Problem",
    "Results",
    "StepProblem",
    "WgradProblem",
    "generator",
]
