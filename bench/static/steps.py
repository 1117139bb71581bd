"""A training step of 784-512-512-10: launches and bytes, for fastmlp and for eager PyTorch.

fastmlp's launches are recorded on the simulated GPU while fastmlp runs as on a real one. Operations that fastmlp leaves
to PyTorch are counted by ``operations``, like those of PyTorch's own step, which runs on fake tensors. CUDA graphs
would replay the same kernels and are left out on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmlp
from tests.compile.targets import TARGETS
from tests.ptxsim import Launch

from .gpus import GPUS, MODES, total_roofline
from .numbers import significant
from .operations import Operation, OperationCounter
from .work import work_of
from .workloads import SIZES

__all__ = ["STEP_BATCHES", "STEP_TARGETS", "eager_step", "fastmlp_autograd_step", "fastmlp_step", "step_rows"]

STEP_BATCHES = (1, 64, 1024, 16384, 65536)
#: The targets of fastmlp's launches; eager PyTorch's operations are assumed to be the same everywhere.
STEP_TARGETS = ("sm_80", "sm_90")
_LR = 0.1


@dataclass(frozen=True)
class Way:
    """One way to train: its name, where the data is, a step's kernels by target and batch, and the products' mode."""

    name: str
    data: str
    kernels: Callable[[str, int], list[Operation]]
    mode: str = "float32"


def step_rows(target: str) -> list[dict[str, Any]]:
    """One row per way to train and batch, for the kernels of one target."""
    return [_row(way, target, batch, way.kernels(target, batch)) for way in WAYS for batch in STEP_BATCHES]


def _row(way: Way, target: str, batch: int, kernels: list[Operation]) -> dict[str, Any]:
    works = [k.work for k in kernels]
    return {
        "way": way.name,
        "data": way.data,
        "mode": way.mode,
        "target": target,
        "batch": batch,
        "launches": len(kernels),
        "kernels": dict(Counter(k.name for k in kernels)),
        "bytes": sum(w.bytes for w in works),
        "matrix_flops": sum(w.matrix_flops for w in works),
        "roofline_microseconds": {
            name: significant(1e6 * total_roofline(works, gpu, MODES[way.mode]))
            for name, gpu in GPUS.items()
            if gpu.target == target
        },
    }


def _model() -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(SIZES):
        layers += [nn.Linear(n_in, n_out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def _train(model: nn.Module, loss_function: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss_function(model(x), y).backward()
    optimizer.step()


def eager_step(batch: int, *, fused: bool, resident: bool = False) -> list[Operation]:
    """The kernels of one step of torch.nn, torch.nn.CrossEntropyLoss and torch.optim.SGD.

    Args:
        fused: whether the optimizer is one kernel (``fused=True``) or uses horizontally fused operations
            (``foreach=True``), torch's default on a GPU.
        resident: whether the step begins at uint8 images, labels and row numbers on the device, or at x and y.
    """
    # Fake tensors of the CPU need no device, and the dispatched operations are those of a GPU.
    with FakeTensorMode():
        model, loss_function = _model(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), _LR, **({"fused": True} if fused else {"foreach": True}))
        x, y = torch.empty(batch, SIZES[0]), torch.empty(batch, dtype=torch.int64)
        images, labels = torch.empty(batch, SIZES[0], dtype=torch.uint8), torch.empty(batch, dtype=torch.int64)
        rows = torch.empty(batch, dtype=torch.int64)
        with OperationCounter() as counter:
            if resident:
                x, y = images[rows].float() / 255, labels[rows]
            _train(model, loss_function, optimizer, x, y)
    return counter.operations


# The simulated GPU's tensors are CPU tensors, whose labels fastmlp checks; on a GPU its kernels do.
_CPU_CHECKS = {"aten.aminmax"}


class _Operations(list[Any]):
    """Launches as operations, without their tensors: autograd copies a gradient to which others hold a reference."""

    def append(self, launch: Launch) -> None:
        super().append(Operation(launch.name, work_of(launch)))


def _recorded(target: str, run: Callable[[], object]) -> list[Operation]:
    gpu = TARGETS[target].simulated()
    gpu.launches = _Operations()
    with gpu, fastmlp.use_backend("triton"), OperationCounter() as counter:
        run()
    return [*gpu.launches, *(op for op in counter.operations if op.name not in _CPU_CHECKS)]


def fastmlp_autograd_step(target: str, batch: int) -> list[Operation]:
    """The kernels of one step of fastmlp.MLP and fastmlp.CrossEntropyLoss under autograd, and torch.optim.SGD."""
    model, loss_function = fastmlp.MLP(SIZES), fastmlp.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), _LR, foreach=True)
    x, y = torch.empty(batch, SIZES[0]), torch.zeros(batch, dtype=torch.int64)
    return _recorded(target, lambda: _train(model, loss_function, optimizer, x, y))


def fastmlp_step(target: str, batch: int, *, resident: bool = False) -> list[Operation]:
    """The kernels of one ``fastmlp.TrainStep``: ``step(x, y)``, or one more step of an epoch with ``resident``."""
    # A step on a GPU does not look at its labels.
    blind = mock.patch("fastmlp.step.triton_loss.host_sees_labels", return_value=False)
    with TARGETS[target].simulated(), fastmlp.use_backend("triton"), blind:
        step = fastmlp.TrainStep(fastmlp.MLP(SIZES), lr=_LR)
    if not resident:
        x, y = torch.empty(batch, SIZES[0]), torch.zeros(batch, dtype=torch.int64)
        _recorded(target, lambda: step(x, y))  # the first step also writes the learning rate
        return _recorded(target, lambda: step(x, y))
    images, labels = torch.empty(batch, SIZES[0], dtype=torch.uint8), torch.zeros(batch, dtype=torch.int64)
    order = torch.arange(batch)
    twice = order.repeat(2)
    # The tables of row numbers and learning rates are filled once per epoch. A step is what one more step adds.
    one = _recorded(target, lambda: step.epoch(images, labels, batch, order))
    two = _recorded(target, lambda: step.epoch(images, labels, batch, twice))
    return _difference(two, one)


def _difference(more: Iterable[Operation], fewer: Iterable[Operation]) -> list[Operation]:
    """The operations that ``more`` has in addition to those of ``fewer``, by name."""
    left = Counter(op.name for op in fewer)
    rest = []
    for op in more:
        if left[op.name]:
            left[op.name] -= 1
        else:
            rest.append(op)
    return rest


_X_Y, _RESIDENT = "x, y", "uint8 on the device"
_FMA = "float32 on FMA"
WAYS = (
    Way("fastmlp.TrainStep", _X_Y, lambda target, batch: fastmlp_step(target, batch)),
    Way("fastmlp autograd, torch.optim.SGD", _X_Y, fastmlp_autograd_step),
    Way("eager, SGD(fused=True)", _X_Y, lambda target, batch: eager_step(batch, fused=True), _FMA),
    Way("eager, SGD(foreach=True)", _X_Y, lambda target, batch: eager_step(batch, fused=False), _FMA),
    Way("fastmlp.TrainStep.epoch", _RESIDENT, lambda target, batch: fastmlp_step(target, batch, resident=True)),
    Way("eager, SGD(fused=True)", _RESIDENT, lambda _, batch: eager_step(batch, fused=True, resident=True), _FMA),
)
