"""Last layer, softmax cross-entropy and their backward pass."""

from __future__ import annotations

from bench.problems import HeadProblem, Problem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches


@matches([HeadProblem(batch, 512, 10, device=device()) for batch in (64, 4096)])
def test_head(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
