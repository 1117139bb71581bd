"""Run the PTX that Triton generates on a CPU, with numpy. README.md describes the package."""

from .compile import compile_triton, run_triton, triton_kernel
from .errors import (
    AsyncHazard,
    Deadlock,
    Divergence,
    EarlyAccess,
    Misaligned,
    OutOfBounds,
    SharedRace,
    SimError,
    Trap,
    UninitShared,
)
from .kernel import PtxKernel
from .null_gpu import NullGPU
from .shared_memory import bank_wavefronts
from .simulated_gpu import TRITON, Launch, SimulatedGPU
from .stats import Stats

__all__ = [
    "TRITON",
    "AsyncHazard",
    "Deadlock",
    "Divergence",
    "EarlyAccess",
    "Launch",
    "Misaligned",
    "NullGPU",
    "OutOfBounds",
    "PtxKernel",
    "SharedRace",
    "SimError",
    "SimulatedGPU",
    "Stats",
    "Trap",
    "UninitShared",
    "bank_wavefronts",
    "compile_triton",
    "run_triton",
    "triton_kernel",
]
