"""How a whole training step runs on a CPU: by the libraries chosen for each layer, by aten, or by machine code.

A product is slower inside a step than alone, because its code and data are no longer in the cache. oneDNN's calls also
push out the code of the operations after them. So where products are short, steps of a network of the same shape are
timed, and the fastest way is taken:

    each    every product by the library that is faster at it alone
    aten    every product by BLAS
    native  the whole step by machine code (``fastmlp.cpu.native``), where numba is installed, for few rows

Plain SGD on two threads of an Intel Xeon (family 6, model 167) takes 169, 157 and 31 us in this order for 64 rows
through 4-64-64-2; 346, 265 and 165 us for a single row through 784-512-512-10; 977, 886 and 1,345 us for 32 rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import choose, native
from .choose import Choice

#: Multiplications of one pass through all layers from which on products are so long that each is best by itself.
_LONG = 1 << 25

#: Batch sizes up to which the machine code is one of the ways.
_NATIVE_ROWS = 128

Step = Callable[..., None]


class NativePlan(NamedTuple):
    """A step by machine code."""

    needs: Sequence[str]  #: units of machine code
    #: (The units, a function that plans the step for what the machine code does not have) -> the step.
    step: Callable[[native.Units, Callable[[], Step]], Step]


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
    if choose.get_cpu_gemm() != "native":
        way = _step_way(f"{kind} or native", m, weights, dtype, scratch, units)
        if way != "native":
            return _in_way(way, plan)
    return by_native.step(units, partial(plan_step, kind, m, weights, dtype, plan, scratch))


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
            steps["native"] = partial(by_native.step(units, plan), *batch)
        return steps

    k, n = weights[0].shape[1], weights[-1].shape[0]
    way = choose.choose(kind, m, k, n, dtype, trials, whatever_size=True, whatever_dtype=units is not None)
    return way if way in ("aten", "native") else "each"


def _in_way(way: Choice, plan: Callable[[], Step]) -> Step:
    with nullcontext() if way == "each" else choose.only_aten():
        return plan()
