"""Learning-rate schedules: pure functions from the step to a factor of the base learning rate.

A schedule is ``factor(step, steps, warmup)`` for step 0 .. steps - 1. "linear" and "cosine" rise linearly to 1 over the
first ``warmup`` steps, as (step + 1) / warmup, and then fall towards 0. The last step still moves the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..base.names import unknown

Schedule = Callable[[int, int, int], float]


def constant(step: int, steps: int, warmup: int) -> float:
    """1 at every step; no warm-up."""
    return 1.0


def linear(step: int, steps: int, warmup: int) -> float:
    """Warm-up, then (steps - step) / (steps - warmup): 1 at step = warmup, 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Warm-up, then (1 + cos(pi (step - warmup) / (steps - warmup))) / 2, half a period of a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


SCHEDULES: Mapping[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}
"""Every schedule by name."""


def lr_factors(schedule: str | Schedule, steps: int, warmup: float = 0.05) -> list[float]:
    """The factor of each of ``steps`` steps; arguments and errors as `lr_factor`."""
    return list(map(lr_factor(schedule, steps, warmup), range(steps)))


def lr_factor(schedule: str | Schedule, steps: int, warmup: float = 0.05) -> Callable[[int], float]:
    """The function from the number of a step, below ``steps``, to its factor.

    Args:
        schedule: a name of `SCHEDULES`, or a function (step, steps, warmup_steps) -> factor.
        steps: the number of steps of the whole run.
        warmup: share of the steps that the warm-up takes, in [0, 1); rounded down to whole steps.

    Raises:
        ValueError: an unknown name, or ``warmup`` outside [0, 1).
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", schedule, SCHEDULES, ", or a function"))
        schedule = SCHEDULES[schedule]
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is the share of the steps to warm up in, expected at least 0 and below 1: {warmup}")
    factor, first = schedule, int(warmup * steps)
    return lambda step: factor(step, steps, first)
