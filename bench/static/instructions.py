"""The instruction mix of machine code: mnemonics of NVIDIA's SASS and AMD's assembly in a few groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

__all__ = ["GROUPS", "group_of", "mix"]

#: In the order of the report's columns.
GROUPS = (
    "tensor core", "fma", "other float", "integer", "global memory", "shared memory", "async", "control", "other",
)  # fmt: skip

# The first pattern that matches the beginning of a mnemonic decides. "integer" has logic, moves and addresses too, and
# "control" has waits and barriers. "async" has copies from global to shared memory and what orders them. "other" has
# loads of constants and kernel parameters.
_NVIDIA: tuple[tuple[str, str], ...] = (
    ("tensor core", r"[HIDQO]G?MMA|UTC\w*MMA"),
    ("fma", r"(FFMA|HFMA|DFMA)"),
    ("async", r"LDGSTS|LDGDEPBAR|DEPBAR|ARRIVES|SYNCS|UTMA|UBLKCP|UTCBAR|UTCATOM|UTCCP|UTCSHIFT"),
    ("global memory", r"(LDG|STG|LD|ST|ATOMG|ATOM|RED|REDG|CCTL)$"),
    ("other", r"U?LDC"),
    ("shared memory", r"LDS|STS|ATOMS|LDT|STT"),
    ("control", r"BRA|BRX|JMP|EXIT|BAR|UBAR|BSSY|BSYNC|BREAK|BMOV|BPT|CALL|RET|WARPSYNC|WARPGROUP|YIELD|NANOSLEEP|NOP"
     r"|MEMBAR|FENCE|ERRBAR|ELECT|ENDCOLLECTIVE|KILL|PREEXIT|ACQBULK|CGAERRBAR|UCGABAR|USETMAXREG|UVIRTCOUNT"),
    ("other float", r"F(ADD|MUL|SET|MNMX|SEL|CHK|RND|SWZ|2F|2I)|MUFU|[HD](ADD|MUL|SET|MNMX)|U?I2F|UF"),
    ("integer", r"U?(I[A-Z]|LEA|SH[FLR]|LOP|PLOP|PRMT|SEL|MOV|POPC|FLO|BREV|SGXT|BMSK|P2R|R2P|VI|VOTE|USEL|CLEA)"
     r"|R2UR|S2R|S2UR|CS2|B2R|R2B|MATCH|C?REDUX|SHFL|MOVM|U?PSETP|UP2UR|UR2UP|LEPC"),
)  # fmt: skip

_AMD: tuple[tuple[str, str], ...] = (
    ("tensor core", r"v_(mfma|smfma|wmma|swmma)"),
    ("fma", r"v_(dual_)?(pk_)?(fma|mad|fmac|fmamk|fmaak|mac|dot2)\w*_[bf]\w*(16|32|64)|v_(dual_)?(fmac|fmaak|fmamk)"),
    ("async", r"(global|buffer|flat)_load_lds"),
    ("global memory", r"(global|buffer|flat|scratch)_"),
    ("other", r"s_(load|buffer_load)"),
    ("shared memory", r"ds_"),
    ("control", r"s_(waitcnt|wait_|barrier|branch|cbranch|endpgm|nop|sleep|delay_alu|clause|setprio|sethalt"
     r"|inst_prefetch|sched|set_inst_prefetch|getpc|setpc|swappc|code_end|sendmsg|trap|icache|set_gpr)"),
    ("other float", r"v_(dual_|pk_)*(\w+_)?(bf16|f16|f32|f64)(_|$)|v_(exp|log|rcp|rsq|sqrt|sin|cos|ldexp|frexp|fract"
     r"|trunc|ceil|rndne|floor|div_|cvt)"),
    ("integer", r"[vs]_"),
)  # fmt: skip

_AMD_MOVES = re.compile(
    r"v_(dual_)?(mov|cndmask|accvgpr|perm|swap|readlane|readfirstlane|writelane|and|or|xor|not|bf|l?sh)"
)

_PATTERNS = {
    "nvidia": [(group, re.compile(pattern)) for group, pattern in _NVIDIA],
    "amd": [(group, re.compile(pattern)) for group, pattern in _AMD],
}


def group_of(mnemonic: str) -> str:
    """The group of one machine instruction; NVIDIA's are in capitals, AMD's are not."""
    vendor = "nvidia" if mnemonic.isupper() else "amd"
    # Moves, selections and exchanges of bits are no arithmetic, whatever type their names contain.
    if vendor == "amd" and _AMD_MOVES.match(mnemonic):
        return "integer"
    for group, pattern in _PATTERNS[vendor]:
        if pattern.match(mnemonic):
            return group
    return "other"


def mix(instructions: Mapping[str, int]) -> dict[str, int]:
    """Instructions of each group, in the order of ``GROUPS``; padding (NOP) is left out."""
    counts: Counter[str] = Counter()
    for mnemonic, n in instructions.items():
        if mnemonic not in ("NOP", "s_code_end", "s_nop"):
            counts[group_of(mnemonic)] += n
    return {group: counts[group] for group in GROUPS}
