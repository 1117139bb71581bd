"""How long one warp needs for a stretch of machine code, and what its program takes from the multiprocessor.

The walk issues a warp's instructions in order, as the hardware does. An instruction waits for the cycles that the
compiler wrote into the code (they contain the latency of every arithmetic instruction and of mma.sync), for the
barriers of earlier loads that it names, and for the unit that executes it, which the warps of its program share. The
demand counts what all warps of a program take together, whatever their latencies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .constants import Chip
from .sass import Instruction

__all__ = ["Demand", "demand", "walk"]

_SCHEDULERS = 4
_WAVEFRONT = 128
_COUNTER = re.compile(r"(\w+cnt)\((\d+)\)")
#: Cycles until a load or store has read its operands.
_OPERANDS_READ = 12
#: Units of a scheduler by the first letters of a mnemonic; the first that matches decides.
_UNITS = (
    ("special", ("MUFU", "F2I", "I2F", "POPC", "FLO")),
    ("float", ("FADD", "FMUL", "FFMA", "FSWZADD", "HADD", "HMUL", "HFMA")),
    (
        "integer",
        (
            "F2F", "IADD", "IMAD", "LEA", "LOP", "SHF", "SEL", "FSEL", "PRMT", "MOV", "ISETP", "FSETP", "FMNMX",
            "VIADD", "PLOP", "IABS", "CS2R", "I2I",
        ),
    ),
)  # fmt: skip
_SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS")
_SCOREBOARD = ("SHFL", "MUFU", "F2I", "I2F", "POPC", "FLO", "S2R", "S2UR", "LDC", "LDCU", "R2UR", "VOTE", "REDUX")


@dataclass(frozen=True)
class Demand:
    """What one program takes from its multiprocessor: cycles of what its programs share, and bytes.

    Attributes:
        issue: issue slots of a scheduler.
        units: cycles of a scheduler's busiest unit, without the matrix units.
        matrix: cycles of the matrix units.
        shared: wavefronts of shared memory, one per cycle.
        loaded, stored: bytes from and to the L2 cache.
    """

    issue: float = 0.0
    units: float = 0.0
    matrix: float = 0.0
    shared: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0

    def times(self, count: float) -> Demand:
        """``count`` times this demand."""
        return Demand(*(count * value for value in vars(self).values()))

    def plus(self, other: Demand) -> Demand:
        """Both demands."""
        return Demand(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def matrix_cycles(i: Instruction, chip: Chip) -> float:
    """Cycles for which a matrix instruction occupies one scheduler's unit, or with wgmma those of all four."""
    m, n, k = i.shape
    rate = chip.matrix_tf32 if "TF32" in i.modifiers else chip.matrix_16
    if i.name == "HGMMA":
        return 2 * m * n * k / rate
    return 2 * m * n * k / (rate * chip.synchronous / _SCHEDULERS)


def wavefronts(i: Instruction, chip: Chip) -> float:
    """Cycles of shared memory for one warp's instruction; a wgmma counts as a quarter of its warpgroup's."""
    if i.name in _SHARED:
        return max(1.0, i.bytes * chip.lanes / _WAVEFRONT)
    if i.name == "HGMMA":
        m, n, k = i.shape
        itemsize = 4 if "TF32" in i.modifiers else 2
        from_shared = i.operands.split(",")[1].strip().startswith("gdesc")
        return (n + (m if from_shared else 0)) * k * itemsize / _WAVEFRONT / 4
    return 0.0


def demand(code: Sequence[Instruction], num_warps: int, chip: Chip) -> Demand:
    """What one pass of all warps of a program through ``code`` takes."""
    each = num_warps / _SCHEDULERS
    cycles = {"special": chip.special_cycles, "float": chip.float_cycles, "integer": chip.integer_cycles}
    units = dict.fromkeys(cycles, 0.0)
    issue = matrix = shared = loaded = stored = 0.0
    for i in code:
        if i.never or i.name == "NOP":
            continue
        issue += each
        shared += num_warps * wavefronts(i, chip)
        if i.name.endswith("MMA"):
            matrix += each * matrix_cycles(i, chip)
        elif (unit := unit_of(i.name)) is not None:
            units[unit] += each * cycles[unit]
        if i.name in ("LDG", "LDGSTS", "LD"):
            loaded += chip.lanes * num_warps * i.bytes
        elif i.name in ("STG", "ST"):
            stored += chip.lanes * num_warps * i.bytes
    return Demand(issue, max(units.values()), matrix, shared, loaded, stored)


def unit_of(name: str) -> str | None:
    """The unit that executes an instruction, or None where none is scarce."""
    return next((unit for unit, names in _UNITS if name.startswith(names)), None)


def walk(code: Sequence[Instruction], num_warps: int, chip: Chip, *, again: bool = False) -> float:
    """Cycles of a warp from the first instruction to the last result; with ``again``, cycles of one more pass."""
    walker = _Walker(chip, num_warps)
    first = walker.run(code)
    if not again:
        return max(first, walker.pending)
    second = walker.run(code)
    return walker.run(code) - second


class _Walker:
    """One warp; the other warps of its program do the same at the same time."""

    def __init__(self, chip: Chip, num_warps: int) -> None:
        self.chip, self.num_warps = chip, num_warps
        self.now = self.pending = self.matrix_free = self.shared_free = 0.0
        self.barriers = [0.0] * 6
        self.queues: dict[str, list[float]] = {"vmcnt": [], "lgkmcnt": []}  # AMD's counters of what is under way
        self.groups: list[float] = []  # ends of the wgmma groups that nothing has waited for

    def run(self, code: Sequence[Instruction]) -> float:
        for i in code:
            self.now = max(self.now, *(self.barriers[b] for b in i.waits), 0.0)
            if not i.never:
                self._issue(i)
            self.now += max(1, i.stall)
        return self.now

    def _issue(self, i: Instruction) -> None:
        chip = self.chip
        if i.name == "HGMMA":
            # The warpgroups of a program take turns on the matrix units.
            self.matrix_free = max(self.matrix_free, self.now) + self.num_warps / 4 * matrix_cycles(i, chip)
            self.pending = max(self.pending, self.matrix_free + chip.wgmma_drain)
            if "gsb0" in i.operands:
                self.groups.append(self.pending)
        elif i.name == "WARPGROUP" and "DEPBAR" in i.modifiers:
            left = int(i.operands.split(",")[-1], 16)
            done = self.groups[: len(self.groups) - left]
            self.groups = self.groups[len(done) :]
            self.now = max(self.now, *done, 0.0)
        elif i.name.endswith("MMA"):
            self.now = max(self.now, self.matrix_free)
            self.matrix_free = self.now + -(-self.num_warps // _SCHEDULERS) * matrix_cycles(i, chip)
            self.pending = max(self.pending, self.matrix_free)
        elif i.name == "BAR":
            self.now += chip.barrier
        elif i.name == "WAIT":
            for name, left in _COUNTER.findall(i.operands):
                queue = self.queues.get(name, [])
                done = queue[: len(queue) - int(left)]
                del queue[: len(done)]
                self.now = max(self.now, *done, 0.0)
        else:
            self._load(i)

    def _load(self, i: Instruction) -> None:
        chip = self.chip
        latency = 0.0
        if i.name in ("LDG", "LD"):
            latency = chip.l2_latency
        elif i.name in _SCOREBOARD:
            latency = chip.special_latency
        elif i.name in _SHARED:
            self.shared_free = max(self.shared_free, self.now) + self.num_warps * wavefronts(i, chip)
            latency = max(chip.shared_latency, self.shared_free - self.now)
        if latency:
            self.queues["vmcnt" if i.name in ("LDG", "LDGSTS") else "lgkmcnt"].append(self.now + latency)
        if i.sets is not None and i.name != "LDGDEPBAR":
            self.barriers[i.sets] = max(self.barriers[i.sets], self.now + latency)
        if i.reads is not None:
            self.barriers[i.reads] = max(self.barriers[i.reads], self.now + _OPERANDS_READ)
        if i.sets is not None:
            self.pending = max(self.pending, self.now + latency)
