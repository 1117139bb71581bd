"""The loops of Triton's last block-level form (TTGIR): their products, layouts, conversions and loads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import NamedTuple

__all__ = ["BlockLoop", "Operation", "Product", "block_loops"]

_LAYOUT = re.compile(r"^(#\w+) = (#.*)$", re.MULTILINE)
# `%a, %b:2 = ttg.convert_layout %x#1 {...} : type -> type loc(#loc5)`
_OPERATION = re.compile(r"^\s*(?:(%[^=]*?) = )?\"?([a-z_]+\.[a-z_0-9.]+)\"?(.*)$")
_NAME = re.compile(r"%[\w.$-]+")
_BLOCK_TYPE = re.compile(r"(?:tensor|!ttg\.memdesc)<((?:\d+x)+)([^<>,]*(?:<[^<>]*>)?)(?:, (#\w+))?")
_PRODUCTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
#: tcgen05 reads 32 bytes of each operand's row at a time, and at most 256 columns.
_TCGEN05_BYTES, _TCGEN05_COLS = 32, 256


class Operation(NamedTuple):
    """One line: its results, its name, its operands, the text behind the name, and its place in the source."""

    results: tuple[str, ...]
    name: str
    operands: tuple[str, ...]
    text: str
    location: str

    @property
    def types(self) -> list[tuple[tuple[int, ...], str, str]]:
        """(shape, item, layout) of the blocks among the types of operands and results."""
        signature = self.text.rpartition(" : ")[2]
        return [
            (tuple(int(n) for n in shape.split("x") if n), item, layout)
            for shape, item, layout in _BLOCK_TYPE.findall(signature)
        ]


class Product(NamedTuple):
    """One product of blocks: multiplications that it needs, and that all warps compute with its layouts (0: unread)."""

    needed: int
    computed: int


@dataclass(frozen=True)
class BlockLoop:
    """An ``scf.for``: its first line, the operations inside it, and the layouts of the kernel by name.

    ``branches`` has the conditions around the loop by number, each with the side on which the loop is.
    """

    head: str
    body: tuple[Operation, ...]
    layouts: dict[str, str]
    branches: dict[int, bool]

    @cached_property
    def _made_by(self) -> dict[str, Operation]:
        return {result: operation for operation in self.body for result in operation.results}

    @cached_property
    def _dots(self) -> list[Operation]:
        return [operation for operation in self.body if operation.name in _PRODUCTS]

    @cached_property
    def products(self) -> list[Product]:
        """The products of one round."""
        return [self._product(dot) for dot in self._dots]

    def _product(self, dot: Operation) -> Product:
        (a, _, _), *_, (result, _, layout) = dot.types[:3]
        needed = prod(result) * a[-1]
        if dot.name == "ttng.tc_gen5_mma":
            return Product(needed, needed)
        return Product(needed, _covered(result, self.layouts.get(layout, "")) * a[-1])

    def follows(self, other: BlockLoop) -> bool:
        """Whether one program can run both loops: no condition has them on different sides."""
        return all(other.branches.get(number, side) == side for number, side in self.branches.items())

    @property
    def tcgen05_products(self) -> int:
        """The multiplications of one instruction of tcgen05."""
        for dot in self._dots:
            if dot.name == "ttng.tc_gen5_mma":
                (_, item, _), _, (result, _, layout) = dot.types[:3]
                rows = int(re.findall(r"blockM = (\d+)", self.layouts[layout])[0])
                depth = _TCGEN05_BYTES * 8 // int(re.findall(r"\d+", item)[0])
                return rows * min(result[-1], _TCGEN05_COLS) * depth
        return 0

    @property
    def needed(self) -> int:
        """The multiplications that one round needs, for a single product of the operands as they are.

        A round reduces as much of the depth as the loop's step. A loop that adds nothing up multiplies its blocks.
        """
        step = re.search(r" step %c(\d+)_", self.head)
        if not self.accumulates or step is None:
            return max(product.needed for product in self.products)
        *_, (result, _, _) = self._dots[0].types[:3]
        return prod(result[-2:]) * int(step[1])

    @cached_property
    def accumulates(self) -> bool:
        """Whether a product is added to what the round before left."""
        for dot in self._dots:
            # operands of tcgen05: A, B, accumulator, whether to add to the accumulator
            if dot.name == "ttng.tc_gen5_mma" and dot.operands[3] != "%false":
                return True
        return bool(self._accumulators)

    @cached_property
    def _carried(self) -> set[str]:
        """The values that go from round to round."""
        return {argument for argument, _ in re.findall(r"(%[\w.$-]+) = (%[\w.$-]+)", self.head)}

    def _root(self, value: str) -> str:
        """The value that an accumulator begins with, seen through products, waits and conversions."""
        while value in self._made_by and self._made_by[value].operands:
            operation = self._made_by[value]
            value = operation.operands[2 if operation.name in _PRODUCTS else 0]
        return value

    @property
    def loads(self) -> list[Operation]:
        """The loads of blocks that the program waits for, and not those of single rows or columns."""
        return [
            o for o in self.body if o.name in ("tt.load", "amdg.buffer_load") and o.types and len(o.types[0][0]) > 1
        ]

    @property
    def conversions(self) -> list[str]:
        """Changes of layout that take the way through shared memory, e.g. "64x128xf32 #mma -> #mma1".

        An operand that was loaded into registers has to go through shared memory once. Its conversion is this one way,
        and counts only where the operand comes from shared memory already.
        """
        found = []
        for operation in self._moved("ttg.convert_layout"):
            if not self._comes_from(operation, ("tt.load", "amdg.buffer_load")):
                source, result = (_layout_of(block) for block in operation.text.rpartition(" : ")[2].split(" -> "))
                (shape, item, _), *_ = operation.types
                found.append(f"{'x'.join(map(str, shape))}x{item} {source} -> {result}")
        return found

    @property
    def moved_accumulators(self) -> list[str]:
        """The products, or what was made of them, that go through shared memory in the loop."""
        moved = self._moved("ttg.convert_layout", "ttg.local_store", "ttg.local_alloc")
        return [o.operands[0] for o in moved if self._comes_from(o, (*_PRODUCTS, "ttng.tmem_load"))]

    def _moved(self, *names: str) -> list[Operation]:
        """The operations of these names that put a value into shared memory."""
        return [o for o in self.body if o.name in names and o.operands and not _stays_in_registers(o, self.layouts)]

    def _comes_from(self, operation: Operation, sources: tuple[str, ...]) -> bool:
        """Whether an operand is the result of a source, or was made of it without a way through shared memory.

        The accumulators that the round before left are results of products.
        """
        seen: set[str] = set()
        names = list(operation.operands[:1])
        while names:
            name = names.pop()
            if name in self._accumulators and sources[0] in _PRODUCTS:
                return True
            if name in seen or name not in self._made_by:
                continue
            seen.add(name)
            made_by = self._made_by[name]
            if made_by.name in sources:
                return True
            if made_by.name not in ("ttg.local_load", "tt.load", "amdg.buffer_load"):
                names += made_by.operands
        return False

    @cached_property
    def _accumulators(self) -> set[str]:
        """The values to which products are added in the next round."""
        return {self._root(dot.operands[2]) for dot in self._dots} & self._carried


@lru_cache(maxsize=2)
def block_loops(ttgir: str) -> tuple[BlockLoop, ...]:
    """Every ``scf.for`` that has no other inside it, in the order of the text.

    Loops without products do not count as others inside a loop that has products.
    """
    layouts = dict(_LAYOUT.findall(ttgir))
    found: list[BlockLoop] = []
    open_loops: list[tuple[int, str, list[Operation]]] = []
    inner_products = 0  # of the loops inside the outermost one
    open_branches: list[tuple[int, int, bool]] = []
    for number, line in enumerate(ttgir.splitlines()):
        indent = len(line) - len(line.lstrip())
        if line.startswith("}", indent):
            if open_branches and indent == open_branches[-1][0]:
                _, condition, _ = open_branches.pop()
                if "} else {" in line:
                    open_branches.append((indent, condition, False))
            elif open_loops and indent == open_loops[-1][0]:
                _, head, body = open_loops.pop()
                products = sum(operation.name in _PRODUCTS for operation in body)
                inside = any(operation.name == "scf.for" for operation in body)
                if not inside or (products and not inner_products):
                    branches = {condition: side for _, condition, side in open_branches}
                    found.append(BlockLoop(head, tuple(body), layouts, branches))
                inner_products = inner_products + products if open_loops else 0
        elif " scf.if " in line:
            open_branches.append((indent, number, True))
        elif (open_loops or "scf.for " in line) and (operation := _operation(line)):
            for _, _, body in open_loops:
                body.append(operation)
            if operation.name == "scf.for":
                open_loops.append((indent, line, []))
    return tuple(found)


def _operation(line: str) -> Operation | None:
    match = _OPERATION.match(line)
    if match is None:
        return None
    results, name, rest = match.groups(default="")
    text, _, location = rest.partition(" loc(")
    operands = tuple(_NAME.findall(_outside_brackets(text.rpartition(" : ")[0])))
    return Operation(tuple(_NAME.findall(results)), name, operands, text, location.removesuffix(")"))


def _outside_brackets(text: str) -> str:
    return re.sub(r"\[[^\]]*\]|\{.*\}|\"[^\"]*\"", "", text)


def _layout_of(block: str) -> str:
    """The layout in `tensor<64x32xf32, #mma>`, shortened to the operand's number where a product reads the block."""
    layout = block.strip().removesuffix(">").partition(", ")[2]
    operand = re.match(r"#ttg\.dot_op<\{opIdx = (\d)", layout)
    return f"operand {operand[1]}" if operand else layout


def _stays_in_registers(operation: Operation, layouts: dict[str, str]) -> bool:
    """Whether a conversion moves nothing between warps.

    This is known of one conversion only, from the result of a product to the first operand of the next one in the same
    layout. Every other conversion counts as one through shared memory.
    """
    source, result = operation.text.rpartition(" : ")[2].split(" -> ")
    parent = re.search(r"#ttg\.dot_op<\{opIdx = 0, parent = (#\w+)", result)
    return parent is not None and source.endswith(f", {parent[1]}>") and "nvidia_mma" in layouts.get(parent[1], "")


def _covered(shape: tuple[int, ...], layout: str) -> int:
    """Elements of a block that the warps compute together, with repetition; 0 for layouts that are not known."""
    if "nvidia_mma" not in layout and "amd_mfma" not in layout:
        return 0
    # An instruction's shape is rows, columns, and for some units the depth. NVIDIA's warp-wide unit has batches too.
    tile = _numbers(layout, "instrShape")
    tile = tile[-2:] if "versionMajor = 2" in layout else tile[:2]
    units = [1] * (len(shape) - 2) + tile
    for key in ("warpsPerCTA", "tilesPerWarp"):
        units = [unit * n for unit, n in zip(units, _numbers(layout, key) or [1] * len(shape), strict=True)]
    return prod(ceil(size / unit) * unit for size, unit in zip(shape, units, strict=True))


def _numbers(layout: str, key: str) -> list[int]:
    found = re.search(rf"{key} = \[([\d, ]+)\]", layout)
    return [int(n) for n in found[1].split(",")] if found else []
