"""The counts of a launch: its programs, their sections, and how often each loop of the machine code runs.

The loops are those of the machine code in the order of their addresses. A loop with matrix instructions is a product's.
Its passes follow from the launch's sizes and tile, and so do those of the other loops that the kernels have.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tests.compile.machine_code import resources
from tests.ptxsim import Launch

from ..occupancy import occupancy
from .constants import Chip
from .gcn import decode_gcn
from .model import Kernel, Path, Section
from .sass import Instruction, Loop, decode, loops
from .walk import demand, walk

__all__ = ["counted"]


@dataclass(frozen=True)
class _Step:
    """One loop: what it is, how often the source passes it, and bytes that one such pass loads (0: not unrolled)."""

    name: str
    passes: float
    loads: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Programs that run the loops ``first`` to ``last`` - 1 of ``steps``."""

    name: str
    programs: int
    first: int
    steps: tuple[_Step | None, ...]  # None: these programs skip the loop


def counted(launch: Launch, chip: Chip, hits: float, hbm_bytes: float) -> Kernel:
    """The counts of a launch.

    Args:
        launch: recorded on a simulated GPU that assembles.
        chip: the GPU, of the launch's target.
        hits: the share of the bytes that is in the L2 cache.
        hbm_bytes: bytes from and to device memory.
    """
    needs = resources(launch)
    resident = occupancy(chip.target, needs.registers, needs.shared, launch.num_warps).programs
    code = _code(launch)
    found = loops(code)
    groups, note = _groups(launch, found)
    latency = hits * chip.l2_latency + (1 - hits) * chip.hbm_latency
    stages = max(1, launch.num_stages - 1)

    def section(name: str, part: Sequence[Instruction], passes: float = 1.0) -> Section:
        return Section(name, walk(part, launch.num_warps, chip), demand(part, launch.num_warps, chip), passes)

    def looped(step: _Step, loop: Loop) -> Section:
        unrolled = 1
        if step.loads and loop.loaded:
            unrolled = max(1, round(chip.lanes * launch.num_warps * loop.loaded / step.loads))
        once = walk(loop.body, launch.num_warps, chip, again=True)
        if any(i.name == "LDGSTS" for i in loop.body):
            once = max(once, latency / stages)  # what a step waits for was loaded ``stages`` steps before
        needs = demand(loop.body, launch.num_warps, chip)
        if any(i.name.startswith("UTMALDG") for i in loop.body):  # whole blocks, whose sizes are not in the code
            once = max(once, latency / stages)
            needs = replace(needs, loaded=needs.loaded + step.loads, shared=needs.shared + step.loads / 128)
        return Section(step.name, once, needs, math.ceil(step.passes / unrolled))

    parts = _parts(code, found)
    paths = []
    for group in groups:
        first, last = group.first, group.first + len(group.steps)
        begin = section("begin", parts[first] if first == 0 else _halves(parts[first])[1])
        if any(i.name == "LDGSTS" for loop in found[first:last] for i in loop.body):
            # The blocks that the code before a pipelined loop loads are counted as the loop's.
            begin = replace(begin, demand=replace(begin.demand, loaded=0.0))
        # The first block of operands comes from the cache or from memory.
        sections = [begin, Section("first load", latency)]
        for i, step in enumerate(group.steps, first):
            if step is not None:
                sections.append(looped(step, found[i]))
            if i + 1 < last:
                sections.append(section("middle", parts[i + 1]))
        sections.append(section("end", parts[last] if last == len(found) else _halves(parts[last])[0]))
        paths.append(Path(group.programs, tuple(sections), group.name))
    tf32 = any(i.name.endswith("MMA") and "TF32" in i.modifiers for i in code)
    return Kernel(launch.name, tuple(paths), resident, hbm_bytes, launch.num_warps, tf32, note)


def _code(launch: Launch) -> list[Instruction]:
    if "amdgcn" in launch.asm:
        return decode_gcn(str(launch.asm["amdgcn"]))
    target = re.search(r"^\.target sm_(\w+)", str(launch.asm["ptx"]), re.MULTILINE)
    assert target is not None, "PTX names no target"
    cubin = launch.asm["cubin"]
    assert isinstance(cubin, bytes)
    return decode(cubin, target[1])


def _parts(code: Sequence[Instruction], found: Sequence[Loop]) -> list[list[Instruction]]:
    """The code before the first loop, between loops, and after the last one."""
    inside = {i.address for loop in found for i in loop.body}
    begins = [loop.begin for loop in found]
    parts: list[list[Instruction]] = [[] for _ in range(len(found) + 1)]
    for i in code:
        if i.address not in inside:
            parts[bisect_right(begins, i.address)].append(i)
    return parts


def _halves(part: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """The code up to the last unconditional jump or exit, which ends one branch of the program, and the rest."""
    jumps = [k for k, i in enumerate(part) if i.leaves]
    cut = jumps[-1] + 1 if jumps else len(part) // 2
    return part[:cut], part[cut:]


def _groups(launch: Launch, found: Sequence[Loop]) -> tuple[list[_Group], str]:
    a = launch.arguments
    plan = _PLANS.get(launch.name)
    if plan is None:
        steps = tuple(_Step(f"loop {i}", 1.0) for i in range(len(found)))
        return [_Group("", math.prod(launch.grid), 0, steps)], "the passes of its loops are not known" if found else ""
    return plan(launch, a, found)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _labelled(found: Sequence[Loop], products: Sequence[_Step]) -> tuple[tuple[_Step | None, ...], str]:
    """The steps of the loops of a kernel whose loops are those of products, one after the other."""
    left, steps, unknown = list(products), [], 0
    for loop in found:
        if loop.products and left:
            steps.append(left.pop(0))
        else:
            steps.append(_Step("unknown loop", 1.0))
            unknown += 1
    missing = [step.name for step in left if step.passes > 1]
    notes = [f"{unknown} loops of unknown length"] if unknown else []
    return tuple(steps), "; ".join([*notes, *(f"no loop of {name} found" for name in missing)])


def _forward(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    m, n, k = (launch.constexprs[f"BLOCK_{x}"] for x in "MNK")
    loads = (a["x_ptr"].element_size() * m + a["w_ptr"].element_size() * n) * k
    steps, note = _labelled(found, [_Step("products", _cdiv(a["K"], k), loads)])
    return [_Group("", math.prod(launch.grid), 0, steps)], note


def _dgrad(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    m, n, k = (launch.constexprs[f"BLOCK_{x}"] for x in "MNK")
    steps, note = _labelled(found, [_Step("products", _cdiv(a["N"], n), a["dz_ptr"].element_size() * (m + k) * n)])
    return [_Group("", math.prod(launch.grid), 0, steps)], note


def _head(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    c, item = launch.constexprs, a["w_ptr"].element_size()
    depth = c["SLICES"] * c["DEPTH"]
    z = _Step("Z", _cdiv(a["K"], depth), a["h_ptr"].element_size() * c["BLOCK_M"] * depth + item * c["BLOCK_C"] * depth)
    below = _Step("dZ below", _cdiv(a["K"], c["SPLITS"] * c["COLS"]))
    steps, note = _labelled(found, [z, below] if a["dz_prev_ptr"] is not None else [z])
    return [_Group("", math.prod(launch.grid), 0, steps)], note


def _wgrad(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    rows = _cdiv(a["N"], launch.constexprs["BLOCK_N"])
    columns = _cdiv(a["K"], launch.constexprs["BLOCK_K"])
    samples = min(a["M"], a["m_per_split"])
    layer = _layer("", found, 0, len(found), a["dz_ptr"], a["x_ptr"], samples, launch)
    bias = _with_bias(layer, rows * launch.grid[1], (columns - 1) * rows * launch.grid[1])
    return bias, ""


def _with_sums(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    """The update whose first programs add the loss and the rows of sums for the biases, each in a loop of its own."""
    c, splits = launch.constexprs, launch.grid[1]
    samples = min(a["M"], a["m_per_split"])
    products = [i for i, loop in enumerate(found) if loop.products]
    others = [i for i, loop in enumerate(found) if not loop.products]
    rows, block = max(1, c["BLOCK_M"] * c["BLOCK_N"] // c["SUM_COLS"]), c["LOSS_BLOCK"]
    longest = max(of.rows for of in a["sums"])
    db = _Step("db", _cdiv(_cdiv(longest, splits), rows), 4 * rows * c["SUM_COLS"])
    sides = [("db", a["sum_programs"] * splits, db)] if a["sum_programs"] else []
    if a["loss_ptr"] is not None:
        sides.append(("loss", 1, _Step("mean loss", _cdiv(a["loss_count"], block), 4 * block)))
    # The loss and db have the first programs, and the last loops of the code.
    groups = [
        _Group(name, programs, i, (step,))
        for i, (name, programs, step) in reversed([*zip(others, sides, strict=False)])
    ]
    # With two loops of products the first layer has one of its own.
    members = [[0], list(range(1, len(a["layers"])))] if len(products) > 1 else [list(range(len(a["layers"])))]
    for loop, layers in zip(products, members, strict=False):
        of = a["operands"][layers[0]]
        tiles = sum(_cdiv(a["layers"][i].N, c["BLOCK_N"]) * _cdiv(a["layers"][i].K, c["BLOCK_K"]) for i in layers)
        name = "all layers" if len(members) == 1 else "first layer" if layers == [0] else "other layers"
        layer = _layer(name, found, loop, loop + 1, of.dz_ptr, of.x_ptr, samples, launch)
        groups.append(replace(layer, programs=tiles * splits))
    wrong = len(products) != len(members) or len(others) != len(sides)
    return groups, f"{len(products)} loops of products and {len(others)} others" if wrong else ""


def _wgrad_update(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    if "sums" in a:
        return _with_sums(launch, a, found)
    c, splits = launch.constexprs, launch.grid[1]
    products = [i for i, loop in enumerate(found) if loop.products]
    end = len(found)
    if a["loss_ptr"] is not None and found and not found[-1].products:
        end -= 1
    samples = min(a["M"], a["m_per_split"])
    groups: list[_Group] = []
    # All layers but the first share a copy of the code; without a loop in the code its steps are counted as one.
    borders = [0, *products[1:2], end] if len(products) > 1 else [0, end]
    for index, (first, last) in enumerate(pairwise(borders)):
        members = [index] if index == 0 and len(borders) > 2 else list(range(index, len(a["layers"])))
        of = a["operands"][members[0]]
        name = "first layer" if index == 0 else "other layers"
        layer = _layer(name, found, first, last, of.dz_ptr, of.x_ptr, samples, launch)
        rows = [_cdiv(a["layers"][i].N, c["BLOCK_N"]) for i in members]
        columns = [_cdiv(a["layers"][i].K, c["BLOCK_K"]) for i in members]
        every = sum(r * k for r, k in zip(rows, columns, strict=True))
        groups += _with_bias(layer, sum(rows) * splits, (every - sum(rows)) * splits)
    if end < len(found):
        block = c["LOSS_BLOCK"]
        loss = _Step("mean loss", _cdiv(a["loss_count"], block), 4 * block)
        groups.append(_Group("loss", 1, end, (loss,)))
    note = "" if len(products) == min(2, len(a["layers"])) else f"{len(products)} loops of products"
    return groups, note


def _layer(
    name: str, found: Sequence[Loop], first: int, last: int, dz: Any, x: Any, samples: int, launch: Launch
) -> _Group:
    """The loops of one copy of a weight gradient: its product, then what sums dZ for the bias."""
    c = launch.constexprs
    item, steps = dz.element_size(), _cdiv(samples, c["BLOCK_M"])
    product = _Step("products", steps, (item * c["BLOCK_N"] + x.element_size() * c["BLOCK_K"]) * c["BLOCK_M"])
    bias = _Step("db", steps, item * c["BLOCK_N"] * c["BLOCK_M"])
    return _Group(name, 0, first, tuple(product if loop.products else bias for loop in found[first:last]))


def _with_bias(layer: _Group, with_bias: int, without: int) -> list[_Group]:
    """The programs of the first column of tiles, which also sum dZ, and the others."""
    if not any(step is not None and step.name == "db" for step in layer.steps):
        return [_Group(layer.name, with_bias + without, layer.first, layer.steps)]
    rest = tuple(None if step is not None and step.name == "db" else step for step in layer.steps)
    groups = [_Group(f"{layer.name} with db".strip(), with_bias, layer.first, layer.steps)]
    return [*groups, _Group(layer.name, without, layer.first, rest)] if without else groups


def _reduce_update(launch: Launch, a: dict[str, Any], found: Sequence[Loop]) -> tuple[list[_Group], str]:
    steps = tuple(_Step("sum of slices", max(1, a["n_splits"] - 1), 4 * launch.constexprs["BLOCK"]) for _ in found)
    return [_Group("", math.prod(launch.grid), 0, steps)], ""


_PLANS = {
    "_linear_fwd_kernel": _forward,
    "_linear_dgrad_kernel": _dgrad,
    "_linear_wgrad_kernel": _wgrad,
    "_wgrad_update_kernel": _wgrad_update,
    "_head_kernel": _head,
    "_reduce_update_kernel": _reduce_update,
    "_wgrad_reduce_kernel": _reduce_update,
}
