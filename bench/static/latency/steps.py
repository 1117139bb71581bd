"""The estimate of fastmlp's training step: its launches, recorded on the simulated GPU, through the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastmlp
from tests.compile.targets import TARGETS
from tests.ptxsim import Launch

from ..gpus import GPUS, MODES, total_roofline
from ..work import touched, work_of
from ..workloads import SIZES, float32_precision
from .cache import Touched, hit_shares
from .constants import Chip
from .counts import counted
from .model import Estimate, Kernel, estimate

__all__ = ["BATCHES", "LATENCY_MODES", "StepEstimate", "recorded", "step_estimate"]

BATCHES = (64, 512, 4096, 16384, 65536)
LATENCY_MODES = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class StepEstimate:
    """A step's kernels with their estimates, in order.

    Attributes:
        kernels: counts and estimate of each launch.
        floor: microseconds of the rooflines of all launches.
    """

    kernels: list[tuple[Kernel, Estimate]]
    floor: float

    @property
    def microseconds(self) -> float:
        """Microseconds of the whole step inside a graph."""
        return sum(e.microseconds for _, e in self.kernels)


def recorded(target: str, mode: str, batch: int, sizes: tuple[int, ...] = SIZES) -> list[Launch]:
    """The launches of one ``TrainStep(x, y)`` with plain SGD, with machine code."""
    dtype = getattr(torch, MODES[mode].dtype)
    gpu = TARGETS[target].simulated(assemble=True)
    with gpu, fastmlp.use_backend("triton"), float32_precision(mode):
        step = fastmlp.TrainStep(fastmlp.MLP(sizes), lr=0.1, dtype=dtype)
        x, y = torch.empty(batch, sizes[0], dtype=dtype), torch.zeros(batch, dtype=torch.int64)
        step(x, y)  # the first step also writes the learning rate
        before = len(gpu.launches)
        step(x, y)
    return gpu.launches[before:]


def step_estimate(launches: list[Launch], chip: Chip, mode: str) -> StepEstimate:
    """The model of these launches as one step."""
    tensors = [_touched(launch) for launch in launches]
    kernels = []
    for launch, share in zip(launches, hit_shares(tensors, chip.l2_usable), strict=True):
        work = work_of(launch)
        kernel = counted(launch, chip, share, work.bytes * (1 - share))
        kernels.append((kernel, estimate(kernel, chip)))
    floor = 1e6 * total_roofline((work_of(launch) for launch in launches), GPUS[chip.name], MODES[mode])
    return StepEstimate(kernels, floor)


def _touched(launch: Launch) -> Touched:
    return Touched({t.untyped_storage().data_ptr(): touched(t) for t in _tensors(launch.arguments.values())})


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
