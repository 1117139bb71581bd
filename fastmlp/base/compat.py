"""Whether torch.autocast is on for a device. Every call asks, also while torch.compile traces the call."""

from __future__ import annotations

import torch

#: Device types that have autocast, asked once: torch.compile before torch 2.12 cannot trace the question.
_AVAILABLE = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))


def is_autocast_enabled(device_type: str) -> bool:
    """Whether products of tensors on such a device are under torch.autocast; False where there is no autocast."""
    return device_type in _AVAILABLE and torch.is_autocast_enabled(device_type)
