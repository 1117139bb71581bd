"""A GPU that takes launches and does nothing: what is left of a step is what it costs the host.

A ``SimulatedGPU`` records every launch, which takes the host some 180 microseconds each. Everything of Triton but the
driver is as real here as there: binder, specialisation, caches and compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.compiler import ASTSource

from .simulated_gpu import SimulatedGPU

__all__ = ["NullGPU"]


def _nothing(*launch: Any) -> None:
    """Stands where Triton has the C function that hands a launch to the driver."""


class NullGPU(SimulatedGPU):
    """A context manager as ``SimulatedGPU`` is one; launches leave memory as it is, and ``launches`` stays empty."""

    def __init__(self, arch: int = 90) -> None:
        super().__init__(arch, execute=False)
        # Triton keeps compiled kernels, and with them their launchers, by device number.
        self._device += 500

    def launcher_cls(self, src: ASTSource, metadata: Any) -> Callable[..., None]:
        return _nothing
