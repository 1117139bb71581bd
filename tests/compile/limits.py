"""What must hold of the machine code of every case, and the exceptions, each with its reason.

An exception names a witness, a case that exceeds the limit. A test compiles it and fails when it no longer does, so
that no exception outlives its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastmlp.kernels.configs import Tile
from tests.ptxsim import Launch

from .cases import Case
from .loads import generated_wide_loads, loads
from .machine_code import instructions, resources

__all__ = ["EXCEPTIONS", "LIMITS", "LimitException", "exceptions_for", "violations"]

LIMITS = {
    "spill": "registers spilled to memory",
    "spill in a loop": "registers spilled and reloaded in every round of a loop",
    "shared": "more shared memory than the target gives a program",
    "matrix unit": "a matrix product without the target's matrix instructions",
    "narrow load": "loads narrower than aligned, contiguous operands allow",
}


@dataclass(frozen=True)
class LimitException:
    """Cases that may exceed one limit.

    Attributes:
        limit: a key of ``LIMITS``.
        cases: a pattern of ``Case.name``, as in fnmatch: target/kernel/dtype/tile/variant.
        witness: the name of one of them that does exceed it.
        reason: why that is right, or the least bad.
        most: of spills, the bytes a thread that are allowed.
    """

    limit: str
    cases: str
    witness: str
    reason: str
    most: int = 0


_OUTSIDE = (
    "outside its loops, so once a program, the code stores and reloads what would cost it a program a multiprocessor "
    "(cross-entropy: from 2 to 1), by the choice of ptxas"
)
_EPILOGUE = (
    "the accumulators take half of the registers or more, and the epilogue of silu, once a program, needs up to 12 too "
    "many; the tile is the largest for its matrix units, and smaller ones load more bytes a product"
)


def _spill(cases: str, witness: str, most: int, reason: str) -> LimitException:
    return LimitException("spill", cases, witness, reason, most)


def _narrow(cases: str, witness: str, reason: str) -> LimitException:
    return LimitException("narrow load", cases, witness, reason)


EXCEPTIONS: tuple[LimitException, ...] = (
    _spill(
        "sm_*/linear_*/float32/128x128x16*silu", "sm_80/linear_dgrad/float32/128x128x16-8w4s/n48-silu", 8, _EPILOGUE
    ),
    _spill("sm_90/linear_*128x256*silu*", "sm_90/linear_dgrad/float16/128x256x64-8w3s/n48-silu", 48, _EPILOGUE),
    _spill("sm_*/cross_entropy*", "sm_80/cross_entropy/bfloat16/16x50257x1/step", 24, _OUTSIDE),
    _spill(
        "sm_120/linear_fwd/float32/32x64x32*pixels-gather*",
        "sm_120/linear_fwd/float32/32x64x32-4w3s/k784-pixels-gather-tanh",
        8,
        "outside its loop, so once a program, 8 bytes; without them a multiprocessor would have 2 programs, not 3",
    ),
    _spill(
        "sm_90/head/float32/64x50x512/*smoothing*",
        "sm_90/head/float32/64x50x512/gelu-smoothing",
        8,
        "outside its loops, so once a program, 8 bytes more than the 255 registers that a thread can have",
    ),
    _narrow(
        "*pixels*",
        "sm_80/linear_wgrad/float32/64x64x32-4w3s/split-k784-pixels-gather",
        "pixels are widened in registers and take the layout of W's dtype, 4 or 8 values a thread; a warp's load is "
        "still one of whole sectors",
    ),
    _narrow(
        "sm_75/*/float16/*",
        "sm_75/linear_fwd/float16/16x32x16-2w2s/sigmoid",
        "the block of the narrower operand has 8 bytes a thread, and the other follows its layout",
    ),
    _narrow(
        "gfx*/cross_entropy*",
        "gfx90a/cross_entropy/float32/4096x100x1/labels",
        "AMD's loads are masked value by value unless C is a multiple of 16; lanes still cover whole lines together",
    ),
    _narrow(
        "*/softmax_squared_error*",
        "sm_80/softmax_squared_error/float32/64x100/labels",
        "a row length that is no multiple of 16 is not known to be aligned; this loss is for the few classes of the "
        "lecture notes, where rows are shorter than one warp's load",
    ),
)


def exceptions_for(case: Case) -> dict[str, LimitException]:
    """The limits that a case is allowed to exceed, and why."""
    return {e.limit: e for e in EXCEPTIONS if fnmatchcase(case.name, e.cases)}


def violations(case: Case, launch: Launch, *, spill: int = 0) -> dict[str, str]:
    """The limits that one launch of a case exceeds, with what was found. ``spill``: bytes a thread that are allowed."""
    found = {}
    code = resources(launch)
    if code.spilled > spill:
        unit = "bytes of local memory and stack" if "cubin" in launch.asm else "vector registers and bytes of scratch"
        found["spill"] = f"{code.spilled} {unit} a thread beside {code.registers} registers"
    if code.spilled and (repeated := instructions(launch).spills_in_loops):
        found["spill in a loop"] = f"{repeated} instructions"
    limit = case.target.device.shared_limit
    if code.shared > limit:
        found["shared"] = f"{code.shared} bytes, and the target has {limit}"
    if launch.name in case.entry.gemm:
        units = _units_expected(case)
        if units and not instructions(launch).count(*units):
            total = sum(instructions(launch).counts.values())
            found["matrix unit"] = f"none of {', '.join(units)} among {total} instructions"
    if case.aligned:
        narrow = [load for load in loads(launch) if load.width < load.possible]
        if narrow:
            found["narrow load"] = ", ".join(
                f"{load.file}:{load.line} loads {load.width} of {load.possible} bytes a thread" for load in narrow
            )
        elif "ptx" in launch.asm and (wide := instructions(launch).wide_loads) < generated_wide_loads(launch):
            found["narrow load"] = f"{generated_wide_loads(launch)} bytes in loads of 16 in PTX, {wide} in machine code"
    return found


def _units_expected(case: Case) -> tuple[str, ...]:
    """The matrix instructions, of which one must be there.

    Hopper's and Blackwell's own units (the first of two) take blocks of 64 rows and more, smaller blocks run on the
    warp-wide ones. A kernel that is not tiled by ``configs`` may use either.
    """
    units = case.target.matrix_units[case.dtype]
    if len(units) == 2 and isinstance(case.tile, Tile):
        return units[:1] if case.tile.rows >= 64 else units[1:]
    return units
