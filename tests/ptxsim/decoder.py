"""Decode parsed instructions to closures over register arrays.

Each instruction is decoded once to a function fn(c, m). c is the `Context` whose lanes run the instruction; m is the
mask of the lanes that take part, or None when all do. Decoders are registered by opcode with `@opcode`; they ask the
`Decoder` for the slots of their operands. These names are shared by all the ops_*.py files:

    D decoder    T PTX type, e.g. "f32"    b its bits    R registers by slot, arrays of [lanes] or [1]
    d, ds destination slots    a, x, y, s, ss source slots    es bytes of an element    n bytes per lane
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .dtypes import POISON, UINT
from .parser import Instruction, Module
from .stats import instruction_class

if TYPE_CHECKING:
    from .context import Context

Registers = list[np.ndarray]
Mask = np.ndarray | None
Execute = Callable[["Context", Mask], None]
DecodeFunction = Callable[["Decoder", Instruction], Execute | None]

DECODERS: dict[str, DecodeFunction] = {}


def opcode(*names: str) -> Callable[[DecodeFunction], DecodeFunction]:
    """Register the decoder of some opcodes."""

    def register(f: DecodeFunction) -> DecodeFunction:
        for n in names:
            DECODERS[n] = f
        return f

    return register


def unsupported(ins: Instruction, why: str = "") -> NoReturn:
    raise NotImplementedError(f"opcode {ins.opcode} {why}(PTX line {ins.line}: {ins.text!r})")


def _f32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _f64_bits(x: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def immediate(s: str, bits: int) -> int | None:
    """The bits of a literal in a register of that width; None when `s` is no literal."""
    if re.match(r"0[fF][0-9a-fA-F]{8}$", s):
        v = int(s[2:], 16)
        return _f64_bits(struct.unpack("<f", struct.pack("<I", v))[0]) if bits == 64 else v
    if re.match(r"0[dD][0-9a-fA-F]{16}$", s):
        v = int(s[2:], 16)
        return _f32_bits(struct.unpack("<d", struct.pack("<Q", v))[0]) if bits == 32 else v
    if re.match(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$", s):
        t = s.rstrip("U").lstrip("-")
        v = int(t, 8) if re.match(r"0[0-7]+$", t) else int(t, 0)
        return -v if s.startswith("-") else v
    if re.match(r"-?\d+\.\d*([eE][-+]?\d+)?$", s):
        return _f64_bits(float(s)) if bits == 64 else _f32_bits(float(s))
    return None


def vector(s: str) -> list[str]:
    """The elements of "{a, b}", or the operand itself."""
    s = s.strip()
    return [x.strip() for x in s[1:-1].split(",")] if s.startswith("{") else [s]


def operand_type(ins: Instruction) -> str:
    return ins.mods[-1]


class Decoder:
    """Gives every register, constant, special register and parameter its slot, and decodes instructions.

    Args:
        mod: the parsed kernel.
        dyn_base: shared address of the dynamic shared memory.
        noise: perturbs the result of an approximate instruction, noise(result, relative error).
        clock: the simulated time.
    """

    def __init__(
        self,
        mod: Module,
        dyn_base: int,
        noise: Callable[[np.ndarray, float], np.ndarray],
        clock: Callable[[], int],
    ) -> None:
        self.mod, self.dyn_base, self.noise, self.clock = mod, dyn_base, noise, clock
        self.bits: list[int] = []  # width of each slot
        self.init: list[np.ndarray] = []  # initial value of each slot
        self.slots: dict[str, int] = {}
        self.special: dict[str, int] = {}
        self.param_slots: dict[tuple[int, int, int, bool], int] = {}  # see param()
        self._consts: dict[tuple[int, int], int] = {}
        self._sinks: dict[int, int] = {}
        for n, b in mod.regs.items():
            self.slots[n] = self._new_slot(b, np.array([POISON[b]], UINT[b]))

    def _new_slot(self, bits: int, value: np.ndarray) -> int:
        self.bits.append(bits)
        self.init.append(value)
        return len(self.init) - 1

    def const(self, value: int, bits: int) -> int:
        key = (value, bits)
        if key not in self._consts:
            v = bool(value) if bits == 1 else value & ((1 << bits) - 1)
            self._consts[key] = self._new_slot(bits, np.array([v], UINT[bits]))
        return self._consts[key]

    def const_value(self, slot: int) -> int | None:
        """The value of a slot that holds a constant, else None."""
        return int(self.init[slot][0]) if slot in self._consts.values() else None

    def param(self, address: int, rb: int, b: int, signed: bool) -> int:
        """The slot of b bits at an address in the kernel parameters, extended to a register of rb bits."""
        key = (address, rb, b, signed)
        if key not in self.param_slots:
            self.param_slots[key] = self._new_slot(rb, np.zeros(1, UINT[rb]))
        return self.param_slots[key]

    def name(self, ins: Instruction, s: str) -> str:
        return ins.scope.get(s, s)

    def src(self, ins: Instruction, s: str, bits: int) -> int:
        """The slot of a source operand: a register, special register, literal, or the address of a variable."""
        s = s.strip()
        n = self.name(ins, s)
        if n in self.slots:
            return self.slots[n]
        if s.startswith("%"):
            if s not in self.special:
                b = 64 if s in ("%clock64", "%globaltimer", "%gridid") else 32
                self.special[s] = self._new_slot(b, np.zeros(1, UINT[b]))  # until the context fills it
            return self.special[s]
        v = immediate(s, bits)
        if v is None:
            v = self.symbol(s)
        if v is None:
            raise NotImplementedError(f"PTX line {ins.line}: operand {s!r} in {ins.text!r}")
        return self.const(v, bits)

    def symbol(self, s: str) -> int | None:
        """The address of "variable" or "variable+offset"; the variable may be a kernel parameter."""
        m = re.match(r"([\w$]+)(?:\+(\d+))?$", s)
        if not m:
            return None
        n, off = m.group(1), int(m.group(2) or 0)
        if n == self.mod.extern_shared:
            return self.dyn_base + off
        for variables in (self.mod.shared, self.mod.globals, self.mod.local, self.mod.param_addr):
            if n in variables:
                return variables[n] + off
        return None

    def dst(self, ins: Instruction, s: str, bits: int) -> int:
        """The slot of a destination register; "_" gets one that nobody reads."""
        s = s.strip()
        if s == "_":
            if bits not in self._sinks:
                self._sinks[bits] = self._new_slot(bits, np.zeros(1, UINT[bits]))
            return self._sinks[bits]
        n = self.name(ins, s)
        if n not in self.slots:
            raise NotImplementedError(f"PTX line {ins.line}: destination {s!r} in {ins.text!r}")
        return self.slots[n]

    def addr(self, ins: Instruction, s: str) -> tuple[int, np.ndarray | None]:
        """'[reg+imm]' -> (slot, offset as an array or None)."""
        m = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?(?:0x)?[0-9a-fA-F]+)|(-\s*\d+))?\s*\]$", s.strip())
        if not m:
            raise NotImplementedError(f"PTX line {ins.line}: address {s!r}")
        off = int((m.group(2) or m.group(3) or "0").replace(" ", ""), 0)
        base = m.group(1)
        n = self.name(ins, base)
        if n in self.slots:
            slot = self.slots[n]
        else:
            v = self.symbol(base)
            if v is None:
                v = immediate(base, 64)
            if v is None:
                raise NotImplementedError(f"PTX line {ins.line}: address {s!r}")
            slot = self.const(v, 64 if v >= 1 << 32 else 32)
        b = self.bits[slot]
        return slot, (np.array([off & ((1 << b) - 1)], UINT[b]) if off else None)

    def decode(self, ins: Instruction) -> None:
        if ins.guard is not None:
            ins.guard_slot = self.slots[self.name(ins, ins.guard)]
        f = DECODERS.get(ins.op)
        if f is None:
            unsupported(ins)
        ins.cls = instruction_class(ins.op, ins.mods)
        ins.fn = f(self, ins)


def assign(d: int, f: Callable[[Registers], np.ndarray]) -> Execute:
    """R[d] = f(R) in the active lanes."""

    def fn(c: Context, m: Mask) -> None:
        v = f(c.R)
        if m is None:
            c.R[d] = v
        else:
            c.R[d] = np.where(m, v, c.R[d])

    return fn


def assign2(d: int, f: Callable[[np.ndarray, np.ndarray], np.ndarray], a: int, b: int) -> Execute:
    """R[d] = f(R[a], R[b]) in the active lanes."""

    def fn(c: Context, m: Mask) -> None:
        R = c.R
        v = f(R[a], R[b])
        if m is None:
            R[d] = v
        else:
            R[d] = np.where(m, v, R[d])

    return fn
