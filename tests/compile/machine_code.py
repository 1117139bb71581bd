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

from . import hazards

__all__ = [
    "Instructions",
    "MissingTool",
    "Resources",
    "digest",
    "disassemble",
    "instructions",
    "nvidia_tool",
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
    """

    counts: dict[str, int]
    wide_loads: int
    overwritten: list[str]

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
            target = re.search(r"^\.target sm_(\w+)", str(launch.asm["ptx"]), re.MULTILINE)
            assert target is not None, "PTX names no target"
            unread[target[1]].append((kept, _text_section(_binary(launch))))
        else:
            kept.put(_amdgcn(launch))
    for target, codes in unread.items():
        for (kept, _), counted in zip(codes, _sass(target, [code for _, code in codes]), strict=True):
            kept.put(counted)


def digest(launch: Launch) -> str:
    """The hash of the binary."""
    return hashlib.sha256(_binary(launch)).hexdigest()


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
    return Path(__file__).read_text() + Path(hazards.__file__).read_text()


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
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)([^;\n]*)", re.MULTILINE
)


def _sass(target: str, codes: list[bytes]) -> list[tuple[dict[str, int], int, list[str]]]:
    """The fields of ``Instructions`` of each code of one target, e.g. "90a"."""
    starts = [0]
    for code in codes[:-1]:
        starts.append(starts[-1] + len(code))
    counts: list[Counter[str]] = [Counter() for _ in codes]
    wide_loads = [0] * len(codes)
    instructions: list[list[tuple[str, str, str]]] = [[] for _ in codes]
    lines = _SASS.findall(_output_of("nvdisasm", "-b", f"SM{target}", data=b"".join(codes)))
    for address, name, modifiers, operands in lines:
        i = bisect_right(starts, int(address, 16)) - 1
        counts[i][name] += 1
        instructions[i].append((name, modifiers, operands))
        if name in ("LDG", "LDGSTS"):
            bits = [int(m) for m in modifiers.split(".") if m.isdigit()]
            wide_loads[i] += bits[0] // 8 if bits and bits[0] >= 128 else 0
    overwritten = [
        hazards.overwritten_operands(code) if counts[i]["HGMMA"] else [] for i, code in enumerate(instructions)
    ]
    return [(dict(count), *rest) for count, *rest in zip(counts, wide_loads, overwritten, strict=True)]


_GCN_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]+)(?=\s|$)", re.MULTILINE)
_GCN_WIDE_LOAD = re.compile(r"^(global|buffer|flat)_load_(lds_)?(dwordx4|b128)$")


def _amdgcn_resources(launch: Launch) -> tuple[int, int]:
    metadata = dict(re.findall(r"^\s*-?\s*\.(\w+):\s*(\d+)\s*$", str(launch.asm["amdgcn"]), flags=re.MULTILINE))
    spilled = int(metadata["vgpr_spill_count"]) + int(metadata["private_segment_fixed_size"])
    return int(metadata["vgpr_count"]), spilled


def _amdgcn(launch: Launch) -> tuple[dict[str, int], int, list[str]]:
    counts = Counter(_GCN_INSTRUCTION.findall(str(launch.asm["amdgcn"])))
    wide_loads = sum(16 * n for name, n in counts.items() if _GCN_WIDE_LOAD.match(name))
    return dict(counts), wide_loads, []
