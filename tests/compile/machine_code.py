"""What a compiled kernel is made of, read from its machine code: registers, spills, shared memory, instructions.

NVIDIA: ``cuobjdump`` and ``nvdisasm``, which come with Triton beside its ptxas. AMD: the assembly that Triton keeps,
and the metadata at its end. What was read is kept in Triton's cache, beside the code.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from tests.ptxsim import Launch

__all__ = ["Instructions", "MissingTool", "Resources", "digest", "instructions", "nvidia_tool", "resources"]


class MissingTool(RuntimeError):
    """Triton was installed without the tool that reads its machine code."""


@dataclass(frozen=True)
class Resources:
    """What one kernel asks of its target.

    Attributes:
        registers: a thread's registers (vector registers on AMD, accumulation registers included).
        spilled: NVIDIA: bytes of local memory and stack a thread; AMD: spilled vector registers and bytes of scratch.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Instructions:
    """The instructions of one kernel, each counted once wherever it stands.

    Attributes:
        counts: how many there are by mnemonic without modifiers, e.g. "HMMA", "v_mfma_f32_16x16x16_f16".
        wide_loads: bytes a thread that the global loads of 16 bytes and more, asynchronous copies included, bring.
    """

    counts: dict[str, int]
    wide_loads: int

    def count(self, *prefixes: str) -> int:
        """Instructions whose mnemonic begins with one of ``prefixes``."""
        return sum(n for name, n in self.counts.items() if name.startswith(prefixes))


def resources(launch: Launch) -> Resources:
    """Registers, spills and shared memory of a launch on a simulated GPU.

    Raises:
        MissingTool: cuobjdump is not in the installed Triton.
    """
    read = _cubin_resources if "cubin" in launch.asm else _amdgcn_resources
    registers, spilled = _kept(launch, "resources", read)
    return Resources(registers, spilled, launch.shared)


def instructions(launch: Launch) -> Instructions:
    """The machine instructions of a launch on a simulated GPU.

    Raises:
        MissingTool: nvdisasm is not in the installed Triton.
    """
    return Instructions(*_kept(launch, "instructions", _sass if "cubin" in launch.asm else _amdgcn))


def digest(launch: Launch) -> str:
    """The hash of the binary."""
    return hashlib.sha256(_binary(launch)).hexdigest()


def _binary(launch: Launch) -> bytes:
    binary = launch.asm["cubin" if "cubin" in launch.asm else "hsaco"]
    assert isinstance(binary, bytes)
    return binary


def _kept(launch: Launch, what: str, read: Callable[[Launch], tuple[Any, ...]]) -> list[Any]:
    """``read(launch)``, or what it gave when the same binary was read before by the same code."""
    key = f"{what} {digest(launch)} {_own_source()}"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    name = f"fastmlp_{what}.json"
    file = cache.get_file(name)
    if file is None:
        file = cache.put(json.dumps(read(launch)), name, binary=False)
    return json.loads(Path(file).read_text())


@lru_cache
def _own_source() -> str:
    return Path(__file__).read_text()


@lru_cache
def nvidia_tool(name: str) -> str:
    """Path of one of the CUDA tools beside Triton's ptxas."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise MissingTool(f"{path} does not exist: this build of Triton has no {name}, so its code cannot be inspected")
    return str(path)


def _output_of(launch: Launch, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(_binary(launch))
        file.flush()
        command = [nvidia_tool(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# `/*0b70*/  @P0 LDGSTS.E.BYPASS.128 [R17], desc[UR20][R6.64], P3 ;`
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def _cubin_resources(launch: Launch) -> tuple[int, int]:
    found = _RESOURCES.search(_output_of(launch, "cuobjdump", "--dump-resource-usage"))
    assert found is not None, "cuobjdump printed no resource usage"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _sass(launch: Launch) -> tuple[dict[str, int], int]:
    counts: Counter[str] = Counter()
    wide_loads = 0
    for name, modifiers in _SASS.findall(_output_of(launch, "nvdisasm", "-c")):
        counts[name] += 1
        if name in ("LDG", "LDGSTS"):
            bits = [int(m) for m in modifiers.split(".") if m.isdigit()]
            wide_loads += bits[0] // 8 if bits and bits[0] >= 128 else 0
    return dict(counts), wide_loads


_GCN_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]+)(?=\s|$)", re.MULTILINE)
_GCN_WIDE_LOAD = re.compile(r"^(global|buffer|flat)_load_(lds_)?(dwordx4|b128)$")


def _amdgcn_resources(launch: Launch) -> tuple[int, int]:
    metadata = dict(re.findall(r"^\s*-?\s*\.(\w+):\s*(\d+)\s*$", str(launch.asm["amdgcn"]), flags=re.MULTILINE))
    spilled = int(metadata["vgpr_spill_count"]) + int(metadata["private_segment_fixed_size"])
    return int(metadata["vgpr_count"]), spilled


def _amdgcn(launch: Launch) -> tuple[dict[str, int], int]:
    counts = Counter(_GCN_INSTRUCTION.findall(str(launch.asm["amdgcn"])))
    return dict(counts), sum(16 * n for name, n in counts.items() if _GCN_WIDE_LOAD.match(name))
