"""dW = dZ^T X and db = sum dZ."""

from __future__ import annotations

from bench.problems import Problem, WgradProblem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches


@matches([WgradProblem(batch, 784, 512, device=device()) for batch in (64, 4096)])
def test_wgrad(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
