"""The loops of machine code, found by its branches.

A loop is a strongly connected set of blocks of instructions. Where a loop is entered, its first block is cut away; what
is then still connected is a loop inside. The order of the addresses does not matter, so a wait that the compiler puts
behind the end of the kernel still belongs to the loop that waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Instruction", "loops"]


class Instruction(NamedTuple):
    """One machine instruction as far as the control flow needs it.

    Attributes:
        place: its address; places grow from one instruction to the next.
        name: its mnemonic with modifiers.
        target: the place to which it branches, None for all other instructions.
        ends: whether the next instruction never follows, as after an unconditional branch or the end of the program.
    """

    place: int
    name: str
    target: int | None = None
    ends: bool = False


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop, outer loops before the loops inside them.

    Args:
        code: the instructions of one kernel in the order of their places.
    """
    blocks = _blocks(code)
    return [
        [instruction for block in sorted(members) for instruction in blocks[block]]
        for members in _nest(set(blocks), _successors(blocks))
    ]


def _blocks(code: Sequence[Instruction]) -> dict[int, list[Instruction]]:
    """The pieces without a branch inside, by their first place."""
    targets = {instruction.target for instruction in code}
    found: dict[int, list[Instruction]] = {}
    begins = True
    for instruction in code:
        if begins or instruction.place in targets:
            block = found[instruction.place] = []
        block.append(instruction)
        begins = instruction.target is not None or instruction.ends
    return found


def _successors(blocks: dict[int, list[Instruction]]) -> dict[int, list[int]]:
    starts = list(blocks)
    follows = {}
    for i, (start, block) in enumerate(blocks.items()):
        last = block[-1]
        after = [] if last.ends else starts[i + 1 : i + 2]
        follows[start] = after + [target for target in (last.target,) if target in blocks]
    return follows


def _nest(blocks: set[int], follows: dict[int, list[int]]) -> Iterable[set[int]]:
    """Loops among ``blocks``, each followed by the loops inside it."""
    for members in _connected(blocks, follows):
        yield members
        entered = {b for start, after in follows.items() if start not in members for b in after} & members
        yield from _nest(members - (entered or {min(members)}), follows)


def _connected(blocks: set[int], follows: dict[int, list[int]]) -> Iterable[set[int]]:
    """The sets of blocks from which each block of the set can be reached (Tarjan's algorithm, without recursion)."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    path: list[int] = []
    done: set[int] = set()
    for root in sorted(blocks):
        work = [] if root in number else [(root, iter(follows[root]))]
        while work:
            block, after = work[-1]
            if block not in number:
                number[block] = lowest[block] = len(number)
                path.append(block)
            for other in after:
                if other not in blocks:
                    continue
                if other not in number:
                    work.append((other, iter(follows[other])))
                    break
                if other not in done:
                    lowest[block] = min(lowest[block], number[other])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[block])
                if lowest[block] == number[block]:
                    members = set(path[path.index(block) :])
                    del path[path.index(block) :]
                    done |= members
                    if len(members) > 1 or block in follows[block]:
                        yield members
