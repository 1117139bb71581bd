"""Steps of the reference network over data on the device, gathered in a drawn order."""

from __future__ import annotations

from bench.presets import REFERENCE
from bench.problems import EpochProblem, Problem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches


@matches([EpochProblem(REFERENCE, 64, steps=8, device=device())])
def test_epoch(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
