"""Stage 2a: every tile of this device's tables, in every mode, against float64."""

from __future__ import annotations

from bench.static.workloads import float32_precision
from bench.tune import forced, product
from fastmlp.kernels.configs import GEMM_KINDS, Tile, all_tiles
from fastmlp.kernels.device import current_device

from .judging import NUMERICS, dtype_of, product_share
from .report import Report

__all__ = ["run", "units"]

#: Dimensions along which an operand is contiguous; "wide" operands have a multiple of 16 elements there.
_CONTIGUOUS = {"fwd": ("depth",), "dgrad": ("depth", "cols"), "wgrad": ("rows", "cols"), "update": ("rows", "cols")}


def _tiles(kind: str, mode: str, wide: bool) -> list[Tile]:
    return list(all_tiles(kind, dtype_of(mode), current_device(), wide=wide))


def units(report: Report) -> list[str]:
    """Kind, mode, operands, number of the tile; the largest tiles first, and only the smallest in a rehearsal."""
    found = []
    for kind in GEMM_KINDS:
        for mode in NUMERICS:
            for operands in ("wide", "narrow"):
                count = len(_tiles(kind, mode, operands == "wide"))
                numbers = range(count - 1, count) if report.rehearsal else range(count)
                found += [(i, f"{kind} {mode} {operands} {i}") for i in numbers]
    return [unit for _, unit in sorted(found)]


def run(unit: str, report: Report) -> None:
    """One tile, on several shapes."""
    kind, mode, operands, number = unit.split()
    wide = operands == "wide"
    tile = _tiles(kind, mode, wide)[int(number)]
    worst, at, result = -1.0, "", ""
    with float32_precision(mode), forced(kind, tile):
        for rows, cols, depth in _shapes(kind, tile, wide=wide, small=report.rehearsal):
            share, what = product_share(product(kind, rows, cols, depth, dtype_of(mode), report.device.name), mode)
            if not share <= worst:
                worst, at, result = share, f"{rows}x{cols} over {depth}", what
    name = "x".join(map(str, tile[:3])) + f" {tile.num_warps}w {tile.num_stages}s"
    report.share(f"{kind} {mode} {operands} {name}", worst, kind=kind, mode=mode, shape=at, result=result)


def _shapes(kind: str, tile: Tile, *, wide: bool, small: bool) -> list[tuple[int, int, int]]:
    """(rows, cols, depth): a tile with a few rows, columns and steps more; exactly a tile; a long reduction."""
    more = {"rows": 3, "cols": 5, "depth": 7} | (dict.fromkeys(_CONTIGUOUS[kind], 16) if wide else {})
    depth = tile.depth if wide else 2 * tile.depth
    ragged = (tile.rows + more["rows"], tile.cols + more["cols"], depth + more["depth"])
    if small:
        return [ragged]
    if not wide:
        return [ragged, (2 * tile.rows + 1, 2 * tile.cols + 1, 4099)]
    return [ragged, (tile.rows, tile.cols, tile.depth), (2 * tile.rows, 2 * tile.cols, 4096)]
