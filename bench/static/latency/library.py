"""Products as cuBLAS and its like compute them, through the same model.

The library chooses among tiles and splits of the reduction; the model takes its fastest choice by the model's own
measure, which a library's rules only approach. A program's loop runs at a stated share of the matrix rate. The
partial sums of a split reduction are added by one more kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from ..gpus import MODES
from .constants import CHIPS, Chip
from .model import Estimate, Kernel, Path, Section, estimate
from .walk import Demand

__all__ = ["library_product", "plain_kernel"]

_TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 64))
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_DEPTH_BYTES = 128


def plain_kernel(name: str, chip: Chip, bytes_all: float, hits: float, serial: float = 0.0) -> tuple[Kernel, Estimate]:
    """An elementwise kernel or a reduction that moves ``bytes_all``; nothing hides its ``serial`` cycles."""
    latency = hits * chip.l2_latency + (1 - hits) * chip.hbm_latency
    moved = Demand(loaded=bytes_all / chip.multiprocessors)
    path = Path(
        int(chip.multiprocessors), (Section("all", chip.plain_kernel + latency + serial), Section("bytes", 0.0, moved))
    )
    kernel = Kernel(name, (path,), 1, bytes_all * (1 - hits))
    return kernel, estimate(kernel, chip)


def library_product(m: int, n: int, k: int, mode: str, chip: Chip, hits: float = 1.0) -> list[tuple[Kernel, Estimate]]:
    """The kernels of C [M, N] = A [M, K] B [K, N], with their estimates.

    Args:
        mode: a key of ``gpus.MODES``; "float32 on FMA" uses no matrix units.
        hits: the share of the operands' bytes that is in the L2 cache.
    """
    return min(_choices(m, n, k, mode, chip.name, hits), key=lambda found: sum(e.microseconds for _, e in found))


@lru_cache(maxsize=4096)
def _choices(m: int, n: int, k: int, mode: str, name: str, hits: float) -> list[list[tuple[Kernel, Estimate]]]:
    chip = CHIPS[name]
    return [_kernels(m, n, k, mode, chip, hits, tile, splits) for tile, splits in _candidates(m, n, k)]


def _candidates(m: int, n: int, k: int) -> Iterator[tuple[tuple[int, int], int]]:
    for tile in _TILES:
        if any(side > 64 and side >= 4 * size for side, size in zip(tile, (m, n), strict=True)):
            continue
        for splits in _SPLITS:
            if splits == 1 or k // splits >= 128:
                yield tile, splits


def _kernels(
    m: int, n: int, k: int, mode: str, chip: Chip, hits: float, tile: tuple[int, int], splits: int
) -> list[tuple[Kernel, Estimate]]:
    rows, cols = tile
    itemsize = 2 if MODES[mode].rate == "bf16" else 4
    depth = _DEPTH_BYTES // itemsize
    programs = math.ceil(m / rows) * math.ceil(n / cols) * splits
    passes = math.ceil(k / splits / depth)
    flops = 2 * rows * cols * depth
    loaded = (rows + cols) * depth * itemsize
    if mode == "float32 on FMA":
        once = Demand(units=flops / chip.fma / chip.library_fma_share, loaded=loaded)
    else:
        rate = chip.matrix_16 if itemsize == 2 else chip.matrix_tf32
        once = Demand(matrix=flops / rate, loaded=loaded)
    busiest = once.units or once.matrix / chip.library_share
    stored = rows * cols * (4 if splits > 1 else itemsize)
    latency = hits * chip.l2_latency + (1 - hits) * chip.hbm_latency
    path = Path(
        programs,
        (
            Section("ends", chip.library_ends + latency, Demand(stored=stored)),
            Section("products", max(busiest, 100.0), once, passes),
        ),
    )
    # One program of a large tile fits a multiprocessor, or two of a small one.
    resident = 1 if rows * cols >= 128 * 128 else 2
    moved = (m * k + n * k) * itemsize * (1 - hits) + m * n * itemsize * (1 - hits)
    product = Kernel(
        f"product {rows}x{cols}" + (f" of {splits}" if splits > 1 else ""), (path,), resident, moved, tf32=itemsize == 4
    )
    found = [(product, estimate(product, chip))]
    if splits > 1:
        found.append(plain_kernel("sum of splits", chip, m * n * (4 * splits + itemsize), 1.0))
    return found
