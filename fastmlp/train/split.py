"""The parts of the training data that are held out to judge a run by."""

from __future__ import annotations

import torch
from torch import Tensor


def held_out(y: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows held out) of data with targets ``y`` [N] or [N, outputs], ascending, on the CPU.

    The rows are drawn by a permutation from a generator of their own. Where ``y`` has class numbers, every class is
    held out to the same share, as far as whole rows allow.

    Args:
        y: int64 [N] class numbers, or anything else with N rows.
        share: of the rows to hold out, above 0 and below 1; the number is rounded.
        seed: the same seed and data give the same rows.

    Raises:
        ValueError: ``share`` is outside its range, or leaves no row for one of the two parts.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of the rows to hold out must be above 0 and below 1, got {share}")
    n = len(y)
    order = _drawn(y, seed)
    # Every 1 / share-th row of this order is held out.
    counts = (torch.arange(n + 1, dtype=torch.float64, device="cpu") * share + 0.5).floor()
    held = order[counts.diff() > 0].sort().values
    if not 0 < len(held) < n:
        raise ValueError(
            f"{n} training rows cannot be divided with {len(held)} of them held out, which is a share of {share:g}; "
            "expected at least one row in each part"
        )
    return _other_rows(n, held), held


def fold(y: Tensor, count: int, part: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows held out) for one of ``count`` parts of data, as `held_out` gives them.

    Every row is held out by one part, and the parts differ by at most one row. The rows are drawn as `held_out` draws
    them: where ``y`` has class numbers, the parts differ by at most one row of each class.

    Raises:
        ValueError: ``count`` is below 2 or above the number of rows, or there is no such part.
    """
    n = len(y)
    if not 2 <= count <= n:
        raise ValueError(f"expected 2 to {n} folds for {n} training rows, got {count}")
    if not 0 <= part < count:
        raise ValueError(f"expected a part from 0 to {count - 1} of {count} folds, got {part}")
    held = _drawn(y, seed)[part::count].sort().values
    return _other_rows(n, held), held


def _drawn(y: Tensor, seed: int) -> Tensor:
    """The rows in random order; where ``y`` has class numbers, one class after the other, each in random order."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed), device="cpu")
    if y.dim() == 1 and not y.is_floating_point():
        order = order[y.cpu()[order].argsort(stable=True)]
    return order


def _other_rows(n: int, rows: Tensor) -> Tensor:
    """The rows of ``n`` that are not in ``rows``, ascending."""
    return torch.ones(n, dtype=torch.bool, device="cpu").scatter_(0, rows, False).nonzero().flatten()
