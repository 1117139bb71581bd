"""The arithmetic of the model: from counts of one launch to microseconds.

A program is a row of sections, each passed a number of times. Alone on its multiprocessor a program needs the latency
of each section. ``r`` programs on one multiprocessor need at least ``r`` times the busiest thing that they share.
Programs begin in the order of their numbers, each where one has ended. The kernel takes the longest of

- the time until its last program has ended ("waves"),
- its matrix FLOPs at the rate that the GPU sustains,
- its bytes at the bandwidth of the L2 cache,
- the bytes that are not in the L2 cache at the bandwidth of the memory,

and the gap in which a graph starts the next kernel comes before it.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from .constants import Chip
from .walk import Demand

__all__ = ["Estimate", "Kernel", "Path", "Section", "estimate"]

#: The share of the longest program's time from which on a program counts as one of those that fill the GPU.
_LONG = 0.2


@dataclass(frozen=True)
class Section:
    """A part of a program.

    Attributes:
        name: "begin", "products", "end" and the like.
        latency: cycles of one pass, alone on the multiprocessor.
        demand: of one pass.
        passes: how often.
    """

    name: str
    latency: float
    demand: Demand = field(default_factory=Demand)
    passes: float = 1.0

    def cycles(self, together: int, chip: Chip) -> float:
        """Cycles of all passes while ``together`` programs share the multiprocessor."""
        return self.passes * max(self.latency, together * max(shares(self.demand, chip).values()))


@dataclass(frozen=True)
class Path:
    """Those programs of a launch that do the same work."""

    programs: int
    sections: tuple[Section, ...]
    name: str = ""

    def cycles(self, together: int, chip: Chip) -> float:
        """Cycles of one program."""
        return sum(section.cycles(together, chip) for section in self.sections)

    @property
    def demand(self) -> Demand:
        """What one program takes in all."""
        total = Demand()
        for section in self.sections:
            total = total.plus(section.demand.times(section.passes))
        return total


@dataclass(frozen=True)
class Kernel:
    """Counts of one launch.

    Attributes:
        name: the kernel.
        paths: its programs, in the order of their numbers.
        resident: programs that fit one multiprocessor.
        hbm_bytes: bytes from and to device memory.
        num_warps: of a program.
        tf32: whether its products are tf32 products (float32 on MI300X), else of 16 bits.
        note: what the counts leave out; empty if nothing.
    """

    name: str
    paths: tuple[Path, ...]
    resident: int
    hbm_bytes: float
    num_warps: int = 4
    tf32: bool = False
    note: str = ""

    @property
    def programs(self) -> int:
        """All programs."""
        return sum(path.programs for path in self.paths)


@dataclass(frozen=True)
class Estimate:
    """Microseconds of one launch: an estimate, never measured.

    Attributes:
        microseconds: with the gap before the kernel.
        bound: the term that decides.
        terms: microseconds of each term, the gap included.
        waves: programs / programs that are resident at once.
    """

    microseconds: float
    bound: str
    terms: dict[str, float]
    waves: float


def shares(demand: Demand, chip: Chip) -> dict[str, float]:
    """Cycles of the things that the programs of a multiprocessor share, by name."""
    return {
        "issue": max(demand.issue, demand.units),
        "matrix": demand.matrix,
        "shared memory": demand.shared,
        "L2 port": (demand.loaded + demand.stored) / chip.l2_port,
    }


def estimate(kernel: Kernel, chip: Chip) -> Estimate:
    """The model; see the module docstring."""
    waves, detail = _waves(kernel, chip)
    total = Demand()
    for path in kernel.paths:
        total = total.plus(path.demand.times(path.programs))
    sustained = chip.sustained_tf32 if kernel.tf32 else chip.sustained
    bytes_l2 = total.loaded + total.stored
    terms = {
        "waves": chip.microseconds(waves),
        "matrix": chip.microseconds(total.matrix / chip.multiprocessors / sustained),
        "L2": bytes_l2 / chip.l2_bandwidth / 1e6,
        "HBM": kernel.hbm_bytes / (chip.bandwidth * chip.hbm_share) * 1e6,
    }
    longest = max(terms, key=lambda name: terms[name])
    capacity = chip.multiprocessors * kernel.resident
    return Estimate(
        chip.gap + terms[longest],
        detail if longest == "waves" else longest,
        {"gap": chip.gap, **terms},
        kernel.programs / capacity,
    )


def _waves(kernel: Kernel, chip: Chip) -> tuple[float, str]:
    """Cycles until the last program ends, and what these cycles are spent on."""
    longest = max(path.cycles(1, chip) for path in kernel.paths)
    long = [path for path in kernel.paths if path.cycles(1, chip) >= _LONG * longest]
    capacity = int(chip.multiprocessors) * kernel.resident
    full, rest = divmod(sum(path.programs for path in long), capacity)
    # Long programs share their multiprocessors with each other; in the last wave there may be fewer of them.
    last = math.ceil(rest / chip.multiprocessors)
    crowd = kernel.resident if full else last
    decisive = max(kernel.paths, key=lambda path: path.cycles(crowd, chip) * (path in long))
    if len(kernel.paths) == 1:
        (path,) = kernel.paths
        cycles = full * path.cycles(kernel.resident, chip) + (path.cycles(last, chip) if rest else 0.0)
        return cycles, _spent(path, crowd, chip)
    ends, begun, cycles = [0.0] * capacity, 0, 0.0
    for path in kernel.paths:
        for _ in range(path.programs):
            end = heapq.heappop(ends) + path.cycles(kernel.resident if begun < full * capacity else max(1, last), chip)
            heapq.heappush(ends, end)
            if end > cycles:
                cycles = end
            begun += path in long
    return cycles, _spent(decisive, crowd, chip)


def _spent(path: Path, together: int, chip: Chip) -> str:
    """The longest section, and whether its latency or what its programs share decides there."""
    section = max(path.sections, key=lambda s: s.cycles(together, chip))
    shared = shares(section.demand, chip)
    busiest = max(shared, key=lambda name: shared[name])
    reason = busiest if together * shared[busiest] > section.latency else "latency"
    return f"{reason} of {path.name + ' ' if path.name else ''}{section.name}"
