"""Which bytes of a launch are still in the L2 cache from the launches before it.

Tensors are the unit. A tensor is in the cache as far as the bytes of all other tensors that were touched since its last
use leave room. Steps repeat, so the state before a step is the one that the step itself leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Touched", "hit_shares"]


@dataclass(frozen=True)
class Touched:
    """The tensors that one kernel touches: identity to bytes."""

    tensors: dict[int, int]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(self.tensors.values())


def hit_shares(kernels: Sequence[Touched], capacity: float) -> list[float]:
    """The share of each kernel's bytes that a cache of ``capacity`` bytes has, in a step that follows the same step."""
    recent: dict[int, int] = {}  # in the order of the last use
    shares: list[float] = []
    for again in (False, True):
        for kernel in kernels:
            found = 0.0
            for tensor, size in kernel.tensors.items():
                if tensor in recent and size:
                    later = list(recent)[list(recent).index(tensor) + 1 :]
                    between = sum(recent[other] for other in later if other not in kernel.tensors)
                    found += min(size, max(0.0, capacity - between))
            if again:
                shares.append(found / kernel.bytes if kernel.bytes else 1.0)
            for tensor, size in kernel.tensors.items():
                recent.pop(tensor, None)
                recent[tensor] = size
    return shares
