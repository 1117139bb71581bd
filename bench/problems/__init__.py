"""What is timed: problems with fixed inputs, counted arithmetic and traffic, and an oracle in plain torch."""

from .base import GATE_CALLS, Problem, Results, generator
from .members import MembersProblem
from .operations import CrossEntropyProblem, HeadProblem, LinearBackwardProblem, LinearProblem, WgradProblem
from .training import LOSSES, OPTIMIZERS, EpochProblem, OnlineProblem, StepProblem

__all__ = [
    "GATE_CALLS",
    "LOSSES",
    "OPTIMIZERS",
    "CrossEntropyProblem",
    "EpochProblem",
    "HeadProblem",
    "LinearBackwardProblem",
    "LinearProblem",
    "MembersProblem",
    "OnlineProblem",
    "Problem",
    "Results",
    "StepProblem",
    "WgradProblem",
    "generator",
]
