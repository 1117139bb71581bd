"""How the programs of a training step fill the multiprocessors, wave by wave.

A wave is as many programs as are resident at once. The launches are those that a ``TrainStep`` of the reference network
makes on the simulated GPU, with the registers and the shared memory of their machine code. Of the update's programs
those count that multiply. The others, for the bias gradients and the loss, begin first and are short.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import ceil, prod

import torch

import fastmlp
from bench.static.occupancy import occupancy
from bench.static.workloads import SIZES

from .limits import LimitException
from .machine_code import resources
from .targets import TARGETS

__all__ = ["BATCHES", "EXCEPTIONS", "LIMITS", "Waves", "step_waves", "violations"]

BATCHES = (64, 512, 4096, 16384, 65536)
#: Batches from which on a launch has enough work for every place of the device.
LARGE = 4096
LIMITS = {
    "last wave": "the last wave is less than two thirds full, and more than one twentieth of all places is empty",
    "one wave": "programs for less than two thirds of the places, at a batch that has work for all of them",
}
_FULL, _EMPTY = 2 / 3, 1 / 20


@dataclass(frozen=True)
class Waves:
    """One launch of a step.

    Attributes:
        name: target/dtype/batch/kernel, and the number of the kernel's launch where the step has several.
        programs: of the launch, as far as they count.
        multiprocessors: of the device.
        resident: programs that one multiprocessor holds at once.
    """

    name: str
    batch: int
    programs: int
    multiprocessors: int
    resident: int

    @property
    def count(self) -> float:
        """Waves, with a fraction for the last one."""
        return self.programs / self.places

    @property
    def places(self) -> int:
        """Programs of a full wave."""
        return self.multiprocessors * self.resident

    @property
    def last(self) -> float:
        """How full the last wave is.

        A launch of less than one wave is spread over the multiprocessors. It is full when all of them have as many
        programs as the busiest one, whatever room there is for more.
        """
        if self.programs <= self.places:
            return self.programs / (self.multiprocessors * ceil(self.programs / self.multiprocessors))
        return (self.programs % self.places or self.places) / self.places

    @property
    def empty(self) -> float:
        """The share of all places of all waves that stays empty."""
        return 1 - self.count / ceil(self.count)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.programs} programs on {self.multiprocessors} multiprocessors with "
            f"{self.resident} places each are {self.count:.2f} waves"
        )


EXCEPTIONS: tuple[LimitException, ...] = (
    LimitException(
        "last wave",
        "*/64/_head_kernel",
        "sm_90/float32/64/_head_kernel",
        "64 rows are four blocks of the smallest size, and eight programs share each by the columns of dZ below; more "
        "programs would each compute Z and the softmax anew",
    ),
    LimitException(
        "one wave",
        "*/_head_kernel",
        "sm_90/bfloat16/4096/_head_kernel",
        "nearly all multiprocessors have two programs; blocks are as small as matrix instructions allow at batch 4,096 "
        "and read W less often at 16,384",
    ),
    LimitException(
        "last wave",
        "*/bfloat16/65536/_head_kernel",
        "sm_90/bfloat16/65536/_head_kernel",
        "a multiprocessor takes a new block whenever it has finished one: every multiprocessor computes seven or eight "
        "of them, the average is 7.8",
    ),
    LimitException(
        "one wave",
        "*/_reduce_update_kernel",
        "sm_90/float32/65536/_reduce_update_kernel",
        "the number of parameters decides, not the batch; five programs for each multiprocessor of those that fit",
    ),
    LimitException(
        "one wave",
        "*/bfloat16/4096/_linear_*",
        "sm_90/bfloat16/4096/_linear_fwd_kernel",
        "a program of the largest tile that occupies the multiprocessors evenly is on each; tiles of half the size "
        "would fill both places and load half as much again",
    ),
)


@cache
def step_waves(target: str, dtype: torch.dtype, batch: int) -> tuple[Waves, ...]:
    """Every launch of one training step of the reference network."""
    device = TARGETS[target].device
    with TARGETS[target].simulated(assemble=True) as gpu, fastmlp.use_backend("triton"):
        step = fastmlp.TrainStep(fastmlp.MLP(SIZES), lr=0.1, dtype=dtype)
        x, y = torch.empty(batch, SIZES[0]), torch.zeros(batch, dtype=torch.int64)
        step(x, y)  # the first step may also write settings
        gpu.launches.clear()
        step(x, y)
    found: list[Waves] = []
    for launch in gpu.launches:
        needs = resources(launch)
        resident = occupancy(target, needs.registers, needs.shared, launch.num_warps).programs
        name = f"{target}/{str(dtype).removeprefix('torch.')}/{batch}/{launch.name}"
        before = sum(other.name.startswith(name) for other in found)
        name += f"/{before + 1}" if before else ""
        programs = launch.arguments.get("tiles", launch.grid[0]) * prod(launch.grid[1:])
        found.append(Waves(name, batch, programs, device.multiprocessors, resident))
    return tuple(found)


def violations(waves: Waves) -> set[str]:
    """The limits that a launch exceeds."""
    found = set()
    if waves.last < _FULL and (waves.programs <= waves.places or waves.empty > _EMPTY):
        found.add("last wave")
    if waves.batch >= LARGE and waves.count < _FULL:
        found.add("one wave")
    return found


def allowed(waves: Waves) -> set[str]:
    """The limits that a launch may exceed."""
    return {e.limit for e in EXCEPTIONS if fnmatchcase(waves.name, e.cases)}
