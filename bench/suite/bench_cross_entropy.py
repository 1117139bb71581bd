"""Mean softmax cross-entropy and its gradient: few classes, and many."""

from __future__ import annotations

from bench.problems import CrossEntropyProblem, Problem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches

PROBLEMS = [
    CrossEntropyProblem(64, 10, device=device()),
    CrossEntropyProblem(4096, 10, device=device()),
    CrossEntropyProblem(256, 4096, device=device()),
    CrossEntropyProblem(256, 4096, dtype="bfloat16", device=device()),
]


@matches(PROBLEMS)
def test_cross_entropy(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
