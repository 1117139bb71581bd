"""NVIDIA's machine code as a schedule: instructions with the compiler's stall counts and barriers, and their loops.

The 128 bits of an instruction have the cycles that its warp waits before it issues the next one, a barrier that its
result sets, and the barriers that it waits for. The layout of these bits is from Jia et al., "Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking" (arXiv 1804.06826, section 2.1), and holds up to Blackwell.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tests.compile import control_flow
from tests.compile.machine_code import _text_section, nvidia_tool

__all__ = ["Instruction", "Loop", "decode", "loops"]

# `/*0b70*/  @P0 LDGSTS.E.BYPASS.128 [R17], desc[UR20][R6.64], P3 ;`
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[\dT]+)\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)([^;\n]*)", re.MULTILINE
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: its first byte.
        name, modifiers, operands: ``LDSM``, ``("16", "M88", "4")`` and the text behind them.
        predicate: the predicate, such as "@!P0", or "".
        stall: cycles until the warp may issue the next instruction.
        sets, reads: the barrier that is released when the result is there, and when the operands were read, or None.
        waits: the barriers that must be released before.
    """

    address: int
    name: str
    modifiers: tuple[str, ...]
    operands: str
    predicate: str
    stall: int
    sets: int | None
    reads: int | None
    waits: tuple[int, ...]

    @property
    def never(self) -> bool:
        """Whether the predicate is always false."""
        return self.predicate in ("@!PT", "@!UPT")

    @property
    def target(self) -> int | None:
        """The address to which it branches; labels of AMD's assembly stand before their instruction."""
        found = _TARGET.search(self.operands) if self.name == "BRA" else None
        return None if found is None else int(found[1], 16)

    @property
    def leaves(self) -> bool:
        """Whether the next instruction never follows. ``BRA.U !UP0, 0x1b0`` has its condition among the operands."""
        return self.name in ("BRA", "EXIT") and not self.predicate and "," not in self.operands

    @property
    def works(self) -> bool:
        """Whether it loads or computes."""
        return self.name.endswith("MMA") or self.name.startswith(("LDG", "LDS", "FADD", "FFMA", "FMUL", "UTMA"))

    @cached_property
    def bytes(self) -> int:
        """Bytes per thread of a load or store; a matrix fragment (LDSM, STSM) has 4 bytes per 8x8 tile."""
        if self.name in ("LDSM", "STSM"):
            return 4 * int(self.modifiers[-1]) if self.modifiers[-1].isdigit() else 4
        sizes = [int(m) for m in self.modifiers if m.isdigit()]
        if sizes:
            return sizes[0] // 8
        return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(next((m for m in self.modifiers if m[0] in "US"), ""), 4)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K) of a matrix instruction: of 16816, of 64x128x8."""
        text = self.modifiers[0]
        if "x" in text:
            m, n, k = map(int, text.split("x"))
            return m, n, k
        return {
            "884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32)
        }[text]  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop in the order of their addresses."""

    body: tuple[Instruction, ...]

    @property
    def begin(self) -> int:
        """Address of the first instruction."""
        return self.body[0].address

    @cached_property
    def products(self) -> int:
        """Matrix instructions; where there are none, the multiply-adds of a loop of which they are the larger part."""
        if matrix := sum(i.name.endswith("MMA") for i in self.body):
            return matrix
        multiply_adds = sum(i.name == "FFMA" for i in self.body)
        return multiply_adds if 2 * multiply_adds > len(self.body) else 0

    @cached_property
    def loaded(self) -> int:
        """Bytes per thread that come from global memory."""
        return sum(i.bytes for i in self.body if i.name in ("LDG", "LDGSTS"))


def decode(cubin: bytes, target: str) -> list[Instruction]:
    """The instructions of a kernel. ``target`` is nvdisasm's, such as "90a"."""
    code = _text_section(cubin)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run(
            [nvidia_tool("nvdisasm"), "-b", f"SM{target}", file.name], check=True, capture_output=True, text=True
        ).stdout
    return [_instruction(code, *fields) for fields in _LINE.findall(text)]


def _instruction(code: bytes, address: str, predicate: str, name: str, modifiers: str, operands: str) -> Instruction:
    at = int(address, 16)
    control = int.from_bytes(code[at + 8 : at + 16], "little") >> 41
    sets, reads = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        at, name, tuple(modifiers.split(".")[1:]), operands.strip(), predicate, control & 15,
        None if sets == _NO_BARRIER else sets, None if reads == _NO_BARRIER else reads,
        tuple(b for b in range(6) if control >> 11 + b & 1),
    )  # fmt: skip


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that load or compute, in the order of their addresses.

    Loops that only spin until a barrier is released are part of the loop around them.
    """
    at = {i.address: i for i in code}
    flow = []
    for i in code:
        flow.append(control_flow.Instruction(i.address, i.name, i.target, i.leaves))
    found = [tuple(at[f.place] for f in loop) for loop in control_flow.loops(flow)]
    bodies = [Loop(body) for body in found if any(i.works for i in body)]
    places = [{i.address for i in loop.body} for loop in bodies]
    inner = [loop for loop, own in zip(bodies, places, strict=True) if not any(other < own for other in places)]
    return sorted(inner, key=lambda loop: loop.begin)
