"""How the members of an ensemble share the threads of a CPU.

    batched   one batched product for all members, which BLAS gives to all threads
    alone     the same by the calling thread alone
    spread    an equal part of the members for each thread, in batched products that the thread makes alone
    small     as spread, but few members at a time, so that what one operation writes is in the cache for the next

A second thread has to be woken and waited for at every product. A thread that keeps its members finds their weights and
activations in its own cache, and never waits for another thread within a step, but for Python between two operations.
Small networks lose more by further calls than they win by the cache. So steps of a part of the ensemble are timed once
per shape (``fastmlp.cpu.choose``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch

from . import choose, threads

Way = Literal["batched", "alone", "spread", "small"]
MEMBER_WAYS: tuple[Way, ...] = get_args(Way)


def member_way(
    kind: str,
    m: int,
    ends: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    trials: Callable[[int], dict[Way, Callable[[], object]]],
) -> Way:
    """The fastest way to train steps of ``m`` rows per member, measured or known; "batched" unmeasured.

    Args:
        kind: what the time of a step depends on, besides ``m``, the ends (inputs and outputs), dtype and threads.
        trials: a number of rows -> steps to measure, by way.
    """
    if device.type != "cpu" or not threads.available():
        return "batched"
    found = choose.choose(kind, m, *ends, dtype, cast(choose.Trials, trials), whatever_size=True)
    return found if found in MEMBER_WAYS else "batched"
