"""The whole training step of the reference network, and of a small one in other dtypes and with other optimizers."""

from __future__ import annotations

from bench.presets import REFERENCE
from bench.problems import Problem, StepProblem
from bench.rivals.protocol import Rival
from bench.suite.conftest import Contest, device, matches

SMALL = (784, 64, 64, 10)
PROBLEMS = [
    *(StepProblem(REFERENCE, batch, device=device()) for batch in (1, 64, 512, 4096)),
    StepProblem(SMALL, 64, optimizer="nesterov", device=device()),
    StepProblem(SMALL, 64, optimizer="adamw", device=device()),
    StepProblem(SMALL, 64, activation="relu", device=device()),
    StepProblem(SMALL, 64, activation="relu", loss="mse", device=device()),
    StepProblem(SMALL, 64, "relu", bias=False, dtype="float16", device=device()),
    StepProblem(SMALL, 512, dtype="bfloat16", device=device()),
    *(
        StepProblem(SMALL, 64, "relu", "adam", weighs_classes=True, dropout=dropout, device=device())
        for dropout in (0.0, 0.2)
    ),
]


@matches(PROBLEMS)
def test_step(contest: Contest, problem: Problem, rival: Rival) -> None:
    contest(problem, rival)
