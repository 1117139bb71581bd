"""A = f(X W^T + b), and its backward pass."""

from __future__ import annotations

from bench.problems import LinearBackwardProblem, LinearProblem, Problem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches

FORWARD: list[Problem] = [
    LinearProblem(64, 784, 512, device=device()),
    LinearProblem(4096, 784, 512, device=device()),
    LinearProblem(64, 784, 512, "gelu", device=device()),
    LinearProblem(64, 784, 512, dtype="bfloat16", device=device()),
]
BACKWARD: list[Problem] = [
    LinearBackwardProblem(64, 784, 512, device=device()),
    LinearBackwardProblem(1024, 784, 512, "relu", device=device()),
]


@matches(FORWARD)
def test_linear_act(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)


@matches(BACKWARD)
def test_linear_act_backward(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
