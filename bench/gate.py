"""The correctness gate: a contender's results against float64, before a time is taken of it.

A result passes when its error is no more than twice torch's own in the same dtype, plus a floor: one rounding to the
dtype a call, and float32's rounding times the square root of the longest sum. Errors are norms over a whole tensor,
relative to the norm of the right result. Of a training step, the tensor is what the steps have changed, and each
time that a parameter may be rounded on the way (``Problem.roundings``) adds float32's rounding of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .problems import GATE_CALLS, Problem, Results

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """``error`` and ``allowed`` of the worst tensor, ``what``, relative to its norm."""

    passed: bool
    what: str
    error: float
    allowed: float

    def __str__(self) -> str:
        relation = "within" if self.passed else "over"
        return f"{self.what}: relative error {self.error:.2e}, {relation} the {self.allowed:.2e} allowed"


@functools.lru_cache(maxsize=4)
def _oracles(problem: Problem) -> tuple[Results, Results]:
    """(float64, the problem's dtype by plain torch on the CPU); one pair serves all contenders of a problem."""
    return problem.oracle(torch.float64), problem.oracle(problem.torch_dtype)


def judge(problem: Problem, results: Results) -> Verdict:
    """Compare what a contender has after ``GATE_CALLS`` calls with the oracle.

    Raises:
        ValueError: the names or shapes are not the oracle's.
    """
    expected, own = _oracles(problem)
    results = {name: value.double().cpu() for name, value in results.items()}
    if results.keys() != expected.keys():
        raise ValueError(f"expected results {sorted(expected)}, got {sorted(results)}")
    rounding = math.sqrt(GATE_CALLS) * torch.finfo(problem.torch_dtype).eps
    rounding += torch.finfo(torch.float32).eps * math.sqrt(problem.reduction)
    verdicts = []
    rounded = torch.finfo(torch.promote_types(problem.torch_dtype, torch.float32)).eps * math.sqrt(problem.roundings)
    norms = {name: value.norm().item() for name, value in expected.items()}
    for name, value in expected.items():
        if results[name].shape != value.shape:
            raise ValueError(f"expected {name} of shape {list(value.shape)}, got {list(results[name].shape)}")
    expected, own, results = problem.judged(expected), problem.judged(own), problem.judged(results)
    for name, value in expected.items():
        scale = max(value.norm().item(), torch.finfo(torch.float32).tiny)
        error = (results[name] - value).norm().item() / scale
        allowed = 2 * (own[name] - value).norm().item() / scale + rounding
        allowed += rounded * norms[name] / scale
        verdicts.append(Verdict(error <= allowed, name, error, allowed))
    return max(verdicts, key=lambda v: math.inf if math.isnan(v.error) else v.error / v.allowed)
