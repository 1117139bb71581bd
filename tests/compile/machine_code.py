"""Registers, spills, shared memory and instructions of a compiled kernel, read from its machine code.

NVIDIA's machine code is read by ``cuobjdump`` and ``nvdisasm``, which come with Triton beside its ptxas. nvdisasm takes
longer to start than to read a kernel, so ``disassemble`` gives it the code of many kernels end to end. For AMD, Triton
keeps the assembly, with metadata at its end. The results are kept in Triton's cache beside the code.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from tests.ptxsim import Launch

from . import control_flow, hazards
from .control_flow import Instruction, loops

__all__ = [
    "Instructions",
    "MissingTool",
    "Resources",
    "digest",
    "disassemble",
    "instructions",
    "nvidia_tool",
    "read_sass",
    "resources",
]


class MissingTool(RuntimeError):
    """Triton was installed without the tool that reads its machine code."""


@dataclass(frozen=True)
class Resources:
    """The resources that one kernel needs of its target.

    Attributes:
        registers: registers per thread (vector registers on AMD, accumulation registers included).
        spilled: bytes of local memory and stack per thread on NVIDIA; spilled vector registers plus bytes of scratch on
            AMD.
        shared: bytes of shared memory per program.
    """

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Instructions:
    """The instructions of one kernel, each counted once, also inside loops.

    Attributes:
        counts: number of instructions by mnemonic without modifiers, e.g. "HMMA", "v_mfma_f32_16x16x16_f16".
        wide_loads: bytes per thread that global loads of 16 bytes or more bring, asynchronous copies included.
        overwritten: instructions that write registers which a wgmma may still be reading, see ``hazards``.
        main_loops: number of instructions by mnemonic with modifiers, e.g. "HMMA.16816.F32", of every loop that
            multiplies matrices and has no such loop inside. " lds" follows AMD's loads into shared memory.
    """

    counts: dict[str, int]
    wide_loads: int
    overwritten: list[str]
    main_loops: list[dict[str, int]]

    def count(self, *prefixes: str) -> int:
        """Instructions whose mnemonic begins with one of ``prefixes``."""
        return sum(n for name, n in self.counts.items() if name.startswith(prefixes))


def resources(launch: Launch) -> Resources:
    """Registers, spills and shared memory of a launch on a simulated GPU.

    Raises:
        MissingTool: cuobjdump is not in the installed Triton.
    """
    kept = _Kept(launch, "resources")
    if kept.value is None:
        kept.put(_cubin_resources(launch) if "cubin" in launch.asm else _amdgcn_resources(launch))
    registers, spilled = kept.value
    return Resources(registers, spilled, launch.shared)


def instructions(launch: Launch) -> Instructions:
    """The machine instructions of a launch on a simulated GPU.

    Raises:
        MissingTool: nvdisasm is not in the installed Triton.
    """
    disassemble([launch])
    return Instructions(*_Kept(launch, "instructions").value)


def disassemble(launches: Iterable[Launch]) -> None:
    """Read the instructions of many launches at once; ``instructions`` then returns them from the cache.

    Raises:
        MissingTool: nvdisasm is not in the installed Triton.
    """
    unread: defaultdict[str, list[tuple[_Kept, bytes]]] = defaultdict(list)
    for launch in launches:
        kept = _Kept(launch, "instructions")
        if kept.value is not None:
            continue
        if "cubin" in launch.asm:
            unread[_target(launch)].append((kept, _text_section(_binary(launch))))
        else:
            kept.put(_amdgcn(str(launch.asm["amdgcn"])))
    for target, codes in unread.items():
        for (kept, _), counted in zip(codes, _sass(target, [code for _, code in codes]), strict=True):
            kept.put(counted)


def read_sass(launch: Launch) -> list[tuple[str, str]]:
    """(Mnemonic, modifiers) of every instruction of NVIDIA's machine code, in the order of the code."""
    target = _target(launch)
    text = _output_of("nvdisasm", "-b", f"SM{target}", data=_text_section(_binary(launch)))
    return [(name, modifiers) for _, _, name, modifiers, _ in _SASS.findall(text)]


def digest(launch: Launch) -> str:
    """The hash of the binary."""
    return hashlib.sha256(_binary(launch)).hexdigest()


def _target(launch: Launch) -> str:
    target = re.search(r"^\.target sm_(\w+)", str(launch.asm["ptx"]), re.MULTILINE)
    assert target is not None, "PTX names no target"
    return target[1]


def _binary(launch: Launch) -> bytes:
    binary = launch.asm["cubin" if "cubin" in launch.asm else "hsaco"]
    assert isinstance(binary, bytes)
    return binary


class _Kept:
    """The stored results for one binary, written by this process or by an earlier one with the same code.

    None where nothing is stored yet.
    """

    def __init__(self, launch: Launch, what: str) -> None:
        key = f"{what} {digest(launch)} {_own_source()}"
        self._cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        self._name = f"fastmlp_{what}.json"
        file = self._cache.get_file(self._name)
        self.value: Any = None if file is None else json.loads(Path(file).read_text())

    def put(self, value: tuple[Any, ...]) -> None:
        self._cache.put(json.dumps(value), self._name, binary=False)
        self.value = value


@lru_cache
def _own_source() -> str:
    return "".join(Path(str(file)).read_text() for file in (__file__, control_flow.__file__, hazards.__file__))


@lru_cache
def nvidia_tool(name: str) -> str:
    """Path of one of the CUDA tools beside Triton's ptxas."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise MissingTool(f"{path} does not exist: this build of Triton has no {name}, so its code cannot be inspected")
    return str(path)


def _output_of(tool: str, *options: str, data: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        command = [nvidia_tool(tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def _cubin_resources(launch: Launch) -> tuple[int, int]:
    found = _RESOURCES.search(_output_of("cuobjdump", "--dump-resource-usage", data=_binary(launch)))
    assert found is not None, "cuobjdump printed no resource usage"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _text_section(cubin: bytes) -> bytes:
    """The code of a cubin, an ELF64 file with one kernel: its one section named .text.*."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry_size) for i in range(count)]
    names = sections[names_index][4]
    (code,) = (
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


# `/*0b70*/  @P0 LDGSTS.E.BYPASS.128 [R17], desc[UR20][R6.64], P3 ;`
_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)([^;\n]*)", re.MULTILINE
)
_MATRIX = re.compile(r"[HIQDO]G?MMA|UTC\w*MMA|v_(?:mfma|smfmac|wmma|swmmac)_")


def _sass(target: str, codes: list[bytes]) -> list[tuple[Any, ...]]:
    """The fields of ``Instructions`` of each code of one target, e.g. "90a"."""
    starts = [0]
    for code in codes[:-1]:
        starts.append(starts[-1] + len(code))
    lines: list[list[tuple[str, ...]]] = [[] for _ in codes]
    for line in _SASS.findall(_output_of("nvdisasm", "-b", f"SM{target}", data=b"".join(codes))):
        lines[bisect_right(starts, int(line[0], 16)) - 1].append(line)
    return [_sass_of_one(code) for code in lines]


def _sass_of_one(lines: list[tuple[str, ...]]) -> tuple[Any, ...]:
    """The fields of ``Instructions`` from (address, predicate, mnemonic, modifiers, operands)."""
    counts = Counter(name for _, _, name, _, _ in lines)
    wide_loads = 0
    for _, _, name, modifiers, _ in lines:
        if name in ("LDG", "LDGSTS"):
            bits = [int(m) for m in modifiers.split(".") if m.isdigit()]
            wide_loads += bits[0] // 8 if bits and bits[0] >= 128 else 0
    code = [(name, modifiers, operands) for _, _, name, modifiers, operands in lines]
    overwritten = hazards.overwritten_operands(code) if counts["HGMMA"] else []
    return dict(counts), wide_loads, overwritten, _main_loops([_sass_flow(line) for line in lines])


_ENDS = ("EXIT", "RET", "BRX", "JMX", "JMP")


def _sass_flow(line: tuple[str, ...]) -> Instruction:
    address, predicate, name, modifiers, operands = line
    if name != "BRA":
        return Instruction(int(address, 16), name + modifiers, ends=name in _ENDS and not predicate)
    # `BRA.U !UP0, 0x1b0` has its condition among the operands.
    *condition, target = operands.split(",")
    return Instruction(int(address, 16), name + modifiers, int(target, 16), not predicate and not condition)


def _main_loops(code: list[Instruction]) -> list[dict[str, int]]:
    """The instructions of the innermost loops that multiply matrices."""
    if not any(_MATRIX.match(instruction.name) for instruction in code):
        return []
    found = sorted(loop for loop in loops(code) if any(_MATRIX.match(instruction.name) for instruction in loop))
    places = [{instruction.place for instruction in loop} for loop in found]
    return [
        dict(Counter(instruction.name for instruction in loop))
        for loop, own in zip(found, places, strict=True)
        if not any(other < own for other in places)
    ]


_GCN_WIDE_LOAD = re.compile(r"^(global|buffer|flat)_load_(lds_)?(dwordx4|b128)$")


def _amdgcn_resources(launch: Launch) -> tuple[int, int]:
    metadata = dict(re.findall(r"^\s*-?\s*\.(\w+):\s*(\d+)\s*$", str(launch.asm["amdgcn"]), flags=re.MULTILINE))
    spilled = int(metadata["vgpr_spill_count"]) + int(metadata["private_segment_fixed_size"])
    return int(metadata["vgpr_count"]), spilled


# `.LBB0_3:` or `	buffer_load_dwordx4 v[58:61], v50, s[24:27], 0 offen`
_GCN_LINE = re.compile(r"^(?:(\.?\w+):|[ \t]+([a-z][a-z0-9_]+)(?:[ \t]+([^;\n]*)|$))", re.MULTILINE)


def _amdgcn(text: str) -> tuple[Any, ...]:
    """The fields of ``Instructions`` from AMD's assembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for label, name, operands in _GCN_LINE.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((name, operands.strip()))
    counts = Counter(name for name, _ in lines)
    wide_loads = sum(16 * n for name, n in counts.items() if _GCN_WIDE_LOAD.match(name))
    flow = [_gcn_flow(i, name, operands, labels) for i, (name, operands) in enumerate(lines)]
    return dict(counts), wide_loads, [], _main_loops(flow)


def _gcn_flow(place: int, name: str, operands: str, labels: dict[str, int]) -> Instruction:
    if name.startswith(("s_branch", "s_cbranch")):
        return Instruction(place, name, labels.get(operands), name == "s_branch")
    lds = " lds" if operands.endswith(" lds") else ""
    return Instruction(place, name + lds, ends=name in ("s_endpgm", "s_setpc_b64"))
