"""The estimate of eager PyTorch's step in one CUDA graph: its dispatched operations through the same model."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..gpus import MODES
from ..operations import Operation, OperationCounter
from ..workloads import SIZES
from .cache import Touched, hit_shares
from .constants import Chip
from .library import library_product, plain_kernel
from .model import Estimate, Kernel

__all__ = ["eager_estimate", "eager_operations", "eager_us", "library_us", "products_us"]


@lru_cache
def eager_operations(mode: str, batch: int, sizes: tuple[int, ...] = SIZES) -> list[Operation]:
    """The operations of one step of torch.nn, CrossEntropyLoss and fused SGD; 16-bit products under autocast."""
    half = MODES[mode].rate == "bf16"
    with FakeTensorMode():
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.Sigmoid()]
        model, loss_function = nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        x, y = torch.empty(batch, sizes[0]), torch.empty(batch, dtype=torch.int64)
        with OperationCounter() as counter:
            # Autocast of the CPU casts the same tensors as that of a GPU: products in 16 bits, the loss in float32.
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_function(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return counter.operations


def _mode_of_products(mode: str, chip: Chip) -> str:
    """Torch multiplies float32 outside of NVIDIA's matrix units unless tf32 is allowed.

    AMD's matrix units multiply float32 as it is, and AMD's libraries use them.
    """
    return "float32 on FMA" if mode == "float32" and chip.target.startswith("sm_") else mode


def eager_estimate(mode: str, batch: int, chip: Chip, sizes: tuple[int, ...] = SIZES) -> list[tuple[Kernel, Estimate]]:
    """The kernels of the step, with their estimates."""
    operations = eager_operations(mode, batch, sizes)
    shares = hit_shares([Touched(op.tensors) for op in operations], chip.l2_usable)
    found: list[tuple[Kernel, Estimate]] = []
    for op, share in zip(operations, shares, strict=True):
        if op.product is not None:
            found += library_product(*op.product, _mode_of_products(mode, chip), chip, round(share, 2))
        else:
            found.append(plain_kernel(op.name, chip, op.work.bytes, share, _serial(op, batch, chip)))
    return found


def _serial(op: Operation, batch: int, chip: Chip) -> float:
    """Cycles of the parts of an operation that one program does alone.

    The mean of ``nll_loss`` is one program of at most 1,024 threads (aten/src/ATen/native/cuda/Loss.cu), each of which
    reads a label, then a value, one row after the other. Other reductions end with a second stage.
    """
    if op.name == "aten.nll_loss_forward":
        return batch / 1024 * 2 * chip.l2_latency
    return chip.plain_kernel if op.name == "aten.sum" else 0.0


def eager_us(mode: str, batch: int, chip: Chip, sizes: tuple[int, ...] = SIZES) -> float:
    """Microseconds of the step."""
    return sum(e.microseconds for _, e in eager_estimate(mode, batch, chip, sizes))


def products_us(mode: str, batch: int, chip: Chip, sizes: tuple[int, ...] = SIZES) -> float:
    """Microseconds of the step's products alone, by a library; ``mode`` float32 as torch computes it."""
    products = [op.product for op in eager_operations(mode, batch, sizes) if op.product is not None]
    return sum(library_us(*product, mode, chip) for product in products)


def library_us(m: int, n: int, k: int, mode: str, chip: Chip) -> float:
    """Microseconds of one product by a library, with its operands in the L2 cache."""
    return sum(e.microseconds for _, e in library_product(m, n, k, _mode_of_products(mode, chip), chip))
