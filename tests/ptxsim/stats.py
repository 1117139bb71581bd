"""Dynamic counts of a launch: instructions by class, memory traffic, bank conflicts, arithmetic."""

from __future__ import annotations

import collections
import re

import numpy as np

from .parser import Instruction

_OWN_CLASS = {"mma", "ldmatrix", "stmatrix", "shfl", "bar", "cvt", "setp", "selp", "vote", "redux", "mov", "bra"}
_SLOW = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div", "rem"}
_FLOAT = {"fma", "mul", "add", "sub", "min", "max", "abs", "neg"}
_ARITHMETIC = {"add", "sub", "mul", "mad", "addc", "subc", "madc", "mul24", "sad", "dp4a", "min", "max", "abs", "neg"}
_BITS = {"and", "or", "xor", "not", "cnot", "shl", "shr", "shf", "lop3", "prmt"}
_BIT_FIELDS = {"bfe", "bfi", "popc", "clz", "brev", "bfind"}
_INTEGER = _ARITHMETIC | _BITS | _BIT_FIELDS
_SPACES = ("global", "shared", "local", "param", "const")
_OTHER_NAMES = {"barrier": "bar", "membar": "fence", "fence": "fence", "ret": "exit", "exit": "exit"}


def instruction_class(op: str, mods: list[str]) -> str:
    """The class an instruction is counted under, e.g. "ld.global", "fp", "mma"."""
    if op in ("ld", "st", "atom", "red"):
        spaces = (m.split("::")[0] for m in mods)
        return ("atom." if op in ("atom", "red") else op + ".") + next((s for s in spaces if s in _SPACES), "generic")
    if op == "cp":
        return "cp.async" if len(mods) > 2 else "cp.async.ctl"
    if op in _OWN_CLASS:
        return op
    if op in _OTHER_NAMES:
        return _OTHER_NAMES[op]
    if op in _SLOW:
        return "sfu/div"
    last = mods[-1] if mods else ""
    if op in _FLOAT and re.match(r"b?f\d", last):
        return "fp"
    if op in _INTEGER:
        return "pred" if last == "pred" else "int"
    return "other"


class Stats:
    """Dynamic counts of one launch. Instruction counts are per warp (warps that issue it).

    `global_load`, `global_store` and `async_copy` have requests, sectors (of 32 bytes), min_sectors (the fewest sectors
    for the same bytes, request by request) and bytes. `shared_load` and `shared_store` have requests, wavefronts and
    conflicts (wavefronts beyond the necessary). `hot_global` and `hot_shared` list (wasted sectors or wavefronts, PTX
    line, source line, instruction), worst first. `written` has, for each argument that was stored to, which of its
    bytes were written; it is empty without `global_races`, which watches the stores.
    """

    FIELDS = ("requests", "sectors", "min_sectors", "bytes")
    SHARED_FIELDS = ("requests", "wavefronts", "conflicts")

    def __init__(self) -> None:
        self.by_class: collections.Counter[str] = collections.Counter()
        self.by_opcode: collections.Counter[str] = collections.Counter()
        self.warp_instructions = 0
        self.global_load = dict.fromkeys(self.FIELDS, 0)
        self.global_store = dict.fromkeys(self.FIELDS, 0)
        self.async_copy = dict.fromkeys(self.FIELDS, 0)
        self.shared_load = dict.fromkeys(self.SHARED_FIELDS, 0)
        self.shared_store = dict.fromkeys(self.SHARED_FIELDS, 0)
        self.atomics = self.barriers = 0
        self.mma_flops = self.fma_flops = 0
        self.ctas = self.steps = 0
        self.uninit_reads = 0
        self.written: dict[str, np.ndarray] = {}
        self.seconds = 0.0
        self.hot_global: list[tuple[int, int, str | None, str]] = []
        self.hot_shared: list[tuple[int, int, str | None, str]] = []

    @property
    def load_efficiency(self) -> float:
        """Minimal sectors divided by actual sectors of all global reads, asynchronous copies included."""
        a, b = self.global_load, self.async_copy
        return (a["min_sectors"] + b["min_sectors"]) / max(1, a["sectors"] + b["sectors"])

    @property
    def store_efficiency(self) -> float:
        """Minimal sectors divided by actual sectors of all global writes."""
        return self.global_store["min_sectors"] / max(1, self.global_store["sectors"])

    def collect(self, code: list[Instruction]) -> None:
        """Add up the counts that the instructions hold."""
        for ins in code:
            if not ins.count:
                continue
            self.warp_instructions += ins.count
            self.by_class[ins.cls] += ins.count
            self.by_opcode[ins.opcode] += ins.count
            self.mma_flops += ins.mma * ins.count
            if ins.op == "fma":
                lanes = 32 if ins.mods and ins.mods[-1] in ("f32", "f64", "f16", "bf16") else 64  # else packed
                self.fma_flops += 2 * lanes * ins.count
            if ins.global_counts is not None:
                d = {"cp": self.async_copy, "ld": self.global_load}.get(ins.op, self.global_store)
                for k, v in zip(self.FIELDS, ins.global_counts, strict=True):
                    d[k] += v
                waste = ins.global_counts[1] - ins.global_counts[2]
                if waste > 0:
                    self.hot_global.append((waste, ins.line, ins.loc, ins.text))
            if ins.shared_counts is not None:
                d = self.shared_load if ins.op in ("ld", "ldmatrix") else self.shared_store
                for k, v in zip(self.SHARED_FIELDS, ins.shared_counts, strict=True):
                    d[k] += v
                if ins.shared_counts[2]:
                    self.hot_shared.append((ins.shared_counts[2], ins.line, ins.loc, ins.text))
        self.hot_global.sort(key=lambda x: -x[0])
        self.hot_shared.sort(key=lambda x: -x[0])

    def summary(self) -> str:
        """The counts in a few lines of text."""
        lines = [
            f"CTAs {self.ctas}, warp instructions {self.warp_instructions}, simulator steps {self.steps}, "
            f"{self.seconds:.2f} s",
            "by class: " + ", ".join(f"{k} {v}" for k, v in self.by_class.most_common()),
        ]
        for n in ("global_load", "async_copy", "global_store"):
            d = getattr(self, n)
            if d["requests"]:
                lines.append(
                    f"{n}: {d['requests']} requests, {d['bytes']} bytes, {d['sectors']} sectors "
                    f"(minimum {d['min_sectors']}, {100 * d['min_sectors'] / max(1, d['sectors']):.0f}%)"
                )
        for n in ("shared_load", "shared_store"):
            d = getattr(self, n)
            if d["requests"]:
                lines.append(
                    f"{n}: {d['requests']} requests, {d['wavefronts']} wavefronts, {d['conflicts']} from bank conflicts"
                )
        lines.append(
            f"mma flops {self.mma_flops}, fma flops {self.fma_flops}, barriers {self.barriers}, atomics {self.atomics}"
        )
        return "\n".join(lines)
