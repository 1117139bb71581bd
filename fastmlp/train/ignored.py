"""Steps whose labels are all ``ignore_index``: their loss is the mean of nothing, NaN, and they change nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_that_count(counts: Tensor, batch_size: int) -> Tensor:
    """The rows of each step whose loss is a number, float64 [steps, ...] on the CPU, from a bool [..., n] per row.

    These are all rows of a step, or none where no row of the step counts.
    """
    steps = [batch.any(-1) * batch.shape[-1] for batch in counts.split(batch_size, -1)]
    return torch.stack(steps).to("cpu", torch.float64)


def mean_of_counted(losses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss, number of rows) of the steps that have rows, of losses [steps, ...]; (NaN, 0) where none has."""
    count = rows.sum(0)
    return torch.where(rows > 0, losses.to("cpu", torch.float64) * rows, 0.0).sum(0) / count, count
