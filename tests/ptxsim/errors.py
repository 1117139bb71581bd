"""The faults that the executor reports. Each names the PTX line, the source line, the address and the thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parser import Instruction


class SimError(Exception):
    """A fault found while a kernel ran.

    Attributes:
        kind: the sort of fault, in words (a class attribute).
        ins: the PTX instruction, or None.
        address: the byte address of the access (shared addresses count from the program's own start), or None.
        threads: the program and thread at fault, as text, or None.
    """

    kind = "fault"

    def __init__(
        self,
        msg: str,
        ins: Instruction | None = None,
        address: int | None = None,
        threads: str | None = None,
    ) -> None:
        self.ins, self.address, self.threads = ins, address, threads
        text = f"{self.kind}: {msg}"
        if ins is not None:
            text += f"\n  at PTX line {ins.line}: {ins.text}"
            if ins.loc:
                text += f"\n  source {ins.loc}"
        if threads is not None:
            text += f"\n  thread {threads}"
        super().__init__(text)


class OutOfBounds(SimError):
    """An access to bytes that belong to no argument, or beyond the shared memory of the program."""

    kind = "out-of-bounds access"


class Misaligned(SimError):
    """An access whose address is no multiple of its size."""

    kind = "misaligned access"


class UninitShared(SimError):
    """A read of shared memory that nothing has written."""

    kind = "read of uninitialised shared memory"


class SharedRace(SimError):
    """Two warps (or, with `global_races`, programs) access the same bytes, one writes, and nothing orders them."""

    kind = "shared-memory race"


class AsyncHazard(SimError):
    """An access to shared memory that an asynchronous copy still in flight will write."""

    kind = "access to shared memory with a cp.async in flight"


class Deadlock(SimError):
    """A barrier that not all warps reach, or a loop that waits for a program that cannot run."""

    kind = "deadlock"


class Divergence(SimError):
    """A `.sync` instruction that only some lanes of a warp reach."""

    kind = "divergent warp at a .sync instruction"


class EarlyAccess(SimError):
    """An access to global memory before `griddepcontrol.wait`, in a dependent launch."""

    kind = "access before the wait for the previous kernel"


class Trap(SimError):
    """`trap`, or a failed `tl.device_assert`."""

    kind = "trap"
