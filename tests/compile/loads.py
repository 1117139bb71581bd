"""How wide the global loads of a kernel are, and how wide they could be.

Triton's last block-level form (TTGIR) has the block of each load. A block of n items of s bytes in a program of T
threads is n s / T bytes per thread, of which one instruction can load 16 at most. The generated code (PTX, or AMD's
assembly) has the instructions that the load became. Both forms keep the line of the source, by which they are joined.
NVIDIA's machine code keeps the line only roughly once instructions are reordered, so its loads are compared by amount.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from tests.ptxsim import Launch

from .block_form import BlockLoop

__all__ = ["WIDEST", "Load", "generated_wide_loads", "loads", "waiting_loads"]

#: Bytes that one thread can load at once on every target.
WIDEST = 16

Place = tuple[str, int]  # file name and line


class Load(NamedTuple):
    """One `tl.load` in the source: bytes per thread and instruction, actual and possible."""

    file: str
    line: int
    width: int
    possible: int


def loads(launch: Launch) -> list[Load]:
    """Every load of a block in a launch; loads of single values are left out."""
    generated: dict[Place, int] = {}
    for place, width in _generated(launch):
        generated[place] = min(width, generated.get(place, WIDEST))
    return [
        Load(*place, generated[place], possible)
        for place, possible in sorted(_possible(launch).items())
        if place in generated
    ]


def generated_wide_loads(launch: Launch) -> int:
    """Bytes that the PTX loads or copies with instructions of ``WIDEST`` bytes, each instruction counted once."""
    return sum(width for _, width in _generated(launch) if width >= WIDEST)


def waiting_loads(launch: Launch, loop: BlockLoop) -> list[Load]:
    """The loads of blocks in a loop that are neither asynchronous nor as wide as a thread can load.

    AMD's loads have no asynchronous form here, so a small block may be loaded with as many bytes as each thread has.
    """
    locations = dict(_LOCATION.findall(str(launch.asm["ttgir"])))
    places = {_source_of(operation.location, locations) for operation in loop.loads}
    asynchronous = "cubin" in launch.asm
    return [
        load
        for load in loads(launch)
        if (load.file, load.line) in places and load.width < (WIDEST if asynchronous else load.possible)
    ]


_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_BLOCK_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local|amdg\.buffer_load\w*) .*?: "
    r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+).*loc\((#loc\d*)\)"
)


def _possible(launch: Launch) -> dict[Place, int]:
    """The widest load that each line's blocks allow."""
    ttgir = str(launch.asm["ttgir"])
    locations = dict(_LOCATION.findall(ttgir))
    warp_size = 64 if str(launch.arch).startswith("gfx9") else 32
    found: defaultdict[Place, list[int]] = defaultdict(list)
    for shape, bits, location in _BLOCK_LOAD.findall(ttgir):
        items = prod(int(n) for n in shape.split("x") if n)
        a_thread = items * int(bits) // 8 // (launch.num_warps * warp_size)
        found[_source_of(location, locations)].append(max(1, min(WIDEST, a_thread)))
    return {place: min(widths) for place, widths in found.items()}


def _source_of(location: str, locations: dict[str, str]) -> Place:
    """Where a location begins: `"file":line:column`, a named one, or the callee of a call."""
    text = location
    for _ in range(20):
        if found := re.match(r'(?:callsite\()?"([^"]+)":(\d+):\d+', text):
            return Path(found[1]).name, int(found[2])
        inner = re.search(r"#loc\d*", text)
        if inner is None:
            break
        text = locations[inner[0]]
    raise ValueError(f"TTGIR location {location} leads to {text!r}, which is no line of a file")


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', re.MULTILINE)
_SOURCE_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_PTX_LOAD = re.compile(r"^\s*(?:@!?%p\d+\s+)?ld\.global((?:\.[a-z0-9:_]+)*)")
_PTX_COPY = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?cp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)"
)
_GCN_LOAD = re.compile(r"^\s*(?:global|buffer|flat)_load_(?:lds_)?(?:d16_hi_|d16_)?([a-z]+\d*(?:x\d)?)\b")
_GCN_BYTES = {
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16,
    "ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2, "b16": 2,
}  # fmt: skip


def _generated(launch: Launch) -> tuple[tuple[Place, int], ...]:
    """(source, bytes per thread) of every load instruction of the generated code."""
    return _generated_in(*((str(launch.asm[kind]), kind) for kind in ("ptx", "amdgcn") if kind in launch.asm))


@lru_cache(maxsize=2)
def _generated_in(code: tuple[str, str]) -> tuple[tuple[Place, int], ...]:
    text, kind = code
    width_of = _ptx_width if kind == "ptx" else _gcn_width
    files = {number: Path(name).name for number, name in _FILE.findall(text)}
    place, found = ("", 0), []
    for line in text.splitlines():
        if source := _SOURCE_LINE.match(line):
            place = (files.get(source[1], ""), int(source[2]))
        elif (width := width_of(line)) is not None:
            found.append((place, width))
    return tuple(found)


def _ptx_width(line: str) -> int | None:
    if copy := _PTX_COPY.match(line):
        return int(copy[1], 0)
    if load := _PTX_LOAD.match(line):
        parts = load[1].split(".")
        vector = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d+", p)), 1)
        bits = next(int(p[1:]) for p in reversed(parts) if re.fullmatch(r"[bfsu]\d+", p))
        return vector * bits // 8
    return None


def _gcn_width(line: str) -> int | None:
    load = _GCN_LOAD.match(line)
    return None if load is None else _GCN_BYTES[load[1]]
