"""One training step of many networks of one shape, each on its own batch."""

from __future__ import annotations

from bench.presets import MEMBER_SHAPES
from bench.problems import MembersProblem, Problem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches

PROBLEMS = [
    MembersProblem(*MEMBER_SHAPES[0], optimizer="sgd", members=9, device=device()),
    MembersProblem(*MEMBER_SHAPES[0], optimizer="adamw", members=9, device=device()),
]


@matches(PROBLEMS)
def test_members(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
