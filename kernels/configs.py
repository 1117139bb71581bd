"""The tile of a GEMM by shape and architecture: tables and one rule. Nothing is tuned or measured at run time.

A GEMM launcher asks ``gemm_tile(kind, rows, cols, depth, dtype, device, wide=...)`` for the tile of an output
[rows, cols] that is reduced over ``depth``. The rule goes through the candidates of this kind, dtype and operands,
largest tile first, and takes the first that gives every multiprocessor at least one program. Small batches are bound by
latency, not by arithmetic: no candidate gives every multiprocessor a program, and the rule takes the smallest. ``fit``
then lowers the number of pipeline stages until the tile's shared memory fits the device. ``all_tiles`` lists every tile
that the rule can return, so that the tests can compile each tile for each target.

Operands are ``wide`` when their rows can be loaded 16 bytes at a time (``loads_wide``). Other operands are loaded
element by element. Each element then has an address of its own, and elements of 2 bytes wait in registers, since no
asynchronous copy is that small. These operands get smaller blocks, for which the registers suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .device import Device
from .launch import forget
from .tuned import read_table, tuned_tile

__all__ = [
    "GEMM_KINDS",
    "Tile",
    "TileRule",
    "all_tiles",
    "cdiv",
    "gemm_tile",
    "loads_wide",
    "register_limit",
    "splits",
    "use_new_table",
]

#: fwd: A [M, N] over K.  dgrad: dX [M, K] over N.  wgrad: dW [N, K] over M.  update: wgrad with the optimizer behind.
GEMM_KINDS = ("fwd", "dgrad", "wgrad", "update")


#: ``gemm_tile``, or what a test or the tuner puts in its place.
TileRule = Callable[..., "Tile"]


class Tile(NamedTuple):
    """One program's share of a GEMM: an output block of ``rows`` x ``cols``, reduced ``depth`` at a time."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    #: Registers per thread (NVIDIA only). Without this limit ptxas spills some to fit one more program.
    max_registers: int | None = None

    @property
    def compile_options(self) -> dict[str, int]:
        """The launch options that are not tile sizes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


# (float32 tiles, 16-bit tiles) of each family of matrix units, largest first. No entry spills registers in a loop in
# any of the three kinds; tiles that do are left out. A 16-bit block 64 deep is one 128-byte line per row. float32
# blocks are shallower, since the tf32 parts of both operands live in registers.
_TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    # mma.sync: Ampere, Ada, consumer Blackwell
    "mma": (
        (
            Tile(128, 128, 16, 8, 4),
            Tile(64, 128, 32, 8, 3),
            Tile(64, 64, 32, 4, 3),
            Tile(32, 64, 32, 4, 3, 255),
            Tile(32, 32, 32, 2, 4),
            Tile(16, 32, 32, 2, 4),
        ),
        (
            Tile(128, 128, 64, 8, 3),
            Tile(64, 128, 64, 8, 3),
            Tile(64, 64, 64, 4, 4),
            Tile(32, 64, 64, 4, 4, 168),
            Tile(32, 32, 64, 4, 4),
            Tile(16, 32, 64, 2, 4),
        ),
    ),
    # wgmma: Hopper. Blocks of 64 rows and more run on it, smaller ones on mma.sync.
    "wgmma": (
        (
            Tile(128, 128, 32, 8, 3),
            Tile(64, 128, 32, 8, 3),
            Tile(64, 64, 32, 4, 3),
            Tile(32, 64, 32, 4, 3),
            Tile(32, 32, 32, 2, 4),
            Tile(16, 32, 32, 2, 4),
        ),
        (
            Tile(128, 256, 64, 8, 3),
            Tile(128, 128, 64, 8, 3),
            Tile(64, 128, 64, 4, 3),
            Tile(64, 64, 64, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(32, 32, 64, 4, 4),
            Tile(16, 32, 64, 2, 4),
        ),
    ),
    # tcgen05: data-center Blackwell; accumulators in tensor memory
    "tcgen05": (
        (
            Tile(128, 128, 32, 8, 3),
            Tile(64, 128, 32, 8, 3),
            Tile(64, 64, 32, 4, 3, 168),
            Tile(32, 64, 32, 4, 3),
            Tile(32, 32, 32, 2, 4),
            Tile(16, 32, 32, 2, 4),
        ),
        (
            Tile(128, 128, 64, 8, 3),
            Tile(64, 128, 64, 4, 3),
            Tile(64, 64, 64, 8, 4),
            Tile(32, 64, 64, 4, 4, 168),
            Tile(32, 32, 64, 4, 4),
            Tile(16, 32, 64, 2, 4),
        ),
    ),
    # FMA: Turing, for which Triton has no tensor-core path. Products unroll over the depth, so the depth is small.
    "fma": (
        (
            Tile(128, 64, 16, 8, 2),
            Tile(64, 64, 16, 4, 2),
            Tile(32, 64, 16, 4, 2),
            Tile(32, 32, 16, 4, 2),
            Tile(16, 32, 16, 2, 2),
        ),
        (
            Tile(128, 64, 16, 8, 2),
            Tile(64, 64, 16, 4, 2),
            Tile(32, 64, 16, 4, 2),
            Tile(32, 32, 16, 4, 2, 168),
            Tile(16, 32, 16, 2, 2),
        ),
    ),
    # AMD: MFMA (CDNA) and WMMA (RDNA); 64 KiB of LDS
    "hip": (
        (
            Tile(64, 64, 16, 4, 2),
            Tile(32, 64, 32, 4, 2),
            Tile(32, 32, 32, 4, 2),
            Tile(16, 32, 32, 2, 2),
        ),
        (
            Tile(128, 128, 32, 8, 2),
            Tile(64, 128, 32, 4, 2),
            Tile(64, 64, 32, 4, 2),
            Tile(32, 64, 32, 4, 2),
            Tile(32, 32, 32, 4, 2),
            Tile(16, 32, 32, 2, 2),
        ),
    ),
    # Interpreter: programs run one after the other in Python, so there are few and large ones. Test shapes are still
    # no multiples of these tiles.
    "interpreter": ((Tile(32, 32, 32, 1, 1),), (Tile(32, 32, 32, 1, 1),)),
}

# For operands that are not wide: the addresses of all elements take registers too.
_NARROW_NVIDIA: tuple[tuple[Tile, ...], tuple[Tile, ...]] = (
    (
        Tile(64, 128, 16, 8, 4),
        Tile(64, 64, 16, 4, 4),
        Tile(32, 64, 32, 4, 3),
        Tile(32, 32, 32, 2, 4),
        Tile(16, 32, 32, 2, 4),
    ),
    (
        Tile(64, 128, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(32, 64, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(16, 32, 32, 2, 3),
    ),
)
_NARROW_TILES = {
    "mma": _NARROW_NVIDIA,
    "wgmma": _NARROW_NVIDIA,
    "tcgen05": _NARROW_NVIDIA,
    "fma": (_TILES["fma"][0][1:], _TILES["fma"][1][2:]),
    "hip": (_TILES["hip"][0], _TILES["hip"][1][2:]),
}

_MIN_DEPTH_PER_SPLIT = 256

# The optimizer's state lives in registers beside the gradient, so blocks are smaller or have more warps.
_UPDATE_TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    "mma": (
        (Tile(64, 64, 16, 4, 4), Tile(32, 64, 32, 4, 3), Tile(16, 32, 32, 2, 4)),
        (Tile(64, 64, 64, 8, 4), Tile(32, 64, 32, 4, 4), Tile(32, 32, 64, 4, 4)),
    ),
    "fma": (
        (Tile(32, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(16, 32, 16, 2, 2)),
        (Tile(32, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(16, 32, 16, 2, 2)),
    ),
    "tcgen05": (
        (Tile(64, 64, 16, 4, 4), Tile(32, 64, 32, 4, 3), Tile(16, 32, 32, 2, 4)),
        (Tile(64, 64, 32, 8, 4, 128), Tile(32, 64, 32, 4, 4), Tile(32, 32, 64, 4, 4)),
    ),
    "hip": (
        (Tile(32, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2), Tile(16, 32, 16, 2, 2)),
        (Tile(64, 64, 32, 8, 2), Tile(32, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
    ),
    "interpreter": ((Tile(32, 32, 32, 1, 1),), (Tile(32, 32, 32, 1, 1),)),
}


def register_limit(most: int | None, device: Device) -> dict[str, int]:
    """The launch option that limits the registers per thread; empty without a limit or without an NVIDIA device."""
    return {"maxnreg": most} if most is not None and device.backend == "cuda" else {}


def cdiv(a: int, b: int) -> int:
    """Integer ceil(a / b)."""
    return -(-a // b)


def _family(device: Device) -> str:
    """Which table serves a device: by the matrix unit that its blocks run on."""
    if device.backend != "cuda":
        return device.backend
    arch = int(device.arch)
    if arch < 80:
        return "fma"
    return {9: "wgmma", 10: "tcgen05"}.get(arch // 10, "mma")


def loads_wide(*operands: Tensor) -> bool:
    """Whether every matrix can be loaded 16 bytes at a time, as far as Triton knows.

    One dimension must be contiguous. Its length and the other dimension's stride must be multiples of 16 elements, and
    the data must begin at a multiple of 16 bytes. (Triton knows of an integer argument only whether 16 divides it.)
    """
    for t in operands:
        first, second = t.stride()
        inner, outer, length = (second, first, t.shape[1]) if second == 1 else (first, second, t.shape[0])
        if inner != 1 or (outer | length | t.data_ptr()) % 16:
            return False
    return True


def _candidates(kind: str, dtype: torch.dtype, device: Device, wide: bool) -> tuple[Tile, ...]:
    family = _family(device)
    if kind == "update":
        float32, half = _UPDATE_TILES.get(family, _UPDATE_TILES["mma"])
    elif not wide and family in _NARROW_TILES:
        float32, half = _NARROW_TILES[family]
    else:
        float32, half = _TILES[family]
    return float32 if dtype == torch.float32 else half


def fit(tile: Tile, itemsize: int, device: Device) -> Tile | None:
    """``tile`` with as many of its stages as fit the device's shared memory, or None if not even one does."""
    stage = (tile.rows + tile.cols) * tile.depth * itemsize
    stages = min(tile.num_stages, device.shared_limit // stage)
    return tile._replace(num_stages=stages) if stages >= 1 else None


@lru_cache(maxsize=4096)
def gemm_tile(
    kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, device: Device, *, wide: bool
) -> Tile:  # fmt: skip
    """The tile for an output of [rows, cols] reduced over ``depth``; see the module docstring for the rule.

    ``wide`` is what ``loads_wide`` says of the operands. The update's tiles suit all operands.

    wgrad also splits the reduction over programs (``splits``), at most once per ``_MIN_DEPTH_PER_SPLIT`` rows. The rule
    counts all these splits as programs.
    """
    tiles = list(all_tiles(kind, dtype, device, wide=wide))
    if (measured := tuned_tile(kind, rows, cols, depth, dtype, device, tiles)) is not None:
        return measured
    copies = max(1, depth // _MIN_DEPTH_PER_SPLIT) if kind in ("wgrad", "update") else 1
    for tile in tiles:
        if tile.rows > max(16, 2 * rows) or tile.cols > max(16, 2 * cols):
            continue
        if cdiv(rows, tile.rows) * cdiv(cols, tile.cols) * copies >= device.multiprocessors:
            return tile
    return tiles[-1]


def splits(tile: Tile, rows: int, cols: int, depth: int, device: Device) -> int:
    """How many programs share the reduction of one output tile, so that all multiprocessors have work."""
    programs = cdiv(rows, tile.rows) * cdiv(cols, tile.cols)
    wanted = cdiv(device.multiprocessors, programs)
    most = max(1, depth // _MIN_DEPTH_PER_SPLIT) if device.backend != "interpreter" else cdiv(depth, tile.depth)
    return max(1, min(wanted, most))


def all_tiles(kind: str, dtype: torch.dtype, device: Device, *, wide: bool) -> Iterator[Tile]:
    """Every tile that ``gemm_tile`` can return for this kind, dtype, device and operands."""
    for tile in _candidates(kind, dtype, device, wide):
        fitted = fit(tile, dtype.itemsize, device)
        if fitted is not None:
            yield fitted


def use_new_table() -> None:
    """Read the tables of measured tiles again; launches from now on use what they say."""
    read_table.cache_clear()
    gemm_tile.cache_clear()
    forget()
