"""Branches, barriers, traps, and the instructions that have no effect in this model."""

from __future__ import annotations

import numpy as np

from .context import BAR, BRANCH, BRX, EXIT, Context
from .decoder import Decoder, Execute, Mask, opcode, unsupported
from .errors import Trap
from .parser import LABELS, Instruction


@opcode("bar", "barrier")
def barrier(D: Decoder, ins: Instruction) -> Execute | None:
    if "warp" in ins.mods:
        ins.warp_sync = True
        return lambda c, m: None
    if "sync" not in ins.mods or "cluster" in ins.mods or "red" in ins.mods:
        unsupported(ins)
    ins.kind = BAR
    slots = [D.src(ins, x, 32) for x in ins.ops]
    ins.bar = (slots[0], slots[1] if len(slots) > 1 else None)
    return None


@opcode("bra")
def branch(D: Decoder, ins: Instruction) -> None:
    ins.kind = BRANCH
    label = ins.scope[LABELS].get(ins.ops[0], ins.ops[0])
    if label not in D.mod.labels:
        raise NotImplementedError(f"PTX line {ins.line}: label {label}")
    ins.target = D.mod.labels[label]


@opcode("brx")
def branch_by_table(D: Decoder, ins: Instruction) -> None:
    ins.kind = BRX
    ins.targets = [D.mod.labels[x] for x in D.mod.branch_tables[ins.ops[1]]]
    ins.index_slot = D.src(ins, ins.ops[0], 32)


@opcode("ret", "exit")
def leave(D: Decoder, ins: Instruction) -> None:
    ins.kind = EXIT


def _raise_trap(ins: Instruction, msg: str) -> Execute:
    def fn(c: Context, m: Mask) -> None:
        raise Trap(msg, ins, threads=c.who(0 if m is None else int(np.flatnonzero(m)[0])))

    return fn


@opcode("trap")
def trap(D: Decoder, ins: Instruction) -> Execute:
    return _raise_trap(ins, "trap executed")


@opcode("call")
def call(D: Decoder, ins: Instruction) -> Execute:
    """Only the functions that Triton's device_assert and device_print call."""
    if "__assertfail" in ins.text:
        return _raise_trap(ins, "device assertion failed")
    if "vprintf" in ins.text:
        return lambda c, m: None
    unsupported(ins)


@opcode("griddepcontrol")
def grid_dependency(D: Decoder, ins: Instruction) -> Execute:
    """The previous launch has ended when this one begins; a dependent launch has to wait for it all the same."""
    if ins.mods == ["launch_dependents"]:
        return lambda c, m: None
    if ins.mods != ["wait"]:
        unsupported(ins)

    def wait(c: Context, m: Mask) -> None:
        c.waited[slice(None) if m is None else m] = True
        c.waits = c.waits and not c.waited.all()

    return wait


@opcode(
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "nanosleep",
    "membar",
    "fence",
    "pmevent",
    "brkpt",
    "setmaxnreg",
)
def no_effect(D: Decoder, ins: Instruction) -> Execute:
    """Memory is sequentially consistent here, and time and caches are not modelled."""
    return lambda c, m: None
