"""How a whole training step runs on a CPU: by the libraries chosen for each layer, by aten, or by machine code.

A product is slower inside a step than alone, because its code and data are no longer in the cache. oneDNN's calls also
push out the code of the operations after them. So where products are short, steps of a network of the same shape are
timed, and the fastest way is taken:

    each    every product by the library that is faster at it alone
    aten    every product by BLAS
    native  the whole step by machine code (``fastmlp.cpu.native``), where numba is installed, for few rows
    native team    the same by several threads, for larger layers

Plain SGD on two threads of an Intel Xeon (family 6, model 167) takes 307, 312, 234 and 104 us in this order for a
single row through 784-512-512-10, 982, 1,002, 1,515 and 838 us for 32 rows of it, and 203, 201 and 46 us for 64 rows
through 4-64-64-2, which is no work for a team.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import choose, native, threads
from .choose import Choice

#: Multiplications of one pass through all layers from which on products are so long that each is best by itself.
_LONG = 1 << 25

#: Batch sizes up to which the machine code is one of the ways.
_NATIVE_ROWS = 128

#: A team is tried from so many rows of the largest weight per thread on, and from so many multiplications of a pass.
_ROWS_OF_A_THREAD, _WORTH_A_TEAM = 64, 1 << 16

Step = Callable[..., Any]


class NativePlan(NamedTuple):
    """A step by machine code."""

    needs: Sequence[str]  #: units of machine code
    #: (The units, a function that plans the step for what the machine code does not have, most threads) -> the step.
    step: Callable[[native.Units, Callable[[], Step], int], Step]


#: A number of rows -> a function that plans their step on a network of scratch data, the plan by machine code or None,
#: and the arguments of that step.
Scratch = Callable[[int], tuple[Callable[[], Step], NativePlan | None, tuple[Tensor, ...]]]


def native_rows(m: int) -> bool:
    """Whether steps of ``m`` rows may be machine code."""
    return native.installed() and (choose.get_cpu_gemm() == "native" or (m <= _NATIVE_ROWS and choose.measures()))


def native_units(m: int, multiplications: int, dtype: torch.dtype, needs: Sequence[str]) -> native.Units | None:
    """The machine code, if steps of ``m`` rows and so many multiplications may be machine code.

    Raises:
        RuntimeError: the machine code was asked for, and could not be compiled.
    """
    asked = choose.get_cpu_gemm() == "native"
    if not native_rows(m) or (multiplications >= _LONG and not asked):
        return None
    units = native.units(dtype, needs)
    if asked and units is None:
        raise RuntimeError(f"{native.missing(dtype)}, or use set_cpu_gemm('auto')")
    return units


def plan_step(
    kind: str,
    m: int,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    plan: Callable[[], Step],
    scratch: Scratch,
    by_native: NativePlan | None = None,
) -> Step:
    """The step of ``m`` rows that ``plan`` returns, planned and called in the fastest way.

    Args:
        kind: what the time of a step depends on, besides ``m``, ``dtype``, the threads, and the inputs and outputs.
        weights: of all layers; on another device than a CPU aten makes all products, and nothing is measured.
        plan: asks for the products of the layers (``layer_products``).
        scratch: the same for a step to measure with, which must touch nothing of this one's.
        by_native: plans the step on machine code; None: the machine code does not have it.

    Raises:
        RuntimeError: the machine code was asked for, and could not be compiled.
    """
    units = None
    if by_native is not None:
        units = native_units(m, m * sum(weight.numel() for weight in weights), dtype, by_native.needs)
    if by_native is None or units is None:
        way: Choice = "aten"
        if weights[0].device.type == "cpu":
            way = _step_way(kind, m, weights, dtype, scratch)
        return _in_way(way, plan)
    most = 1
    if choose.get_cpu_gemm() != "native":
        way = _step_way(f"{kind} or native", m, weights, dtype, scratch, units)
        if way not in ("native", "native team"):
            return _in_way(way, plan)
        most = _team(weights, m) if way == "native team" else 1
    return by_native.step(units, partial(plan_step, kind, m, weights, dtype, plan, scratch), most)


def _team(weights: Sequence[Tensor], m: int) -> int:
    """The most threads of a step of ``m`` rows by machine code."""
    if not threads.team() or m * sum(weight.numel() for weight in weights) < _WORTH_A_TEAM:
        return 1
    return max(1, min(torch.get_num_threads(), max(weight.shape[0] for weight in weights) // _ROWS_OF_A_THREAD))


def _step_way(
    kind: str,
    m: int,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    scratch: Scratch,
    units: native.Units | None = None,
) -> Choice:
    """The fastest way, measured or known; with the machine code where there is one."""
    products = [m * weight.numel() for weight in weights]
    if units is None and (sum(products) >= _LONG or not choose.worth_measuring(max(products))):
        return "each"
    ways: tuple[Choice, ...] = ("each", "aten")

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        plan, by_native, batch = scratch(rows)
        steps: dict[Choice, Callable[[], object]] = {way: partial(_in_way(way, plan), *batch) for way in ways}
        if units is not None and by_native is not None:
            most = _team(weights, rows)
            steps["native"] = partial(by_native.step(units, plan, 1), *batch)
            if most > 1:
                steps["native team"] = partial(by_native.step(units, plan, most), *batch)
        return steps

    k, n = weights[0].shape[1], weights[-1].shape[0]
    way = choose.choose(kind, m, k, n, dtype, trials, whatever_size=True, whatever_dtype=units is not None)
    return way if way in ("aten", "native", "native team") else "each"


def _in_way(way: Choice, plan: Callable[[], Step]) -> Step:
    with nullcontext() if way == "each" else choose.only_aten():
        return plan()
