"""Parse the PTX text of one kernel: instructions, parameters, registers, symbols, labels, source lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .dtypes import BITS

GBASE = 0x7F0000000000  # start of the simulated global address space
REDZONE = 4096  # unregistered bytes around every buffer
PARAM_BASE = 0x7E0000000000  # start of the address space of kernel parameters

LABELS = "\0labels"  # where a scope keeps the labels of an inline-assembly block: no PTX name starts with NUL

_PARAMETER = re.compile(r"\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s*(.*?)\s*([\w$]+)(\[\d+\])?\s*$", re.S)
_VARIABLE = re.compile(
    r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(shared|global|const|local)\s+((?:\.align\s+\d+\s+)?)"
    r"\.(\w+)\s+([\w$]+)\s*(\[\s*\d*\s*\])?\s*(?:=\s*(.*))?$",
    re.S,
)

_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_ONE_STATEMENT = re.compile(r"\s*([^\s{};:][^;:]*);\s*$")
_GUARDED = re.compile(r"@(!?)\s*([%\w$]+)\s+(.*)$", re.S)
_OPCODE = re.compile(r"([\w.:]+)\s*(.*)$", re.S)


class Instruction:
    """One PTX instruction as written, with the fields that the decoder adds."""

    line: int  # line of the PTX text
    loc: str | None  # "file.py:line" of the source
    text: str
    op: str  # the opcode: "fma"
    mods: list[str]  # the modifiers that follow the opcode: ["rn", "f32"]
    ops: list[str]  # operands
    scope: dict[str, Any]  # names of an inline-assembly block -> unique names
    pc: int
    guard: str | None  # predicate
    guard_negated: bool
    # The decoder's fields.
    kind: int  # NORMAL, BRANCH, BAR, EXIT or BRX of the context
    fn: Callable[[Any, Any], None] | None  # fn(context, mask) of NORMAL instructions
    guard_slot: int | None
    target: int  # where a branch goes
    targets: list[int]  # where a branch by table goes
    index_slot: int  # slot of the index that chooses a target
    bar: tuple[int, int | None]  # slots of a barrier's id and of its thread count
    warp_sync: bool  # whether the whole warp is needed
    ismem: bool  # whether warps may be switched here
    cls: str  # class in the statistics
    mma: int  # tensor-core operations of one warp
    # Counts of a launch.
    count: int  # warps that issued the instruction
    global_counts: list[int] | None  # requests, sectors, minimal sectors, bytes
    shared_counts: list[int] | None  # requests, wavefronts, conflicts

    __slots__ = tuple(__annotations__)

    def __init__(self, line: int, loc: str | None, text: str) -> None:
        self.line, self.loc, self.text = line, loc, text
        self.guard, self.guard_negated, self.guard_slot = None, False, None
        self.fn, self.kind, self.cls, self.warp_sync, self.ismem = None, 0, "other", False, False
        self.global_counts = self.shared_counts = None
        self.count = self.mma = 0

    @property
    def opcode(self) -> str:
        return ".".join([self.op, *self.mods])


def split_operands(s: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    if not any(bracket in s for bracket in "[{("):
        return [operand.strip() for operand in s.split(",")] if s.strip() else []
    out, depth, cur = [], 0, ""
    for ch in s:
        if ch in "[{(":
            depth += 1
        elif ch in "]})":
            depth -= 1
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


class Module:
    """Parsed PTX text of one kernel: parameters, registers, symbols, instructions still to be decoded."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
        entries = re.findall(r"\.entry\s+([\w$]+)", text)
        if len(entries) != 1:
            raise NotImplementedError(f"expected exactly one .entry, found {entries}")
        if re.search(r"^\s*(\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
            raise NotImplementedError(".func (device function calls)")
        self.name: str = entries[0]
        self.files = {int(a): b for a, b in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
        self.params: list[tuple[str, str]] = []  # name, type
        self.param_addr: dict[str, int] = {}
        self.param_bytes = 0
        self.regs: dict[str, int] = {}  # name -> bits
        self.raw: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.branch_tables: dict[str, list[str]] = {}
        # Variables: name -> address, and the space that each state space takes.
        self.shared: dict[str, int] = {}
        self.shared_static = 0
        self.extern_shared: str | None = None
        self.local: dict[str, int] = {}
        self.local_size = 0
        self.globals: dict[str, int] = {}
        self.gimage = bytearray()  # initial contents of the .global and .const variables
        self._renamed = 0

        head, rest = text[: text.index(".entry")], text[text.index(".entry") :]
        m = re.match(r"\.entry\s+[\w$]+\s*\(", rest)
        close = 0
        if m:
            close = rest.index(")", m.end())
            self._parameters(rest[m.end() : close])
        for declaration in re.sub(r"//[^\n]*", "", head).split(";"):
            self._variable(declaration.strip())
        body = rest.index("{", close)
        self._body(rest[body + 1 :], text[: len(head) + body + 1].count("\n") + 1)

    def _parameters(self, text: str) -> None:
        for p in text.split(","):
            m = _PARAMETER.match(p)
            if not m:
                if p.strip():
                    raise NotImplementedError(f"parameter declaration {p.strip()!r}")
                continue
            if m.group(4):
                raise NotImplementedError(f"array parameter {p.strip()!r} (e.g. a TMA descriptor)")
            ty, name = m.group(1), m.group(3)
            self.params.append((name, ty))
            size = BITS[ty] // 8
            offset = -(-self.param_bytes // size) * size
            self.param_addr[name] = PARAM_BASE + offset
            self.param_bytes = offset + size

    def _variable(self, s: str) -> None:
        m = _VARIABLE.search(s)
        if not m:
            return
        linkage, space, alignment, ty, name, dim, init = m.groups()
        size = BITS[ty] // 8
        align = max(int(alignment.split()[1]) if alignment.strip() else 1, size)
        n = None if dim is None else dim.strip("[] \n")
        nbytes = size if n is None else (int(n) * size if n else 0)
        if space == "shared":
            if "extern" in linkage or nbytes == 0:
                self.extern_shared = name
            else:
                self.shared_static = -(-self.shared_static // align) * align
                self.shared[name] = self.shared_static
                self.shared_static += nbytes
        elif space == "local":
            self.local_size = -(-self.local_size // align) * align
            self.local[name] = self.local_size
            self.local_size += nbytes
        else:
            self.gimage += bytes(-len(self.gimage) % max(align, 16))
            self.globals[name] = GBASE + REDZONE + len(self.gimage)
            data = bytearray(nbytes)
            if init:
                values = [int(v.rstrip("U"), 0) for v in re.findall(r"-?0x[0-9a-fA-F]+U?|-?\d+U?", init)]
                for i, v in enumerate(values):
                    data[i * size : (i + 1) * size] = (v & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            self.gimage += data

    def _body(self, text: str, line: int) -> None:
        """Statements by ";", scopes by "{" and "}" (inline assembly), labels by ":"."""
        scopes: list[dict[str, Any]] = [{}]
        cur, loc, start = "", None, line
        for ln in text.split("\n"):
            code = ln.split("//")[0] if '"' not in ln else re.sub(r"//.*", "", ln)
            m = _LOC.match(code)
            if m:
                loc = (int(m.group(1)), int(m.group(2)))
                line += 1
                continue
            # Nearly every line is one statement; any other line is read character by character.
            m = None if cur.strip() else _ONE_STATEMENT.match(code)
            if m:
                self._statement(m.group(1), line, loc, scopes)
                cur = ""
                line += 1
                continue
            for ch in code + "\n":
                blank = not cur.strip()
                if blank and ch in "{}":
                    cur = ""
                    if ch == "{":
                        scopes.append({})
                    elif len(scopes) == 1:
                        return
                    else:
                        scopes.pop()
                elif ch == ";":
                    self._statement(cur.strip(), start, loc, scopes)
                    cur = ""
                elif ch == ":" and re.fullmatch(r"\s*[\w$]+", cur):
                    self._label(cur.strip(), scopes)
                    cur = ""
                else:
                    if blank and not ch.isspace():
                        start = line
                    cur += ch
            line += 1

    def _label(self, name: str, scopes: list[dict[str, Any]]) -> None:
        labels = scopes[-1].setdefault(LABELS, {})
        if len(scopes) > 1:  # local to an inline-assembly block
            self._renamed += 1
            labels[name] = name = f"{name}@{self._renamed}"
        self.labels[name] = len(self.raw)

    def _statement(self, s: str, line: int, loc: tuple[int, int] | None, scopes: list[dict[str, Any]]) -> None:
        if not s or s.startswith((".pragma", ".section", ".loc ", ".loc\t", ".param")):
            return
        if s.startswith(".reg"):
            self._registers(s, scopes)
            return
        if s.startswith((".shared", ".local", ".global", ".const")):
            self._variable(s)
            return
        m = re.match(r"([\w$]+)\s*:\s*\.branchtargets\s+(.*)$", s, re.S)
        if m or s.startswith(".branchtargets"):
            targets = split_operands(m.group(2) if m else s.split(None, 1)[1])
            name = m.group(1) if m else [k for k, v in self.labels.items() if v == len(self.raw)][-1]
            self.branch_tables[name] = targets
            return
        if s.startswith("."):
            raise NotImplementedError(f"PTX line {line}: directive {s!r}")
        where = f"{self.files.get(loc[0], '?').rsplit('/', 1)[-1]}:{loc[1]}" if loc else None
        self._instruction(s, Instruction(line, where, " ".join(s.split())), scopes)

    def _registers(self, s: str, scopes: list[dict[str, Any]]) -> None:
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", s, re.S)
        bits = BITS[m.group(1)]
        for declared in split_operands(m.group(2)):
            k = re.match(r"([%\w$]+)<(\d+)>$", declared)
            for name in [k.group(1) + str(i) for i in range(int(k.group(2)))] if k else [declared]:
                if len(scopes) == 1:
                    self.regs[name] = bits
                else:
                    self._renamed += 1
                    scopes[-1][name] = unique = f"{name}@{self._renamed}"
                    self.regs[unique] = bits

    def _instruction(self, s: str, ins: Instruction, scopes: list[dict[str, Any]]) -> None:
        if len(scopes) == 1:
            ins.scope = scopes[0]
        else:
            ins.scope = {name: unique for scope in scopes for name, unique in scope.items()}
        # The block's own table, not a copy, because a branch may come before its label.
        ins.scope[LABELS] = scopes[-1].setdefault(LABELS, {})
        m = _GUARDED.match(s) if s.startswith("@") else None
        if m:
            ins.guard_negated, ins.guard, s = bool(m.group(1)), m.group(2), m.group(3)
        m = _OPCODE.match(s)
        ins.op, *ins.mods = m.group(1).split(".")
        ins.ops = split_operands(m.group(2))
        ins.pc = len(self.raw)
        self.raw.append(ins)
