"""No program of a launch depends on another program; in any order the results are the same, bit by bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import INTERPRETING, uninitialized_is_nan
from tests.kernels.launches import LAUNCHES, SINGLE_PROGRAM, kernel_names
from tests.support.interpreter import bounds_checked, programs, shuffled

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="the order of programs is set in Triton's interpreter"),
    # The interpreter is numpy, which warns of inf - inf in elements that a mask then drops.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("launch", LAUNCHES)
def test_any_order_gives_the_same_bits(launch):
    with bounds_checked(), uninitialized_is_nan():
        expected = LAUNCHES[launch](CPU)
        for order in (lambda name, count: range(count)[::-1], *(shuffled(seed) for seed in range(3))):
            with programs(order):
                for got, want in zip(LAUNCHES[launch](CPU), expected, strict=True):
                    assert (got is None) == (want is None)
                    assert got is None or torch.equal(got, want)


def test_every_kernel_is_among_them():
    seen: dict[str, int] = {}

    def count_programs(name: str, count: int) -> range:
        seen[name] = max(count, seen.get(name, 0))
        return range(count)

    with programs(count_programs):
        for launch in LAUNCHES.values():
            launch(CPU)
    assert set(seen) == kernel_names()
    assert {name for name, count in seen.items() if count == 1} == SINGLE_PROGRAM


@triton.jit
def _double_neighbour_kernel(x_ptr, N, REACH: tl.constexpr):
    """x[i + REACH] = 2 x[i]. With REACH 1, each program reads a value that another program writes."""
    i = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(x_ptr + i + REACH, tl.load(x_ptr + i) * 2.0, mask=i + REACH < N)


def doubled(order, *, reach: int = 1, grid: tuple[int, int] = (3, 2)) -> list[float]:
    x = torch.ones(6)
    with bounds_checked(), programs(order):
        _double_neighbour_kernel[grid](x, 6, REACH=reach)
    return x.tolist()


def test_the_order_is_what_was_asked_for():
    assert doubled(lambda name, count: range(count)) == [1, 2, 4, 8, 16, 32]
    assert doubled(lambda name, count: range(count)[::-1]) == [1, 2, 2, 2, 2, 2]
    assert doubled(lambda name, count: [1, 3]) == [1, 1, 2, 1, 2, 1]
    assert len({tuple(doubled(shuffled(seed))) for seed in range(10)}) > 5


def test_accesses_outside_every_argument_are_errors():
    with pytest.raises(triton.runtime.errors.InterpreterError, match=r"IndexError.*load of 1 elements outside"):
        doubled(lambda name, count: range(count), reach=0, grid=(7, 1))
    with pytest.raises(triton.runtime.errors.InterpreterError, match=r"IndexError.*store of 1 elements outside"):
        doubled(lambda name, count: range(count), reach=-1)
