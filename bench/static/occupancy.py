"""How many programs of a kernel fit one multiprocessor, from the needs of the machine code and the target's resources.

NVIDIA's rules and constants are those of the occupancy calculator ``cuda_occupancy.h``; the tests compile that header
and compare. The multiprocessors' sizes are from "Technical Specifications per Compute Capability" in the CUDA C++
Programming Guide. AMD's are from the instruction set guides of CDNA 2, CDNA 3 and RDNA 3 and from LLVM's AMDGPU
backend, which prints the waves that the registers allow into the assembly; the tests compare with that number.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MULTIPROCESSORS", "Multiprocessor", "Occupancy", "occupancy"]


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share: an SM, a compute unit, or on RDNA a work-group processor of two compute units.

    Attributes:
        schedulers: parts among which warps (waves) and registers are divided evenly.
        max_warps, max_programs: warps and programs that are resident at once; on AMD programs of several waves, each of
            which holds a barrier.
        registers: 32-bit registers per scheduler; on AMD per lane of one wave.
        register_unit: registers per allocation, to a warp of 32 lanes; on AMD to a lane of a wave.
        shared: bytes of shared memory (LDS).
        shared_unit: bytes per allocation of shared memory.
        shared_reserved: bytes that the driver takes for each program.
        warp_size: lanes per warp.
        counts_lanes: whether registers are counted per lane (AMD) or per warp.
    """

    schedulers: int
    max_warps: int
    max_programs: int
    registers: int
    register_unit: int
    shared: int
    shared_unit: int
    shared_reserved: int = 0
    warp_size: int = 32
    counts_lanes: bool = False


def _nvidia(warps: int, programs: int, shared_kib: int, *, unit: int = 128, reserved: int = 1024) -> Multiprocessor:
    return Multiprocessor(4, warps, programs, 16384, 256, shared_kib * 1024, unit, reserved)


MULTIPROCESSORS = {
    "sm_75": _nvidia(32, 16, 64, unit=256, reserved=0),
    "sm_80": _nvidia(64, 32, 164),
    "sm_86": _nvidia(48, 16, 100),
    "sm_89": _nvidia(48, 24, 100),
    "sm_90": _nvidia(64, 32, 228),
    "sm_100": _nvidia(64, 32, 228),
    "sm_120": _nvidia(48, 24, 100),
    # 8 waves per SIMD of 512 registers, 16 barriers per compute unit, 64 KiB of LDS
    "gfx90a": Multiprocessor(4, 32, 16, 512, 8, 65536, 512, warp_size=64, counts_lanes=True),
    "gfx942": Multiprocessor(4, 32, 16, 512, 8, 65536, 512, warp_size=64, counts_lanes=True),
    # In Triton's work-group-processor mode: 16 waves per SIMD of 1536 registers (wave32), 32 barriers
    "gfx1100": Multiprocessor(4, 64, 32, 1536, 24, 131072, 512, counts_lanes=True),
}


@dataclass(frozen=True)
class Occupancy:
    """Programs and warps that are resident on one multiprocessor, and what limits them."""

    programs: int
    warps: int
    fraction: float  #: of the warps that the multiprocessor has room for
    limited_by: str  #: "registers", "shared memory", "warps" or "programs"


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def warps_by_registers(target: str, registers: int) -> int:
    """Warps (waves) that one scheduler has registers for."""
    mp = MULTIPROCESSORS[target]
    needed = _up(max(1, registers) * (1 if mp.counts_lanes else mp.warp_size), mp.register_unit)
    return mp.registers // needed


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> Occupancy:
    """The occupancy of programs of ``num_warps`` warps, ``registers`` per lane and ``shared`` bytes of shared memory.

    Raises:
        ValueError: not even one program fits.
    """
    mp = MULTIPROCESSORS[target]
    by_warps = mp.max_warps // num_warps
    # AMD's limit of programs is the number of barriers, and a program of one wave needs none.
    by_programs = mp.max_warps if mp.counts_lanes and num_warps == 1 else mp.max_programs
    per_scheduler = warps_by_registers(target, registers)
    if mp.counts_lanes:
        # The waves of a work group are spread evenly over the SIMDs.
        by_registers = min(per_scheduler, mp.max_warps // mp.schedulers) * mp.schedulers // num_warps
    else:
        by_registers = per_scheduler * mp.schedulers // num_warps
    by_shared = by_programs
    if shared + mp.shared_reserved:
        by_shared = mp.shared // _up(shared + mp.shared_reserved, mp.shared_unit)
    limits = {"registers": by_registers, "shared memory": by_shared, "warps": by_warps, "programs": by_programs}
    programs = min(limits.values())
    if programs < 1:
        raise ValueError(
            f"no program of {num_warps} warps, {registers} registers and {shared} bytes of shared memory fits {target}"
        )
    # Where several limits are equal, those that the kernel can change least come first.
    limited_by = next(name for name in ("warps", "programs", "registers", "shared memory") if limits[name] == programs)
    return Occupancy(programs, programs * num_warps, programs * num_warps / mp.max_warps, limited_by)
