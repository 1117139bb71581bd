"""A view whose memory holds the negatives of its values."""

from __future__ import annotations

import torch
from torch import Tensor


def negated(t: Tensor) -> Tensor:
    """A view of -t that has the values of t, as ``z.conj().imag`` is one."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    assert torch.equal(view, t)
    return view
