"""The tile of a GEMM by shape and architecture: tables and one rule. Nothing is tuned or measured at run time.

A GEMM launcher asks ``gemm_tile(kind, rows, cols, depth, dtype, device, wide=...)`` for the tile of an output
[rows, cols] that is reduced over ``depth``. The rule goes through the candidates of this kind, dtype and operands,
largest tile first, and takes the first whose programs occupy the multiprocessors evenly (``_balanced``). Small batches
are bound by latency, not by arithmetic: no candidate occupies all multiprocessors, and the rule takes the smallest. A
weight gradient's batch can be split over programs, so its rule compares tiles and ``splits`` by their cost.
``fit`` then lowers the number of pipeline stages until the tile's shared memory fits the device. ``all_tiles`` lists
every tile that the rule can return, so that the tests can compile each tile for each target.

Operands are ``wide`` when their rows can be loaded 16 bytes at a time (``loads_wide``). Other operands are loaded
element by element. Each element then has an address of its own, and elements of 2 bytes wait in registers, since no
asynchronous copy is that small. These operands get smaller blocks, for which the registers suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from .device import Device, tf32_allowed
from .launch import forget
from .members import stride_of
from .tuned import read_table, tuned_tile

__all__ = [
    "GEMM_KINDS",
    "LARGEST_UPDATED",
    "Shapes",
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
    #: Slices of ``depth``, each with a warp and sums of its own; the sums are added at the end.
    slices: int = 1
    #: Programs of the weight gradient that the registers of a multiprocessor hold at once.
    resident: int = 1
    #: float32 products run outside of the matrix units, unless torch allows tf32.
    fma: bool = False

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
            Tile(128, 64, 32, 8, 3),
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
            Tile(16, 32, 32, 2, 4, 128),
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
    "interpreter": ((Tile(32, 32, 32, 1, 1, resident=4),), (Tile(32, 32, 32, 1, 1, resident=4),)),
}

# fwd and dgrad take these in place of the small tiles above. A small batch has few tiles, and in a tile of 16 x 32 two
# warps multiply, each of whose products waits for the previous one. Slices of the reduction occupy four warps, with a
# fourth of the products in each chain. Where a block has 16 rows, a slice of a row is 256 bytes: less is copied into
# shared memory in an order that the products read with bank conflicts.
_SLICED_NVIDIA: tuple[tuple[Tile, ...], tuple[Tile, ...]] = (
    (
        Tile(32, 32, 128, 4, 3, 255, slices=4),
        Tile(16, 32, 256, 4, 3, 255, slices=4),
        Tile(16, 16, 256, 4, 3, slices=4),
    ),
    (
        Tile(32, 32, 256, 4, 3, slices=4),
        Tile(16, 32, 512, 4, 3, 255, slices=4),
        Tile(16, 16, 512, 4, 3, 168, slices=4),
    ),
)
_SLICED_TILES = {
    "mma": _SLICED_NVIDIA,
    "wgmma": _SLICED_NVIDIA,
    "tcgen05": _SLICED_NVIDIA,
    # CDNA. Without matrix units (RDNA in float32) these tiles spill.
    "hip": (
        (
            Tile(32, 32, 128, 4, 2, slices=4),
            Tile(16, 32, 128, 4, 2, slices=4),
            Tile(16, 16, 256, 4, 2, slices=4),
        ),
        (
            Tile(32, 32, 256, 4, 2, slices=4),
            Tile(16, 32, 256, 4, 2, slices=4),
            Tile(16, 16, 256, 4, 2, slices=4),
        ),
    ),
    "interpreter": ((Tile(16, 16, 64, 1, 1, slices=2),), (Tile(16, 16, 64, 1, 1, slices=2),)),
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
    # Eight warps of wgmma compute two of the three products of a block of 64 rows twice.
    "wgmma": ((Tile(128, 64, 16, 8, 4), *_NARROW_NVIDIA[0][1:]), _NARROW_NVIDIA[1]),
    "tcgen05": _NARROW_NVIDIA,
    "fma": (_TILES["fma"][0][1:], _TILES["fma"][1][2:]),
    "hip": (_TILES["hip"][0], _TILES["hip"][1][2:]),
}

#: The rule of ``_best_split``: the most rows for which an update is never split, the least rows of a split, the most
#: waves that the programs of all splits fill, and the multiply-adds that take as long as a byte, by itemsize.
_DIRECT_UPDATE, _MIN_DEPTH_PER_SPLIT, _MAX_WAVES = 1024, 256, 4
_MULTIPLICATIONS_PER_BYTE = {2: 32, 4: 8}
Shapes = tuple[tuple[int, int], ...]

# Weight gradients of wide operands, with the optimizer behind or without. Where the batch is split, the epilogue only
# stores partial sums; a block above ``LARGEST_UPDATED`` beside an optimizer's states overflows the registers.
LARGEST_UPDATED = 128 * 128
_WIDE_GRADIENT_TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    "mma": (
        (
            Tile(128, 128, 16, 8, 4, resident=1),
            Tile(64, 128, 32, 8, 3, resident=1),
            Tile(64, 64, 32, 4, 3, resident=2),
            Tile(32, 64, 32, 4, 3, resident=2),
            Tile(16, 32, 32, 2, 4, resident=4),
        ),
        (
            Tile(128, 128, 64, 8, 3, resident=1),
            Tile(64, 128, 64, 8, 3, 255, resident=1),
            Tile(64, 64, 64, 4, 4, resident=3),
            Tile(32, 64, 64, 4, 4, 168, resident=4),
            Tile(32, 32, 64, 4, 4, resident=4),
        ),
    ),
    "wgmma": (
        (
            Tile(128, 128, 32, 8, 3, resident=1),
            Tile(64, 128, 32, 4, 3, resident=2),
            Tile(64, 64, 32, 4, 3, resident=3),
            Tile(32, 64, 32, 4, 3, resident=3),
            Tile(32, 32, 32, 2, 4, resident=6),
            Tile(16, 32, 32, 2, 4, resident=8),
        ),
        (
            Tile(128, 256, 64, 8, 3, resident=1),
            Tile(128, 128, 64, 8, 3, resident=1),
            Tile(64, 128, 64, 4, 3, resident=3),
            Tile(64, 64, 64, 4, 4, resident=3),
            Tile(32, 64, 64, 4, 4, resident=4),
            Tile(32, 32, 64, 4, 4, resident=6),
            Tile(16, 32, 64, 2, 4, resident=8),
        ),
    ),
}

# Updates of other operands and families. The optimizer's state lives in registers beside the gradient, so blocks are
# smaller or have more warps.
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
        (Tile(32, 64, 16, 4, 2, resident=8), Tile(32, 32, 16, 4, 2, resident=8), Tile(16, 32, 16, 2, 2, resident=8)),
        (Tile(64, 64, 32, 8, 2), Tile(32, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2)),
    ),
    "interpreter": _TILES["interpreter"],
}


# float32 of wide operands on GeForce-class multiprocessors (sm_86, sm_89, sm_120). These have as many multiply-adds
# outside of the matrix units as tf32 multiply-adds inside, and the split takes three of the latter. The forward product
# stays on the matrix units: W is contiguous along the reduction, and multiply-adds would read W with bank conflicts.
# Small tiles are those of small batches, which are bound by latency.
_FMA_GRADIENT_TILES: tuple[Tile, ...] = (
    Tile(64, 128, 16, 4, 3, resident=3, fma=True),
    Tile(64, 64, 16, 4, 3, 128, resident=4, fma=True),
    Tile(32, 64, 16, 4, 3, resident=5, fma=True),
    Tile(16, 32, 32, 2, 4, resident=4),
)
_FMA_DGRAD_TILES: tuple[Tile, ...] = (
    Tile(64, 128, 16, 4, 3, fma=True),
    Tile(64, 64, 32, 4, 3),
    Tile(32, 64, 32, 4, 3, 255),
    Tile(16, 32, 32, 2, 4),
)

# What replaces tiles where torch allows tf32: one product takes fewer registers than the three of the split, so that a
# larger block fits a program, or one program more fits a multiprocessor. Where one more fits only if registers are
# spilled, a limit keeps ptxas from it. Keys: family, and whether the tile is a weight gradient's.
_TF32_INSTEAD: dict[tuple[str, bool], dict[Tile, tuple[Tile, ...]]] = {
    ("mma", False): {Tile(64, 128, 32, 8, 3): (Tile(64, 128, 16, 4, 4),)},
    ("mma", True): {Tile(128, 128, 16, 8, 4): (Tile(64, 128, 16, 4, 4, resident=3),)},
    ("wgmma", False): {Tile(128, 128, 32, 8, 3): (Tile(128, 256, 32, 8, 3), Tile(128, 128, 32, 8, 3))},
    ("wgmma", True): {Tile(128, 128, 32, 8, 3): (Tile(128, 128, 32, 4, 3, resident=2),)},
    ("tcgen05", False): {Tile(64, 128, 32, 8, 3): (Tile(64, 128, 32, 8, 3, 128),)},
    ("tcgen05", True): {
        Tile(64, 128, 32, 8, 3): (Tile(64, 128, 32, 8, 3, 128),),
        Tile(64, 128, 16, 8, 4): (Tile(64, 128, 16, 8, 4, 255),),
    },
}
# On GeForce-class multiprocessors too, whose shared memory has room for one program of this block.
_TF32_ON_GEFORCE = {Tile(128, 128, 16, 8, 4): (Tile(128, 128, 16, 8, 4, 255),)}


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
    The stride from one member to the next must be a multiple of 16 elements too.
    """
    for t in operands:
        first, second = t.stride()[-2:]
        rows, cols = t.shape[-2:]
        inner, outer, length = (second, first, cols) if second == 1 else (first, second, rows)
        if inner != 1 or (outer | length | stride_of(t, 2) | t.data_ptr()) % 16:
            return False
    return True


def _candidates(
    kind: str, dtype: torch.dtype, device: Device, wide: bool, tf32: bool, pixels: bool
) -> tuple[Tile, ...]:  # fmt: skip
    family = _family(device)
    # A gradient of pixels would keep the whole widened block in registers.
    if wide and dtype == torch.float32 and kind != "fwd" and not (tf32 or pixels) and device.has_wide_fma:
        float32 = half = _FMA_DGRAD_TILES if kind == "dgrad" else _FMA_GRADIENT_TILES
    elif wide and family in _WIDE_GRADIENT_TILES and (kind == "update" or (kind == "wgrad" and family == "wgmma")):
        float32, half = _WIDE_GRADIENT_TILES[family]
    elif kind == "update":
        float32, half = _UPDATE_TILES.get(family, _UPDATE_TILES["mma"])
    elif not wide and family in _NARROW_TILES:
        float32, half = _NARROW_TILES[family]
    else:
        float32, half = _TILES[family]
    tiles = float32 if dtype == torch.float32 else half
    if tf32 and dtype == torch.float32:
        instead = _TF32_INSTEAD.get((family, kind in ("wgrad", "update")), {})
        if device.has_wide_fma:
            instead = _TF32_ON_GEFORCE | instead
        tiles = tuple([new for tile in tiles for new in instead.get(tile, (tile,))])
    if kind in ("fwd", "dgrad") and wide and _slices(device):
        # The smallest tile stays, for reductions that are shorter than a step of the sliced ones.
        small = _SLICED_TILES[family][dtype != torch.float32]
        tiles = (*(t for t in tiles[:-1] if t.rows * t.cols > small[0].rows * small[0].cols), *small, tiles[-1])
    return tiles


def _slices(device: Device) -> bool:
    """Whether the device has matrix units for all dtypes. Products on registers unroll over the depth, and spill."""
    return device.backend == "interpreter" or device.has_tf32 or str(device.arch).startswith("gfx9")


def fit(tile: Tile, itemsize: int, device: Device) -> Tile | None:
    """``tile`` with as many of its stages as fit the device's shared memory, or None if not even one does.

    An instruction of AMD's CDNA multiplies 32 x 32, or 16 x 16 where the block is smaller. With more warps than the
    block has such pieces, several warps compute the same one.
    """
    if str(device.arch).startswith("gfx9"):
        side = 32 if min(tile.rows, tile.cols) >= 32 else 16
        pieces = tile.rows // side * (tile.cols // side) * tile.slices
        tile = tile._replace(num_warps=min(tile.num_warps, pieces))
    stage = (tile.rows + tile.cols) * tile.depth * itemsize
    stages = min(tile.num_stages, device.shared_limit // stage)
    return tile._replace(num_stages=stages) if stages >= 1 else None


def gemm_tile(
    kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, device: Device, *, wide: bool,
    layers: Shapes = (), beside: int = 0, members: int = 1, pixels: bool = False, tf32: bool | None = None,
) -> Tile:  # fmt: skip
    """The tile for an output of [rows, cols] reduced over ``depth``; see the module docstring for the rule.

    ``wide`` is what ``loads_wide`` says of the operands. An update's tile is for all its ``layers`` together, and for
    what runs ``beside`` them (see ``splits``). Several members are as many outputs in one launch. ``pixels`` is whether
    a weight gradient's X is pixels, and ``tf32`` whether torch allows tf32 products, by default what torch says now.
    """
    tf32 = tf32_allowed() if tf32 is None else tf32
    return _chosen(kind, rows, cols, depth, dtype, device, wide, layers, beside, members, pixels, tf32)


@lru_cache(maxsize=4096)
def _chosen(
    kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, device: Device, wide: bool, layers: Shapes,
    beside: int, members: int, pixels: bool, tf32: bool,
) -> Tile:  # fmt: skip
    tiles = list(all_tiles(kind, dtype, device, wide=wide, tf32=tf32, pixels=pixels))
    if members == 1 and (measured := tuned_tile(kind, rows, cols, depth, dtype, device, tiles)) is not None:
        return measured
    fitting = [t for t in tiles if t.rows <= max(16, 2 * rows) and t.cols <= max(16, 2 * cols)] or tiles[-1:]
    if kind in ("wgrad", "update"):
        shapes = layers or ((rows, cols),)
        return min(fitting, key=lambda tile: _best_split(kind, tile, shapes, depth, dtype, device, beside, members))
    fitting = [tile for tile in fitting if tile.slices == 1 or tile.depth <= 2 * depth]
    smallest = tiles[-1]
    if members > 1:
        return min(
            fitting or [smallest], key=lambda tile: _members_cost(tile, rows, cols, depth, dtype, device, members)
        )
    for tile in fitting:
        if _balanced(cdiv(rows, tile.rows) * cdiv(cols, tile.cols), device):
            return tile
        if tile.rows * tile.cols < smallest.rows * smallest.cols:
            smallest = tile
    return smallest


def _members_cost(
    tile: Tile, rows: int, cols: int, depth: int, dtype: torch.dtype, device: Device, members: int
) -> float:  # fmt: skip
    """How long the busiest multiprocessor is busy, in bytes as ``_best_split`` counts them.

    Outputs of members are often smaller than a large tile, whose programs compute the padding too. Many members keep
    all multiprocessors busy with tiles of any size. The rule for one output, by balance, therefore does not fit them.
    """
    programs = members * cdiv(rows, tile.rows) * cdiv(cols, tile.cols)
    area, steps = tile.rows * tile.cols, cdiv(depth, tile.depth) * tile.depth
    loads = steps * (area / _MULTIPLICATIONS_PER_BYTE[dtype.itemsize] + (tile.rows + tile.cols) * dtype.itemsize)
    return cdiv(programs, device.multiprocessors) * (loads + area * dtype.itemsize)


def _balanced(programs: int, device: Device) -> bool:
    """Whether multiprocessors have, on average, at least two thirds of the programs that the busiest one has."""
    return 3 * programs >= 2 * cdiv(programs, device.multiprocessors) * device.multiprocessors


def splits(
    kind: str, tile: Tile, shapes: Shapes, depth: int, dtype: torch.dtype, device: Device, *, beside: int = 0,
    members: int = 1,
) -> int:  # fmt: skip
    """How many programs share the reduction of each tile of the outputs ``shapes``.

    Each split also has ``beside`` programs that take about as long as a tile's, such as those that add the rows of dZ.
    Every one of the ``members`` has all of these programs.
    """
    return _best_split(kind, tile, shapes, depth, dtype, device, beside, members)[1]


@lru_cache(maxsize=4096)
def _best_split(
    kind: str, tile: Tile, shapes: Shapes, depth: int, dtype: torch.dtype, device: Device, beside: int, members: int
) -> tuple[float, int]:
    """(cost, splits) of the number of splits that keeps the busiest multiprocessor for the shortest time.

    The cost counts bytes, and multiply-adds as bytes. Every program loads the operands of its share of the reduction,
    multiplies, and reads and writes its output. A split reduction also writes partial sums, and reads them in another
    launch, which is counted as twice the bytes. Programs of one multiprocessor share it; beyond those that are resident
    the next wave begins. A second or later wave of a split reduction is at least two thirds full.
    """
    programs = members * (beside + sum(cdiv(n, tile.rows) * cdiv(k, tile.cols) for n, k in shapes))
    outputs = members * sum(n * k for n, k in shapes)
    slots = device.multiprocessors * _resident(tile, dtype, device)
    if device.backend == "interpreter":
        most = min(cdiv(depth, tile.depth), max(1, slots // programs))
    elif kind == "update" and depth <= _DIRECT_UPDATE:
        most = 1
    else:
        most = max(1, min(depth // _MIN_DEPTH_PER_SPLIT, _MAX_WAVES * slots // programs))
    balance = _MULTIPLICATIONS_PER_BYTE[dtype.itemsize]
    area, step = tile.rows * tile.cols, (tile.rows + tile.cols) * dtype.itemsize

    def cost(n: int) -> float:
        waves, rest = divmod(n * programs, slots)
        if n > 1 and waves and 0 < rest < slots * 2 / 3:
            return inf
        busiest = waves * (slots // device.multiprocessors) + cdiv(rest, device.multiprocessors)
        sums = 16 * n * outputs / device.multiprocessors if n > 1 else 0
        return busiest * (cdiv(depth, n) * (area / balance + step) + 8 * area) + sums

    fewest = 2 if kind == "update" and area > LARGEST_UPDATED else 1
    return min(((cost(n), n) for n in range(fewest, most + 1)), default=(inf, 1))


def _resident(tile: Tile, dtype: torch.dtype, device: Device) -> int:
    """Programs of a weight gradient that a multiprocessor holds at once, by registers and by shared memory."""
    stages = (tile.rows + tile.cols) * tile.depth * dtype.itemsize * tile.num_stages
    return max(1, min(tile.resident, device.shared_limit // stages))


def all_tiles(
    kind: str, dtype: torch.dtype, device: Device, *, wide: bool, pixels: bool = False, tf32: bool | None = None
) -> Iterator[Tile]:  # fmt: skip
    """Every tile that ``gemm_tile`` can return for this kind, dtype, device and operands.

    ``pixels`` and ``tf32`` are as for ``gemm_tile``.
    """
    for tile in _candidates(kind, dtype, device, wide, tf32_allowed() if tf32 is None else tf32, pixels):
        fitted = fit(tile, dtype.itemsize, device)
        if fitted is not None:
            yield fitted


def use_new_table() -> None:
    """Read the tables of measured tiles again; launches from now on use what they say."""
    read_table.cache_clear()
    _chosen.cache_clear()
    forget()
