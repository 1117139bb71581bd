"""Stage 3x: the rule's tiles beside tiles that might be faster, for six conjectures P1 to P6 about the kernels.

``ALTERNATIVES`` is data: a line is a product of the reference network's step, and tiles to try for it. Every tile is
judged against float64 before it is timed. A tile that does not compile or does not fit is a result too.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from bench.static.workloads import float32_precision
from bench.tune import KINDS, Product, forced, products
from fastmlp.kernels.configs import Tile, gemm_tile
from fastmlp.kernels.device import current_device

from .judging import dtype_of, product_share
from .report import Report
from .timings import _hot

__all__ = ["ALTERNATIVES", "Alternatives", "run", "units"]


@dataclass(frozen=True)
class Alternatives:
    """What to try for one kind of product.

    Attributes:
        finding: the conjecture.
        kind: one of ``configs.GEMM_KINDS``.
        mode, batch: those of the step; the largest product of the kind is taken.
        tiles: tiles beside the rule's.
        splits: for weight gradients, numbers of programs that share the batch of one tile, beside the rule's.
        bias: False to try weight gradients without bias gradients too, which shows the cost of the latter.
    """

    finding: str
    kind: str
    mode: str
    batch: int
    tiles: tuple[Tile, ...]
    splits: tuple[int, ...] = ()
    bias: bool = True


ALTERNATIVES = (
    # P1: no wgmma tiles for the update; splits that fill whole waves.
    Alternatives("P1", "update", "bfloat16", 65536, (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)), (2, 3, 4, 6)),
    Alternatives("P1", "update", "float32", 65536, (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)), (2, 3, 4, 6)),
    Alternatives("P1", "update", "bfloat16", 4096, (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)), (2, 4, 8)),
    Alternatives("P1", "update", "float32", 4096, (Tile(128, 128, 32, 8, 3),), (2, 4, 8)),
    # P2: the gradients of the biases are a second pass over dZ.
    Alternatives("P2", "update", "float32", 4096, (), bias=False),
    Alternatives("P2", "update", "float32", 65536, (), bias=False),
    Alternatives("P2", "update", "bfloat16", 65536, (), bias=False),
    # P3: one program of 128 x 128 per multiprocessor, or two of half its size.
    Alternatives("P3", "fwd", "float32", 4096, (Tile(128, 64, 32, 8, 3), Tile(64, 128, 32, 4, 3))),
    Alternatives("P3", "dgrad", "float32", 4096, (Tile(128, 64, 32, 8, 3), Tile(64, 128, 32, 4, 3))),
    # P4: ``splits`` rounds up.
    Alternatives("P4", "update", "bfloat16", 512, (Tile(64, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)), (1, 2)),
    # P5: registers of the update at a small batch.
    Alternatives(
        "P5", "update", "float32", 64,
        (Tile(32, 64, 32, 4, 3, 168), Tile(32, 32, 32, 4, 3), Tile(64, 32, 32, 4, 3), Tile(32, 64, 16, 4, 3)),
    ),
    # P6: long chains of dependent products at a small batch: tiles that are not sliced, and other slices.
    Alternatives(
        "P6", "fwd", "float32", 64,
        (Tile(16, 32, 32, 2, 4), Tile(16, 32, 256, 4, 3, slices=4), Tile(16, 16, 256, 4, 4, slices=4)),
    ),
    Alternatives(
        "P6", "dgrad", "float32", 64,
        (Tile(16, 32, 32, 2, 4), Tile(16, 32, 256, 4, 3, slices=4), Tile(16, 16, 256, 4, 2, slices=4)),
    ),
    Alternatives("P6", "fwd", "bfloat16", 64, (Tile(16, 32, 64, 2, 4), Tile(16, 32, 512, 4, 3, slices=4))),
    Alternatives("P6", "fwd", "float32", 512, (Tile(32, 32, 32, 2, 4), Tile(32, 32, 128, 4, 3, slices=4))),
)  # fmt: skip
#: What a rehearsal runs in their place.
_REHEARSED = Alternatives("rehearsal", "update", "float32", 16, (Tile(16, 16, 16, 1, 2),), (1,), bias=False)


def _all(report: Report) -> tuple[Alternatives, ...]:
    return (_REHEARSED,) if report.rehearsal else ALTERNATIVES


def units(report: Report) -> list[str]:
    """Finding, number, kind, mode, batch."""
    return [f"{a.finding} {i} {a.kind} {a.mode} {a.batch}" for i, a in enumerate(_all(report))]


def run(unit: str, report: Report) -> None:
    """The rule's tile and splits, then the others, side by side."""
    tried = _all(report)[int(unit.split()[1])]
    dtype, device = dtype_of(tried.mode), report.device
    with float32_precision(tried.mode):
        for bias in dict.fromkeys([True, tried.bias]):
            found = products(tried.kind, tried.batch, dtype, device.name, device.sizes, bias=bias)
            product = max(found, key=lambda p: p.rows * p.cols * p.depth)
            shape = product.rows, product.cols, product.depth
            wide = all(length % 16 == 0 for length in shape)
            rule = gemm_tile(tried.kind, *shape, dtype, current_device(), wide=wide)
            for tile in dict.fromkeys([rule, *(tried.tiles if bias else ())]):
                for count in (None, *(tried.splits if bias else ())):
                    way = (
                        _way(tile, count)
                        + ("" if bias else ", without db")
                        + (", the rule" if tile == rule and not count else "")
                    )
                    _try(report, tried, product, tile, count, way)


def _way(tile: Tile, count: int | None) -> str:
    registers = "" if tile.max_registers is None else f" {tile.max_registers}r"
    splits = "" if count is None else f", {count} splits"
    slices = "" if tile.slices == 1 else f" {tile.slices} slices"
    return "x".join(map(str, tile[:3])) + f" {tile.num_warps}w {tile.num_stages}s{slices}{registers}{splits}"


def _try(report: Report, tried: Alternatives, product: Product, tile: Tile, count: int | None, way: str) -> None:
    shape = f"{product.rows}x{product.cols} over {product.depth}"
    name = f"{tried.finding} {tried.kind} {shape} {tried.mode}: {way}"
    values: dict[str, Any] = {"finding": tried.finding, "tile": list(tile), "splits": count}
    try:
        with forced(tried.kind, tile), _splits(tried.kind, count):
            share, _ = product_share(product, tried.mode)
            us = _hot(report, product.launch, tried.batch)
    except Exception as error:  # an alternative that does not fit is no fault of fastmlp
        first = (str(error).strip() or "no message").splitlines()[0]
        report.item(name, "info", f"{type(error).__name__}: {first}"[:300], **values)
        report.device.synchronize()
        return
    values |= {"us": us, "table": "alternatives"}
    if way.endswith("the rule"):
        report.share(name, share, **values)
    else:  # nor is an alternative that is wrong
        report.item(name, "info", "" if share <= 1 else "over its budget", share=share, **values)


@contextmanager
def _splits(kind: str, count: int | None) -> Iterator[None]:
    """Within the block ``count`` programs share the batch of a tile; None for the rule's number."""
    if count is None:
        yield
        return
    module = importlib.import_module(f"fastmlp.kernels.{KINDS[kind]}")
    with mock.patch.object(module, "splits", return_value=count):
        yield
