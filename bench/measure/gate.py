"""The correctness gate: a contender's results are compared with float64 before it is timed.

A result passes if its error is at most twice torch's own in the same dtype, plus a floor. The floor is one rounding to
the dtype per call, and float32's rounding times the square root of the longest sum. An error is the norm over a whole
tensor, relative to the norm of the right result. The tensor of a training step is what the steps have changed. Three
properties of a problem allow more:

- ``roundings``: how often a parameter may be rounded on the way, each time by float32's rounding
- ``conditioning``: what the optimizer's own scalars lose in float32
- ``unsettled``: what depends on the side of the activation's kink to which a rounding error moves z
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bench.problems import GATE_CALLS, Problem, Results

__all__ = ["Verdict", "judge", "worst"]


@dataclass(frozen=True)
class Verdict:
    """The worst tensor ``what`` with its ``error`` and what is ``allowed``, relative to its norm.

    ``overall`` is the relative error of all tensors together.
    """

    passed: bool
    what: str
    error: float
    allowed: float
    overall: float

    def __str__(self) -> str:
        relation = "within" if self.passed else "over"
        return f"{self.what}: relative error {self.error:.2e}, {relation} the {self.allowed:.2e} allowed"


@functools.lru_cache(maxsize=4)
def _oracles(problem: Problem) -> tuple[Results, Results, Results]:
    """(in float64, in the problem's dtype, what is unsettled) by plain torch on the CPU; all contenders share them."""
    return problem.oracle(torch.float64), problem.oracle(problem.torch_dtype), problem.unsettled()


def judge(problem: Problem, results: Results) -> Verdict:
    """Compare a contender's results after ``GATE_CALLS`` calls with the oracle.

    Raises:
        ValueError: the names or shapes differ from the oracle's.
    """
    expected, own, unsettled = _oracles(problem)
    rounded = torch.finfo(torch.promote_types(problem.torch_dtype, torch.float32)).eps * math.sqrt(problem.roundings)
    _check_shapes(results, expected)
    absolute = {name: rounded * value.norm().item() for name, value in expected.items()}
    for name, change in unsettled.items():
        absolute[name] += change.norm().item()
    return worst(
        problem.judged({name: value.double().cpu() for name, value in results.items()}),
        problem.judged(expected),
        problem.judged(own),
        dtype=problem.torch_dtype,
        reduction=problem.reduction,
        calls=GATE_CALLS,
        more=problem.conditioning,
        absolute=absolute,
    )


def _check_shapes(results: Results, expected: Results) -> None:
    if results.keys() != expected.keys():
        raise ValueError(f"expected results {sorted(expected)}, got {sorted(results)}")
    for name, value in expected.items():
        if results[name].shape != value.shape:
            raise ValueError(f"expected {name} of shape {list(value.shape)}, got {list(results[name].shape)}")


def worst(
    results: Results,
    expected: Results,
    own: Results,
    *,
    dtype: torch.dtype,
    reduction: int,
    calls: int = 1,
    more: float = 0.0,
    absolute: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict on the tensor whose error is the largest share of what is allowed.

    Args:
        results, expected, own: the contender's, the exact ones, and torch's in ``dtype``.
        dtype: the dtype of the products.
        reduction: the length of the longest sum.
        calls: how often a result is rounded to ``dtype``.
        more: an allowance relative to the norm.
        absolute: an allowance per tensor.
    """
    _check_shapes(results, expected)
    floor = math.sqrt(calls) * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(reduction) + more
    verdicts = []
    squares = sum(value.norm().item() ** 2 for value in expected.values())
    errors = sum((results[name].double().cpu() - value).norm().item() ** 2 for name, value in expected.items())
    overall = math.sqrt(errors / max(squares, torch.finfo(torch.float32).tiny))
    for name, value in expected.items():
        scale = max(value.norm().item(), torch.finfo(torch.float32).tiny)
        error = (results[name].double().cpu() - value).norm().item() / scale
        allowed = 2 * (own[name].double() - value).norm().item() / scale + floor
        allowed += (0.0 if absolute is None else absolute[name]) / scale
        verdicts.append(Verdict(error <= allowed, name, error, allowed, overall))
    return max(verdicts, key=lambda v: math.inf if math.isnan(v.error) else v.error / v.allowed)
