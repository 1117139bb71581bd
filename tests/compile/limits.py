"""The limits on the machine code of every case, and the exceptions, each with its reason.

An exception names a witness, a case that exceeds the limit. A test compiles the witness and fails when the witness
keeps the limit, so no exception outlives its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastmlp.kernels.configs import Tile
from tests.ptxsim import Launch

from .cases import Case
from .hazards import copied_accumulators, pending_operands
from .loads import generated_wide_loads, loads
from .machine_code import instructions, resources

__all__ = ["EXCEPTIONS", "LIMITS", "LimitException", "exceptions_for", "violations"]

LIMITS = {
    "spill": "registers spilled to memory",
    "shared": "more shared memory than the target gives a program",
    "matrix unit": "a matrix product without the target's matrix instructions",
    "narrow load": "loads narrower than aligned, contiguous operands allow",
    "overwritten operand": "a register written while a wgmma may still read it",
    "pending operand": "a wgmma that reads registers, and that the next step does not wait for",
    "copied accumulator": "tcgen05 products that follow each other through one accumulator",
}


@dataclass(frozen=True)
class LimitException:
    """Cases that may exceed one limit.

    Attributes:
        limit: a key of ``LIMITS``.
        cases: a pattern of ``Case.name``, as in fnmatch: target/kernel/dtype/tile/variant.
        witness: the name of one of these cases, which does exceed the limit.
        reason: why exceeding the limit is right, or least bad.
    """

    limit: str
    cases: str
    witness: str
    reason: str


def _narrow(cases: str, witness: str, reason: str) -> LimitException:
    return LimitException("narrow load", cases, witness, reason)


EXCEPTIONS: tuple[LimitException, ...] = (
    _narrow(
        "*pixels*",
        "sm_80/linear_wgrad/float32/64x64x32-4w3s/split-k784-pixels-gather",
        "pixels are widened in registers and take the layout of W's dtype, 4 or 8 values per thread; a warp still "
        "loads whole sectors",
    ),
    _narrow(
        "sm_75/*/float16/*",
        "sm_75/linear_fwd/float16/16x32x16-2w2s/sigmoid",
        "the block of the narrower operand has 8 bytes per thread, and the other operand follows its layout",
    ),
    _narrow(
        "gfx*/cross_entropy*",
        "gfx90a/cross_entropy/float32/4096x100x1/labels",
        "AMD's loads are masked value by value unless C is a multiple of 16; lanes still cover whole lines together",
    ),
    _narrow(
        "*/wgrad_update/*-2w*",
        "sm_90/wgrad_update/float32/16x32x32-2w4s/sgd",
        "128 elements of a bias are two per thread of two warps, which reads them one by one; a warp loads whole lines",
    ),
    _narrow(
        "*/softmax_squared_error*",
        "sm_80/softmax_squared_error/float32/64x100/labels",
        "rows whose length is no multiple of 16 are not known to be aligned; this loss is for the few classes of the "
        "lecture notes, whose rows are shorter than one warp's load",
    ),
)


def exceptions_for(case: Case) -> dict[str, LimitException]:
    """The limits that a case is allowed to exceed, and why."""
    return {e.limit: e for e in EXCEPTIONS if fnmatchcase(case.name, e.cases)}


def violations(case: Case, launch: Launch) -> dict[str, str]:
    """The limits that one launch of a case exceeds, each with a description of the finding."""
    found = {}
    code = resources(launch)
    if code.spilled:
        unit = "bytes of local memory and stack" if "cubin" in launch.asm else "vector registers and bytes of scratch"
        found["spill"] = f"{code.spilled} {unit} per thread beside {code.registers} registers"
    limit = case.target.device.shared_limit
    if code.shared > limit:
        found["shared"] = f"{code.shared} bytes, and the target has {limit}"
    if launch.name in case.entry.gemm:
        units = _units_expected(case)
        if units and not instructions(launch).count(*units):
            total = sum(instructions(launch).counts.values())
            found["matrix unit"] = f"none of {', '.join(units)} among {total} instructions"
    if "cubin" in launch.asm and (overwritten := instructions(launch).overwritten):
        found["overwritten operand"] = "; ".join(overwritten)
    if pending := pending_operands(str(launch.asm.get("ptx", ""))):
        found["pending operand"] = f"{pending} waits for some of the products only"
    if copies := copied_accumulators(str(launch.asm["ttgir"])):
        found["copied accumulator"] = f"{copies} copies"
    if case.aligned:
        narrow = [load for load in loads(launch) if load.width < load.possible]
        if narrow:
            found["narrow load"] = ", ".join(
                f"{load.file}:{load.line} loads {load.width} of {load.possible} bytes per thread" for load in narrow
            )
        elif "ptx" in launch.asm and (wide := instructions(launch).wide_loads) < generated_wide_loads(launch):
            found["narrow load"] = f"{generated_wide_loads(launch)} bytes in loads of 16 in PTX, {wide} in machine code"
    return found


def _units_expected(case: Case) -> tuple[str, ...]:
    """The matrix instructions, at least one of which must be in the code.

    Hopper's and Blackwell's own units (the first of two) take blocks of 64 rows or more; smaller blocks run on the
    warp-wide units. The 16-bit forward product of pixels is transposed, so its columns count instead of its rows. A
    kernel that ``configs`` does not tile may use either unit.
    """
    units = case.target.matrix_units[case.dtype]
    if len(units) == 2 and isinstance(case.tile, Tile):
        turned = case.kernel == "linear_fwd" and "pixels" in case.variant and case.dtype.itemsize == 2
        return units[:1] if (case.tile.cols if turned else case.tile.rows) >= 64 else units[1:]
    return units
