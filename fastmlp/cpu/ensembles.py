"""How the members of an ensemble share the threads of a CPU.

    batched   one batched product for all members, which BLAS gives to all threads
    alone     the same by the calling thread alone
    spread    an equal part of the members for each thread, in batched products that the thread makes alone
    each      the products of one member after the other, each by the library that is faster at it, as for an MLP
    small     as spread, but few members at a time, so that what one operation writes is in the cache for the next
    native    an equal part of the members for each thread, whose step, or whole epoch, is one call of machine code
              (``fastmlp.cpu.native``), where numba is installed, for few rows
    native alone    the same by the calling thread alone: to wake another takes as long as the steps of a few members

A second thread has to be woken and waited for at every product. A thread that keeps its members finds their weights and
activations in its own cache. Within a step it waits for other threads only between two operations, where Python runs.
Small networks lose more by further calls than they win by the cache. So steps of a part of the ensemble are timed once
per shape (``fastmlp.cpu.choose``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

from . import choose, threads
from .choose import Choice

Way = Literal["batched", "alone", "spread", "small", "each", "native", "native alone"]
#: The ways that need nothing but torch, and those of machine code.
MEMBER_WAYS: tuple[Way, ...] = get_args(Way)[:-2]
NATIVE_WAYS: tuple[Way, ...] = get_args(Way)[-2:]


def member_way(
    kind: str,
    m: int,
    ends: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    multiplications: int,
    trial: Callable[[Way, int], Callable[[], object]],
    *,
    by_native: bool = False,
) -> Way:
    """The fastest way to train steps of ``m`` rows per member, measured or known.

    "batched" where nothing is measured, and "each" where oneDNN was asked for.

    Args:
        kind: what the time of a step depends on, besides ``m``, the ends (inputs and outputs), dtype and threads.
        multiplications: those of a member's largest product.
        trial: a way and a number of rows -> a step to measure.
        by_native: whether the machine code is there and has what the ensemble needs.
    """
    if by_native and choose.get_cpu_gemm() == "native":
        return "native"
    ways = MEMBER_WAYS[:-1] if threads.available() else MEMBER_WAYS[:1]
    if choose.worth_measuring(multiplications):
        ways = (*ways, "each")
    if by_native:
        # With one thread "native" is the same as "native alone".
        kind, ways = f"{kind} or native", (*ways, *(NATIVE_WAYS if torch.get_num_threads() > 1 else NATIVE_WAYS[:1]))
    if device.type != "cpu" or len(ways) == 1:
        return "batched"

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        return {way: trial(way, rows) for way in ways}

    found = choose.choose(kind, m, *ends, dtype, trials, whatever_size=True, whatever_dtype=by_native)
    if found == "onednn":
        return "each"
    return next((way for way in get_args(Way) if way == found), "batched")
