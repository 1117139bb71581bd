"""The GPUs that every kernel is compiled for, and what each of them can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmlp.kernels.device import Device
from tests.ptxsim import SimulatedGPU

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        name: sm_80, gfx942, ...
        backend: "cuda" or "hip".
        arch: Triton's name for it.
        dtypes: the dtypes that are compiled for it; sm_75 has no bfloat16.
        matrix_units: by dtype, prefixes of the machine instructions of the units that a dot must use. Empty where there
            is no such unit or Triton generates no code for it.
    """

    name: str
    backend: str
    arch: int | str
    dtypes: tuple[torch.dtype, ...]
    matrix_units: dict[torch.dtype, tuple[str, ...]]

    def simulated(self, *, execute: bool = False, **options: object) -> SimulatedGPU:
        """A simulated GPU of this architecture."""
        return SimulatedGPU((self.backend, self.arch), execute=execute, **options)

    @property
    def device(self) -> Device:
        """The device as the tile tables see it."""
        gpu = self.simulated()
        return Device(self.backend, self.arch, gpu.multiprocessor_count, gpu.max_shared_mem)

    def __hash__(self) -> int:
        return hash(self.name)


_HALF = (torch.float16, torch.bfloat16)
_ALL = (torch.float32, *_HALF)


def _nvidia(arch: int, *units: str) -> Target:
    dtypes = (torch.float32, torch.float16) if arch < 80 else _ALL
    return Target(f"sm_{arch}", "cuda", arch, dtypes, dict.fromkeys(dtypes, units))


def _amd(arch: str, units: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Target:
    return Target(arch, "hip", arch, _ALL, {dtype: units if dtype in dtypes else () for dtype in _ALL})


TARGETS = {
    target.name: target
    for target in (
        _nvidia(75),  # has HMMA for float16, but Triton compiles its dots to FMA
        _nvidia(80, "HMMA"),
        _nvidia(86, "HMMA"),
        _nvidia(89, "HMMA"),
        _nvidia(90, "HGMMA", "HMMA"),
        _nvidia(100, "UTC", "HMMA"),
        _nvidia(120, "HMMA"),
        _amd("gfx90a", ("v_mfma",), _ALL),
        _amd("gfx942", ("v_mfma",), _ALL),
        _amd("gfx1100", ("v_wmma",), _HALF),
    )
}
