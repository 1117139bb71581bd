"""The main loops of a matrix product: what one step of the reduction computes, converts, waits for and loads.

Triton's last block-level form (TTGIR) has the loops with their products, layouts and loads; ``block_form`` reads them.
The machine code has the instructions of the same loops, in the same order; ``machine_code`` reads them. The number of
matrix instructions times the products of one instruction is compared with the products that a step needs. The layouts
in TTGIR say the same a second time. A compiler that unrolls a loop repeats every instruction, so the machine code may
have a multiple of what the layouts say.

``main_loops(launch)`` needs nothing but a launch that was assembled on a simulated GPU:

    with SimulatedGPU(("cuda", 90), execute=False, assemble=True) as gpu:
        linear_fwd(x, w, b, "sigmoid")
    print(*main_loops(gpu.launches[0]), sep="\\n")
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.ptxsim import Launch

from .block_form import BlockLoop, block_loops
from .machine_code import instructions

__all__ = ["MainLoop", "main_loops"]


@dataclass(frozen=True)
class MainLoop:
    """One loop that multiplies matrices; all numbers are those of one program and one step.

    Attributes:
        block: the loop in TTGIR, with layouts, conversions and loads.
        machine: number of machine instructions by mnemonic with modifiers, of all steps of one round.
        needed: products that the result needs, three times as many for "tf32x3".
        computed: products of all matrix instructions of all warps.
        steps: steps that one round of the machine code has, more than one where the compiler unrolled the loop.
    """

    block: BlockLoop
    machine: dict[str, int]
    needed: int
    computed: int
    steps: int

    @property
    def matrix(self) -> dict[str, int]:
        """The matrix instructions of one round by name."""
        return {name: n for name, n in self.machine.items() if _products(name, self.block) is not None}

    @property
    def barriers(self) -> int:
        """Barriers of the whole program in one step; waits for a matrix unit or a copy are none."""
        return sum(n for name, n in self.machine.items() if _BARRIER.match(name)) // self.steps

    @property
    def accumulates(self) -> bool:
        """Whether a sum goes from step to step. A loop over pieces of the result finishes one piece per step."""
        return self.block.accumulates

    def __str__(self) -> str:
        matrix = ", ".join(f"{n} {name}" for name, n in sorted(self.matrix.items()))
        unrolled = f", {self.steps} steps per round" if self.steps > 1 else ""
        return (
            f"{matrix}{unrolled}: {self.computed / self.needed:.3g} times the products needed; "
            f"barriers: {self.barriers}; "
            f"conversions: {', '.join(self.block.conversions) or 'none'}; "
            f"accumulators through shared memory: {', '.join(self.block.moved_accumulators) or 'none'}"
        )


def main_loops(launch: Launch) -> list[MainLoop]:
    """The main loops of a launch, in the order of the code; none where products do not run on matrix units.

    Raises:
        ValueError: TTGIR and machine code have different numbers of loops with products.
    """
    found = instructions(launch).main_loops
    if not found:
        return []
    blocks = [loop for loop in block_loops(str(launch.asm["ttgir"])) if loop.products]
    if len(blocks) != len(found):
        raise ValueError(
            f"{launch.name} has {len(blocks)} loops with products in TTGIR and {len(found)} in machine code"
        )
    terms = 3 if str(launch.constexprs.get("INPUT_PRECISION", "")).startswith("tf32x3") else 1
    return [_joined(block, code, launch, terms) for block, code in zip(blocks, found, strict=True)]


def _joined(block: BlockLoop, code: dict[str, int], launch: Launch, terms: int) -> MainLoop:
    needed = terms * block.needed
    computed = sum(n * (_products(name, block) or 0) for name, n in code.items()) * _issues(code, launch)
    layouts = sum(product.computed for product in block.products)
    # Layouts that are not read give 0; the machine code then has to agree with the arithmetic by itself.
    steps = computed // layouts if layouts and computed and computed % layouts == 0 else 1
    return MainLoop(block, code, needed, computed // steps, steps)


def _issues(code: dict[str, int], launch: Launch) -> int:
    """How many times a program issues each of its matrix instructions: once, per warpgroup or per warp."""
    if any(name.startswith("UTC") for name in code):
        return 1
    return launch.num_warps // 4 if any(name.startswith("HGMMA") for name in code) else launch.num_warps


_BARRIER = re.compile(r"BAR\.|s_barrier")
_SHAPES = (
    re.compile(r"HMMA\.(16)(8)(\d+)"),
    re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)"),
    re.compile(r"v_(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)"),
)


def _products(name: str, block: BlockLoop) -> int | None:
    """The products of one matrix instruction; None for any other instruction."""
    for shape in _SHAPES:
        if found := shape.match(name):
            m, n, k = map(int, found.groups())
            return m * n * k
    # The instruction of tcgen05 has its shape in a register.
    return block.tcgen05_products if re.match(r"UTC\w*MMA", name) else None


def report(launches: list[Launch]) -> Iterator[str]:
    """A line per main loop of the launches, for looking at them."""
    for launch in launches:
        for loop in main_loops(launch):
            yield f"{launch.name}: {loop}"
