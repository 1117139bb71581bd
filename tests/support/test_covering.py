"""What is executed of a grid that is marked "covering"."""

from __future__ import annotations

import itertools

import pytest

from .covering import diagonal


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 3), (8, 3), (2, 7), (3, 1, 4)], ids=str)
def test_every_value_occurs_in_as_many_cases_as_the_longest_parameter_has(sizes, start):
    grid = list(itertools.product(*(range(n) for n in sizes)))
    chosen = [case for case, taken in zip(grid, diagonal(grid, start), strict=True) if taken]
    assert len(chosen) == max(sizes)
    assert [len(set(values)) for values in zip(*chosen, strict=True)] == list(sizes)


def test_other_starts_pair_other_values():
    grid = list(itertools.product("abcdef", range(3)))
    taken = [diagonal(grid, start) for start in range(3)]
    assert [sum(chosen) for chosen in zip(*taken, strict=True)] == [1] * len(grid)


def test_parameters_that_change_together_are_one():
    grid = [(*joint, dtype) for joint in ((1, [1]), (2, [2]), (3, [3])) for dtype in "xy"]
    assert [case for case, taken in zip(grid, diagonal(grid), strict=True) if taken] == [
        (1, [1], "x"), (2, [2], "y"), (3, [3], "x"),
    ]  # fmt: skip
