"""The limits on the machine code of every case, and the exceptions, each with its reason.

An exception names a witness, a case that exceeds the limit. A test compiles the witness and fails when the witness
keeps the limit, so no exception outlives its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bench.static.occupancy import MULTIPROCESSORS, occupancy
from fastmlp.kernels.configs import Tile
from tests.ptxsim import Launch

from .block_form import block_loops
from .cases import Case
from .hazards import copied_accumulators, pending_operands
from .loads import generated_wide_loads, loads, waiting_loads
from .machine_code import Resources, instructions, resources
from .main_loops import main_loops

__all__ = ["EXCEPTIONS", "LIMITS", "LimitException", "exceptions_for", "violations"]

LIMITS = {
    "spill": "registers spilled to memory",
    "shared": "more shared memory than the target gives a program",
    "matrix unit": "a matrix product without the target's matrix instructions",
    "narrow load": "loads narrower than aligned, contiguous operands allow",
    "overwritten operand": "a register written while a wgmma may still read it",
    "pending operand": "a wgmma that reads registers, and that the next step does not wait for",
    "copied accumulator": "tcgen05 products that follow each other through one accumulator",
    "repeated products": "a main loop whose matrix instructions compute more than the step needs",
    "conversion": "a layout converted through shared memory in a main loop",
    "barriers": "more than two barriers in a main loop",
    "waiting load": "loads of a main loop that are neither asynchronous nor 16 bytes wide",
    "second pass": "blocks loaded in a loop of their own by programs that multiply",
    "few warps": "fewer than two resident warps per scheduler",
}
_MOST_BARRIERS = 2
_LEAST_WARPS = 2


@dataclass(frozen=True)
class LimitException:
    """Cases that may exceed one limit.

    Attributes:
        limit: a key of ``LIMITS``.
        cases: a pattern, as in fnmatch, of ``Case.name`` (target/kernel/dtype/tile/variant), or of ``Waves.name``.
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
        "sm_*/wgrad_update/*32/*x32x32-2w4s/adamw-params",
        "sm_100/wgrad_update/float32/16x32x32-2w4s/adamw-params",
        "on two warps Triton updates in the layout of the product, where a thread has two neighbouring parameters, "
        "which are 4 bytes of 16-bit parameters",
    ),
    *(
        _narrow(
            cases,
            witness,
            "PTX loads two values of a bias's momentum at once, and ptxas makes two loads of them; a program has 32 "
            "values of a bias",
        )
        for cases, witness in (
            (
                "sm_*/wgrad_update/*32/*-2w?s/momentum-dropout",
                "sm_90/wgrad_update/float32/16x32x32-2w4s/momentum-dropout",
            ),
            (
                "sm_90/wgrad_update/*16/16x32x64-2w4s/momentum-dropout",
                "sm_90/wgrad_update/bfloat16/16x32x64-2w4s/momentum-dropout",
            ),
        )
    ),
    *(
        _narrow(
            cases,
            cases.replace("*16", "bfloat16"),
            "a thread has two values of a bias, and PTX loads those of the second state one by one; a program has 128 "
            "values of a bias",
        )
        for cases in (
            "sm_75/wgrad_update/float32/16x32x16-2w2s/adamw-params",
            "sm_90/wgrad_update/*16/16x32x64-2w4s/adamw-params",
        )
    ),
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
        "*/wgrad_update/*split-adamw",
        "sm_90/wgrad_update/bfloat16/128x128x64-8w3s/split-adamw",
        "behind the sum of the slices the second state is loaded value by value; lanes cover whole lines together",
    ),
    _narrow(
        "*/softmax_squared_error*",
        "sm_80/softmax_squared_error/float32/64x100/labels",
        "rows whose length is no multiple of 16 are not known to be aligned; this loss is for the few classes of the "
        "lecture notes, whose rows are shorter than one warp's load",
    ),
    *(
        LimitException(
            "barriers",
            cases,
            witness,
            "one warp starts the products of tcgen05 for all others, which meet "
            "before and after they have written its operands",
        )
        for cases, witness in (
            ("sm_100/*/64x*", "sm_100/linear_fwd/float16/64x128x64-4w3s/sigmoid"),
            ("sm_100/*/128x*", "sm_100/linear_fwd/float32/128x128x32-8w3s/sigmoid"),
            ("sm_100/linear_fwd/*float16/32x64x64*", "sm_100/linear_fwd/float16/32x64x64-4w4s/k784-pixels-gather-tanh"),
        )
    ),
    *(
        LimitException(
            "barriers",
            f"sm_8?/{kernel}/*float16/*",
            witness,
            "Triton reads the first part of the next step's operands ahead, behind a wait of its own",
        )
        for kernel, witness in (
            ("linear_[dw]grad", "sm_80/linear_dgrad/float16/64x64x64-4w4s/sigmoid"),
            ("wgrad_update", "sm_80/wgrad_update/float16/32x32x64-4w4s/sgd"),
        )
    ),
    LimitException(
        "barriers",
        "*odd*",
        "sm_80/linear_fwd/float16/64x128x32-8w3s/odd-pixels-leaky_relu-nobias",
        "operands that are not aligned are not copied asynchronously: registers take them, and every store to shared "
        "memory has a barrier before it and one behind it",
    ),
    *(
        LimitException(
            "barriers",
            cases,
            witness,
            "operands that are not aligned take registers on their way to shared memory, each behind a barrier",
        )
        for cases, witness in (
            ("sm_90/linear_wgrad/*/n10-gather", "sm_90/linear_wgrad/float32/64x64x16-4w4s/n10-gather"),
            ("sm_90/wgrad_update/*/narrow-*", "sm_90/wgrad_update/float32/64x64x16-4w4s/narrow-adamw-pixels"),
        )
    ),
    *(
        LimitException(
            "barriers",
            cases,
            witness,
            "pixels are widened in registers and written to shared memory, behind a barrier of their own",
        )
        for cases, witness in (
            ("sm_90/*float16/*/*pixels*", "sm_90/linear_fwd/bfloat16/128x256x64-8w3s/pixels-step"),
            ("sm_90/wgrad_update/*32/*pixels*", "sm_90/wgrad_update/float32/128x128x32-8w3s/split-pixels-gather"),
            ("sm_90/linear_wgrad/*32/*pixels*", "sm_90/linear_wgrad/tf32/128x128x32-4w3s/split-k784-pixels-gather"),
        )
    ),
    LimitException(
        "barriers",
        "gfx1100/head/*",
        "gfx1100/head/bfloat16/16384x64x512/pixels-gather",
        "RDNA's head loads into one stage, which is stored between two barriers for each operand",
    ),
    *(
        LimitException(
            "repeated products",
            f"sm_*/head/*32/{shape}/*",
            witness,
            "the product for dZ below needs the registers of eight warps, and the four slices of Z have work for four",
        )
        for shape, witness in (
            ("64x50x512", "sm_120/head/float32/64x50x512/sigmoid"),
            ("16384x64x512", "sm_120/head/float32/16384x64x512/sigmoid"),
        )
    ),
    *(
        LimitException(
            "repeated products",
            cases,
            witness,
            "a block of dZ below is only 32 columns wide, since its addresses or its products take many registers, and "
            "some warps compute what others compute too",
        )
        for cases, witness in (
            ("gfx9*/head/*/odd*", "gfx942/head/float32/64x2x512/odd-tanh"),
            ("gfx1100/head/*", "gfx1100/head/float16/64x2x512/gelu-smoothing"),
        )
    ),
    LimitException(
        "few warps",
        "sm_*/linear_[fd]*/*/[13][26]x*x[125]??-4w*",
        "sm_80/linear_fwd/float32/16x32x256-4w3s/sigmoid",
        "tiles in slices are those of small batches, which have about one program for each multiprocessor; the shared "
        "memory of others holds its deep blocks",
    ),
    LimitException(
        "few warps",
        "gfx9*/head/*",
        "gfx942/head/float16/64x50x512/pixels-gather",
        "with more than 32 classes the slices of both operands take more than half of the 64 KiB of shared memory",
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
        found |= dict(_loop_violations(case, launch))
        if code.shared <= limit and (few := _few_warps(case, launch, code)):
            found["few warps"] = few
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


def _loop_violations(case: Case, launch: Launch) -> Iterator[tuple[str, str]]:
    """The limits on the main loops of a matrix product. A loop over pieces of the result stores a piece per round, so
    what it converts, waits for and loads is no matter of its products.
    """
    found = main_loops(launch)
    for loop in found:
        if loop.computed != loop.needed:
            yield "repeated products", str(loop)
        if loop.accumulates and (loop.block.conversions or loop.block.moved_accumulators):
            yield "conversion", str(loop)
        if loop.accumulates and loop.barriers > _MOST_BARRIERS:
            yield "barriers", str(loop)
        if loop.accumulates and loop.block.loads and case.aligned:
            waiting = [
                f"{load.file}:{load.line} loads {load.width} bytes" for load in waiting_loads(launch, loop.block)
            ]
            if waiting:
                yield "waiting load", ", ".join(waiting)
    for block in block_loops(str(launch.asm["ttgir"])):
        if not block.products and block.loads and any(block.follows(loop.block) for loop in found):
            yield "second pass", ", ".join(operation.results[0] for operation in block.loads)


def _few_warps(case: Case, launch: Launch, code: Resources) -> str:
    """What is wrong with the number of resident warps; empty where nothing is.

    While one warp waits for its operands, another one of the same scheduler has to issue instructions.
    """
    least = _LEAST_WARPS * MULTIPROCESSORS[case.target.name].schedulers
    resident = occupancy(case.target.name, code.registers, code.shared, launch.num_warps)
    if resident.warps >= least:
        return ""
    return f"{resident.programs} programs of {launch.num_warps} warps for want of {resident.limited_by}"


def _units_expected(case: Case) -> tuple[str, ...]:
    """The matrix instructions, at least one of which must be in the code.

    Hopper's and Blackwell's own units (the first of two) take blocks of 64 rows or more; smaller blocks run on the
    warp-wide units. The 16-bit forward product of pixels is transposed, so its columns count instead of its rows. A
    kernel that ``configs`` does not tile may use either unit. Some tiles are for products outside of the units.
    """
    units = case.target.matrix_units[case.dtype]
    if isinstance(case.tile, Tile) and case.tile.fma:
        return ()
    if len(units) == 2 and isinstance(case.tile, Tile):
        turned = case.kernel == "linear_fwd" and "pixels" in case.variant and case.dtype.itemsize == 2
        return units[:1] if (case.tile.cols if turned else case.tile.rows) >= 64 else units[1:]
    return units
