"""A GPU that takes launches and does nothing, so the time of a step is the time of the host alone.

A ``SimulatedGPU`` records every launch, which takes the host some 180 microseconds per launch. Everything of Triton but
the driver is real here, as in ``SimulatedGPU``: binder, specialisation, caches and compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.compiler import ASTSource

from .simulated_gpu import SimulatedGPU

__all__ = ["NullGPU"]


def _nothing(*launch: Any) -> None:
    """Replaces Triton's C function that hands a launch to the driver."""


class NullGPU(SimulatedGPU):
    """A context manager like ``SimulatedGPU``. Launches leave memory as it is, and ``launches`` stays empty."""

    def __init__(self, arch: int = 90) -> None:
        super().__init__(arch, execute=False)
        # Triton keeps compiled kernels, and with them their launchers, by device number.
        self._device += 500

    def launcher_cls(self, src: ASTSource, metadata: Any) -> Callable[..., None]:
        return _nothing
