"""Faults that compilers make around asynchronous matrix units, found in the generated code.

wgmma reads its first operand from registers while the program goes on. These registers must not be reused before the
program has waited. Triton allowed the reuse (triton issues 9433 and 11781), and so did CUDA 12.9's ptxas.

tcgen05 keeps its accumulator in tensor memory. Triton 3.6 to 3.8 can run consecutive products through one accumulator
in the wrong order (triton issue 10821). The fault occurs where the accumulator of one product is copied to the
accumulator of the next product.
"""

from __future__ import annotations

import re

__all__ = ["copied_accumulators", "overwritten_operands", "pending_operands"]

#: A wgmma in PTX whose first operand, after the accumulator, is a list of registers.
_FROM_REGISTERS = re.compile(r"wgmma\.mma_async[^;{]*\{[^;}]*\}\s*,\s*\{")
_PARTIAL_WAIT = re.compile(r"wgmma\.wait_group\S*\s+[1-9]")
_OPERAND_A = re.compile(r"\bR(\d+)$")
_DESTINATION = re.compile(r"R(\d+)\b")
#: The registers of the first operand that one wgmma reads, whatever the dtype.
_A_REGISTERS = 4


def overwritten_operands(code: list[tuple[str, str, str]]) -> list[str]:
    """Instructions that write registers which an earlier wgmma may still be reading.

    Args:
        code: (mnemonic, modifiers, operands) of each machine instruction, in order.
    """
    groups: list[set[int]] = [set()]  # registers of each wgmma group not waited for; the last group is still open
    found = []
    for name, modifiers, operands in code:
        fields = [field.strip() for field in operands.split(",")]
        if name == "HGMMA":
            if match := _OPERAND_A.match(fields[1]):
                first = int(match[1])
                groups[-1] |= set(range(first, first + _A_REGISTERS))
            if "gsb0" in fields:
                groups.append(set())
        elif name == "WARPGROUP" and modifiers.startswith(".DEPBAR"):
            pending = int(fields[-1], 16)
            groups = groups[len(groups) - 1 - pending :] if pending < len(groups) else groups
        elif match := _DESTINATION.match(fields[0]):
            first = int(match[1])
            if set(range(first, first + _width(name, modifiers))) & set().union(*groups):
                found.append(f"{name}{modifiers} {operands}")
        elif name == "BRA" and any(groups):
            found.append(f"{name}{modifiers} {operands}: a wgmma still reads registers")
    return found


def _width(name: str, modifiers: str) -> int:
    """How many registers an instruction writes."""
    parts = modifiers.split(".")
    if name in ("HMMA", "IMMA") or "128" in parts or (name == "LDSM" and "4" in parts):
        return 4
    if "64" in parts or "WIDE" in parts or (name == "LDSM" and "2" in parts) or (name == "CS2R" and "32" not in parts):
        return 2
    return 1


def pending_operands(ptx: str) -> int:
    """How many waits leave a wgmma pending, in a kernel where some wgmma read registers.

    Only ptxas then keeps the registers intact.
    """
    return len(_PARTIAL_WAIT.findall(ptx)) if _FROM_REGISTERS.search(ptx) else 0


def copied_accumulators(ttgir: str) -> int:
    """How often the accumulator of one tcgen05 product is copied to the accumulator of another product."""
    loaded = re.findall(r"(%[\w.]+(?:_\d+)?)(?:, %\S+)? = ttng\.tmem_load", ttgir)
    return sum(len(re.findall(rf"ttng\.tmem_store {re.escape(value)},", ttgir)) for value in loaded)
