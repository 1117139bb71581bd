"""Weights of the rows of the training data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.arguments import check_tensor


def checked_weights(weight: object, y: Tensor) -> Tensor:
    """``sample_weight`` of the rows with targets ``y``: floating-point [N], on the device of y, finite and above 0.

    A weight of 0 is refused, since a batch of such rows would have no mean.

    Raises:
        TypeError: no tensor.
        RuntimeError: another shape, dtype or device.
        ValueError: a weight that is 0, negative, infinite or NaN.
    """
    check_tensor(weight, "sample_weight")
    assert isinstance(weight, Tensor)
    if weight.shape != (len(y),):
        raise RuntimeError(f"expected sample_weight of shape [{len(y)}], one for each row, got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise RuntimeError(f"expected a floating-point sample_weight, got {weight.dtype}; convert it with .float()")
    if weight.device != y.device:
        raise RuntimeError(
            f"expected data and sample_weight on the same device, got {y.device} and {weight.device}; move it with "
            f".to({str(y.device)!r})"
        )
    weight = weight.detach()
    wrong = ~(weight.isfinite() & (weight > 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"expected finite sample weights above 0, got {weight[row].item():g} in row {row}; leave rows out that "
            "shall not count"
        )
    return weight


def of_rows(weight: Tensor | None, rows: Tensor) -> Tensor | None:
    """The weights of some rows; None where rows have none."""
    return None if weight is None else weight[rows.to(weight.device)]


def weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """Sum of s l over sum of s, of the losses [B] or [B, C] of rows with weights s [B]."""
    each = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
    weight = weight.to(torch.promote_types(each.dtype, torch.float32))
    return (weight * each).sum() / weight.sum()
