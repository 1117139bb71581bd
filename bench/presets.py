"""Presets: which problems are timed, by which contenders, in how many rounds.

- quick: the reference network at four batch sizes, one of each operation; under 2 minutes on 2 cores
- full: every optimizer and dtype, each operation at several shapes, every mode of torch.compile
- scaling: one training step against batch size, width and depth
- online: 60,000 samples one by one, in five stretches
- members: one step of 1 to 1,000 networks, in a loop and together
- shapes: steps of networks that people train with, small ones and small batches, with SGD and AdamW

On a GPU the presets also have epochs over data on the device, the whole step compiled and captured, and steps that
TrainKernel can take (relu, squared errors).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmlp.cpu import product_dtype

from .problems import (
    CrossEntropyProblem,
    EpochProblem,
    HeadProblem,
    LinearBackwardProblem,
    LinearProblem,
    MembersProblem,
    OnlineProblem,
    Problem,
    StepProblem,
    WgradProblem,
)

__all__ = ["NAMES", "REFERENCE", "Case", "Preset", "preset"]

#: The reference workload.
REFERENCE = (784, 512, 512, 10)

BATCHES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16)

NAMES = ("quick", "full", "scaling", "online", "members", "shapes")

#: Numbers of networks, and their shapes with batch sizes.
MEMBERS = (1, 4, 16, 64, 256, 1000)
MEMBER_SHAPES = (((4, 64, 64, 2), 64), ((54, 128, 128, 7), 256))
#: Numbers of networks for which a step is compiled anew, which takes longer than all its turns.
MEMBERS_COMPILED = (1, 16, 64, 1000)

#: Networks of the preset shapes with their batch sizes: reinforcement learning, tables, teaching, and the reference.
#: A single output is a regression.
SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 8, 1), (4,)),
    ((2, 16, 16, 1), (32,)),
    ((4, 64, 64, 2), (64,)),
    ((17, 64, 64, 6), (8,)),
    ((17, 256, 256, 6), (256,)),
    ((54, 256, 256, 256, 7), (256,)),
    ((32, 64, 64, 64, 3), (16_384,)),
    ((784, 128, 64, 10), (32,)),
    (REFERENCE, (1, 8, 64)),
)
#: A network so small that a step fits one kernel.
SMALL = (64, 64, 64, 10)

#: Contenders that take minutes to compile.
_TUNED = ("compile_reduce_overhead", "compile_max_autotune", "whole_max_autotune")
#: The contenders of the curves: the tutorial, the fastest of each kind, and fastmlp.
_CURVES = ("fastmlp", "eager", "eager_fused", "cuda_graph", "inplace", "jax", "compile_default")
#: With bfloat16 products; only one eager contender, because the largest batches take long.
_CURVES_HALF = ("fastmlp", "eager", "cuda_graph", "jax", "compile_default")
#: The contenders of the shapes: what users of a CPU choose from.
_SHAPES = ("fastmlp", "fastmlp_modules", "eager", "eager_fused", "cuda_graph", "compile_default", "jax")
_ONLINE = ("fastmlp", "eager", "cuda_graph", "inplace", "jax", "numpy")


@dataclass(frozen=True)
class Case:
    """A problem. ``axis`` and ``value`` are its place on a curve; ``leave_out`` names contenders that are not timed."""

    problem: Problem
    axis: str = ""
    value: int = 0
    leave_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Preset:
    """``rounds`` turns of every contender in every case."""

    name: str
    rounds: int
    cases: tuple[Case, ...]


def preset(name: str, device: str) -> Preset:
    """The preset of that name for a device; KeyError for an unknown name."""
    presets = {"quick": _quick, "full": _full, "scaling": _scaling, "online": _online, "members": _members}
    return (presets | {"shapes": _shapes})[name](device)


def _cases(problems: Iterable[Problem], leave_out: Iterable[str] = ()) -> tuple[Case, ...]:
    return tuple(Case(problem, leave_out=frozenset(leave_out)) for problem in problems)


def _halves(device: str) -> tuple[str, ...]:
    """The 16-bit dtypes whose products the device has; on a CPU without them a step of torch takes seconds."""
    if device.startswith("cuda"):
        return ("bfloat16", "float16")
    return ("bfloat16",) if product_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16 else ()


def _whole(device: str) -> tuple[str, ...]:
    """The whole step compiled: in every preset of a GPU, and in ``full`` of a CPU, which has no graph to capture."""
    return ("whole_default",) if device.startswith("cuda") else ()


def _with_options(batch: int, device: str) -> list[Problem]:
    """Steps of Adam with class weights, without and with dropout."""
    options: dict[str, Any] = {"optimizer": "adam", "weighs_classes": True, "device": device}
    return [StepProblem(REFERENCE, batch, "relu", dropout=dropout, **options) for dropout in (0.0, 0.2)]


def _of_a_gpu(squared: Sequence[tuple[tuple[int, ...], int]], batches: Sequence[int], device: str) -> list[Problem]:
    """Steps with squared errors of networks and batches, and epochs in batches of the reference network; GPUs only."""
    if not device.startswith("cuda"):
        return []
    steps = [StepProblem(sizes, batch, "relu", loss="mse", device=device) for sizes, batch in squared]
    # The gate takes the same steps in float64 on the CPU, which bounds their number.
    epochs = [EpochProblem(REFERENCE, batch, steps=min(64, 65_536 // batch), device=device) for batch in batches]
    return [*steps, *epochs]


def _quick(device: str) -> Preset:
    steps: list[Problem] = [StepProblem(REFERENCE, batch, device=device) for batch in (1, 64, 512, 4096)]
    steps += [StepProblem(REFERENCE, 4096, dtype=dtype, device=device) for dtype in _halves(device)[:1]]
    steps += _of_a_gpu([(SMALL, 1), (SMALL, 64)], [64], device)
    operations = [
        OnlineProblem(REFERENCE, samples=128, device=device),
        LinearProblem(64, 784, 512, device=device),
        LinearBackwardProblem(64, 784, 512, device=device),
        WgradProblem(64, 784, 512, device=device),
        CrossEntropyProblem(4096, 10, device=device),
        HeadProblem(64, 512, 10, device=device),
    ]
    slow = _TUNED if _whole(device) else (*_TUNED, "whole_default")
    cases = _cases(steps, slow) + _cases(operations, ("compile_default", *slow))
    return Preset("quick", 5, cases)


def _full(device: str) -> Preset:
    on_gpu, halves = device.startswith("cuda"), _halves(device)
    steps: list[Problem] = [StepProblem(REFERENCE, batch, device=device) for batch in (1, 8, 64, 512, 4096)]
    for batch in (64, 4096):
        steps += [StepProblem(REFERENCE, batch, optimizer=name, device=device) for name in ("nesterov", "adamw")]
        steps.append(StepProblem(REFERENCE, batch, activation="relu", device=device))
        steps += [StepProblem(REFERENCE, batch, dtype=dtype, device=device) for dtype in halves]
        steps += _with_options(batch, device)
    steps.append(StepProblem((784, 128, 128, 10), 4096, activation="relu", device=device))
    if on_gpu:
        steps.append(StepProblem((784, 128, 128, 10), 4096, "relu", bias=False, dtype="float16", device=device))
        steps += [StepProblem(SMALL, 64, "relu", loss="mse", dtype="bfloat16", device=device)]
    steps += _of_a_gpu([(SMALL, 1), (SMALL, 64), (REFERENCE, 64)], [64, 512, 4096], device)
    steps.append(OnlineProblem(REFERENCE, samples=512, device=device))
    operations: list[Problem] = []
    for batch in (64, 4096):
        shape = (batch, 784, 512)
        operations += [LinearProblem(*shape, dtype=dtype, device=device) for dtype in ("float32", *halves[:1])]
        operations += [LinearBackwardProblem(*shape, device=device), WgradProblem(*shape, device=device)]
        operations += [CrossEntropyProblem(batch, 10, device=device), HeadProblem(batch, 512, 10, device=device)]
    operations.append(LinearProblem(4096, 784, 512, "gelu", device=device))
    operations.append(CrossEntropyProblem(4096, 1000, device=device))
    return Preset("full", 11, _cases(steps) + _cases(operations))


def _all_but(*names: str) -> frozenset[str]:
    from .rivals import RIVALS

    return frozenset(rival.name for rival in RIVALS if rival.name not in names)


def _online(device: str) -> Preset:
    problem = OnlineProblem(REFERENCE, samples=12_000, device=device)
    return Preset("online", 5, (Case(problem, leave_out=_all_but(*_ONLINE, *_whole(device))),))


def _members(device: str) -> Preset:
    """The number of networks is the axis. A turn of the slowest contenders is one call, which takes over a second."""
    slow = frozenset({"vmap_compiled"})
    curves = [(shape, optimizer) for shape in MEMBER_SHAPES for optimizer in ("sgd", "adamw")]
    problems = [
        MembersProblem(*shape, optimizer=optimizer, members=members, device=device)
        for shape, optimizer in curves
        for members in MEMBERS
    ]
    cases = (
        Case(problem, "members", problem.members, frozenset() if problem.members in MEMBERS_COMPILED else slow)
        for problem in problems
    )
    return Preset("members", 5, tuple(cases))


def _shapes(device: str) -> Preset:
    leave_out = _all_but(*_SHAPES, *(("whole_default",) if device.startswith("cuda") else ()))
    problems = [
        StepProblem(sizes, batch, "relu", optimizer, loss="mse" if sizes[-1] == 1 else "cross_entropy", device=device)
        for sizes, batches in SHAPES
        for batch in batches
        for optimizer in ("sgd", "adamw")
    ]
    return Preset("shapes", 5, _cases(problems, leave_out))


def _scaling(device: str) -> Preset:
    curves_of = {"float32": (*_CURVES, *_whole(device)), "bfloat16": (*_CURVES_HALF, *_whole(device))}
    leave_out = {dtype: _all_but(*names) for dtype, names in curves_of.items()}
    curves: list[tuple[str, int, tuple[int, ...], int, str]] = []
    for dtype in ("float32", *_halves(device)[:1]):
        curves += [("batch", batch, REFERENCE, batch, dtype) for batch in BATCHES]
    curves += [("width", width, (784, width, width, 10), 64, "float32") for width in WIDTHS]
    curves += [("depth", depth, (784, *[512] * depth, 10), 64, "float32") for depth in DEPTHS]
    return Preset(
        "scaling",
        5,
        tuple(
            Case(StepProblem(sizes, batch, dtype=dtype, device=device), axis, value, leave_out[dtype])
            for axis, value, sizes, batch, dtype in curves
        ),
    )
