"""Online training: a stretch of single-sample steps of the reference network."""

from __future__ import annotations

from bench.presets import REFERENCE
from bench.problems import OnlineProblem, Problem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches


@matches([OnlineProblem(REFERENCE, samples=64, device=device())])
def test_online(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
