"""A part of a grid of parameters in which every value of every parameter occurs.

The execute lane compiles every case before executing it, and compiling takes most of its time. The whole grid, such as
each activation in each dtype, is computed in the interpreter's lane, and executed with ``--full``. The placement lane
takes such a part per backend, or of the whole grid where there is one backend.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

__all__ = ["SIMULATED", "diagonal", "in_turns", "left_out"]

#: The architectures that the execute lane simulates, in the order of the starts of their diagonals.
SIMULATED = (120, 75, 80)
#: Parameters of which each value has a part of the grid, and where the diagonal of that part starts.
PARTS = ("lane", "backend_name")
STARTS = {**{f"sm_{arch}": start for start, arch in enumerate(SIMULATED)}, "auto": 0, "torch": 1}


def diagonal(grid: Sequence[Sequence[object]], start: int = 0) -> list[bool]:
    """Which cases of a full grid (rows of parameters' values) are on its diagonal.

    On the diagonal, all parameters count through their values together, again and again, until the longest parameter
    has had all of its values. Parameters that only change together count as one. The last parameter begins with its
    value number ``start``, so that another start pairs other values.
    """
    columns = []
    for values in zip(*(map(repr, case) for case in grid), strict=True):
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        columns.append(tuple(numbers[value] for value in values))
    columns = list(dict.fromkeys(columns))
    counts = [max(column) + 1 for column in columns]
    starts = [0] * (len(counts) - 1) + [start]
    taken = {tuple((s + i) % n for s, n in zip(starts, counts, strict=True)) for i in range(max(counts))}
    return [case in taken for case in zip(*columns, strict=True)]


def in_turns(grid: Iterable[tuple[Any, ...]], values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The cases of a grid, each with one more value; the values take turns."""
    return [(*case, value) for case, value in zip(grid, itertools.cycle(values), strict=False)]


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What the execute and the placement lane leave out of the tests that are marked "covering"."""
    grids: defaultdict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        in_lane = item.get_closest_marker("execute") or item.get_closest_marker("placement")
        if isinstance(item, pytest.Function) and in_lane and item.get_closest_marker("covering"):
            grids[item.nodeid.partition("[")[0], _part(item)].append(item)
    out: list[pytest.Item] = []
    for (_, part), grid in grids.items():
        # sm_75 has no bfloat16: those cases skip themselves.
        able = [item for item in grid if not (part == "sm_75" and torch.bfloat16 in item.callspec.params.values())]
        values = [[value for name, value in item.callspec.params.items() if name not in PARTS] for item in able]
        out += [item for item, taken in zip(able, diagonal(values, STARTS.get(part, 0)), strict=True) if not taken]
        out += [item for item in grid if item not in able]
    return out


def _part(item: pytest.Function) -> str:
    """The value of the parameter of which every value has a part of the grid; empty without such a parameter."""
    return next((str(item.callspec.params[name]) for name in PARTS if name in item.callspec.params), "")
