"""What every kernel test shares: poisoned memory and the error budget.

Poison: inputs lie inside larger storage full of NaN, and outputs start as NaN. So a read outside the input, and an
element that was never written, show as NaN in the result.

Budget: an error against float64 may be at most twice torch's own error in the same dtype, plus a floor. The floor is
one rounding to the output's dtype, plus the rounding errors of a sum in float32, which grow with the square root of the
reduction length. Both are relative to the largest magnitude of the result. The smallest number of the dtype is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EPS32 = 2.0**-23


def poisoned(values: Tensor, *, pad: int = 5, layout: str = "rows") -> Tensor:
    """A view equal to ``values``, embedded in larger storage that holds NaN (255 for integers) everywhere else.

    ``layout``: "rows" keeps the last dimension contiguous but rows apart by an odd stride; "columns" makes the
    first dimension the contiguous one; "spread" leaves gaps in all; "dense" is contiguous with poison only before
    and after.
    """
    fill = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    shape = values.shape
    if values.ndim == 1 and layout == "spread":
        view = torch.full((3 * values.numel() + 2 * pad,), fill, dtype=values.dtype)[pad : pad + 3 * values.numel() : 3]
    elif values.ndim == 1 or layout == "dense":
        storage = torch.full((values.numel() + 2 * pad * 16,), fill, dtype=values.dtype)
        view = storage[pad * 16 : pad * 16 + values.numel()].view(shape)
    elif layout == "rows":
        view = torch.full((shape[0] + 2, shape[1] + 2 * pad), fill, dtype=values.dtype)[1:-1, pad : pad + shape[1]]
    elif layout == "columns":
        view = torch.full((shape[1] + 2, shape[0] + 2 * pad), fill, dtype=values.dtype)[1:-1, pad : pad + shape[0]].t()
    elif layout == "spread":
        view = torch.full((shape[0] * 2 + 2, shape[1] * 3 + 2 * pad), fill, dtype=values.dtype)
        view = view[1:-1:2, pad : pad + 3 * shape[1] : 3]
    else:
        raise ValueError(layout)
    view.copy_(values)
    return view


def nan_like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output full of NaN."""
    return torch.full(shape, math.nan, dtype=dtype)


def budget(expected: Tensor, torch_result: Tensor, reduction: int, dtype: torch.dtype, magnitude: float = 0.0) -> float:
    """The largest absolute error allowed: 2x torch's own, plus the floor; see the module docstring.

    ``magnitude``: the largest sum of absolute values of the terms of one result. Rounding errors of a sum are
    relative to this sum, which is much larger than the results where terms cancel.
    """
    scale = expected.abs().max().item() if expected.numel() else 0.0
    own = (torch_result.double() - expected).abs().max().item() if expected.numel() else 0.0
    floor = torch.finfo(dtype).eps * scale + EPS32 * math.sqrt(max(1, reduction)) * max(scale, magnitude)
    return 2 * own + floor + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def assert_within_budget(
    actual: Tensor,
    expected: Tensor,
    torch_result: Tensor,
    *,
    reduction: int,
    magnitude: float = 0.0,
    what: str = "result",
) -> None:
    """``actual`` (any float dtype) against ``expected`` (float64) and torch's result in the same dtype."""
    assert expected.dtype == torch.float64, "the oracle computes in float64"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs()
    assert not error.isnan().any(), f"{what}: NaN at {error.isnan().nonzero()[0].tolist()}"
    allowed = budget(expected, torch_result, reduction, actual.dtype, magnitude)
    worst = error.max().item()
    if worst > allowed:
        where = (error == error.max()).nonzero()[0].tolist()
        got, want = actual[tuple(where)].item(), expected[tuple(where)].item()
        raise AssertionError(
            f"{what}: error {worst:.3e} at {where} (got {got:.9g}, expected {want:.9g}) is over the budget "
            f"{allowed:.3e}; torch's own error is {(torch_result.double() - expected).abs().max().item():.3e}"
        )
