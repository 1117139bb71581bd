"""AMD's assembly as the same schedule as NVIDIA's machine code: a few kinds of instructions, and their loops.

The assembly has no stall counts. A wave of 64 lanes issues one instruction in four cycles, since a vector unit has 16
lanes; its waits for loads are instructions (``s_waitcnt``). The kinds have the names of NVIDIA's instructions.
"""

from __future__ import annotations

import re
from bisect import bisect_left

from .sass import Instruction

__all__ = ["decode_gcn"]

#: Cycles between two instructions of one wave.
_ISSUE = 4
_LINE = re.compile(r"^\s+([a-z][a-z0-9_]+)(?=\s|$)([^;\n]*)", re.MULTILINE)
_LABEL = re.compile(r"^(\.LBB\w+):", re.MULTILINE)
_MFMA = re.compile(r"v_s?mfma_f\d+_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?(\w*)")
_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_SIZES = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "byte": 8, "u8": 8, "u16": 16, "b16": 16}
_KINDS = (
    ("LDGSTS", r"(global|buffer)_load_(lds_|.*\blds\b)"),
    ("LDG", r"(global|buffer|flat)_load"),
    ("STG", r"(global|buffer|flat)_store"),
    ("SHFL", r"ds_(bpermute|permute|swizzle)"),
    ("LDS", r"ds_(read|load)"),
    ("STS", r"ds_(write|store)"),
    ("LDC", r"s_(load|buffer_load)"),
    ("BAR", r"s_barrier"),
    ("WAIT", r"s_waitcnt"),
    ("EXIT", r"s_endpgm"),
    ("BRA", r"s_c?branch"),
    ("NOP", r"s_(nop|code_end)"),
    ("SALU", r"s_"),
    ("MUFU", _SPECIAL.pattern),
    ("FADD", r"v_\w*_f32"),
    ("IADD", r"v_"),
)


def decode_gcn(assembly: str) -> list[Instruction]:
    """The instructions of a kernel; addresses are their numbers."""
    end = assembly.find(".Lfunc_end0")
    code = assembly[: end if end >= 0 else None]
    lines = [match.start(1) for match in _LINE.finditer(code)]
    # A label names the next instruction.
    labels = {match[1]: bisect_left(lines, match.start()) for match in _LABEL.finditer(code)}
    found = []
    for place, match in enumerate(_LINE.finditer(code)):
        name, operands = match[1], match[2].strip()
        kind = next((kind for kind, pattern in _KINDS if re.match(pattern, name)), "NOP")
        modifiers: tuple[str, ...] = ()
        if shape := _MFMA.match(name):
            m, n, k, blocks, dtype = shape.groups()
            kind, modifiers = "VMMA", (f"{m}x{int(n) * int(blocks or 1)}x{k}", "BF16" if "16" in dtype else "TF32")
        elif kind in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
            modifiers = (str(_bits(name)),)
        elif kind == "BRA":
            operands = f"0x{labels.get(operands, len(lines)):x}"
        predicate = "cc" if name.startswith("s_cbranch") else ""
        found.append(Instruction(place, kind, modifiers, operands, predicate, _ISSUE, None, None, ()))
    return found


def _bits(name: str) -> int:
    """Bits per lane of a load or store: of dwordx4, read2_b64, ushort."""
    if match := re.search(r"dword(?:x(\d))?$", name):
        return 32 * int(match[1] or 1)
    if match := re.search(r"_b(\d+)$", name):
        return int(match[1]) * (2 if "2_b" in name or "2st64_b" in name else 1)
    return next((bits for text, bits in _SIZES.items() if text in name), 32)
