"""The cases to compile: kernel x dtype x tile x variant x target, in full or as a set that covers each of them.

A kernel's entry has the tiles that ``configs`` can choose for the kernel, and the kernel's variants. The variants are
launches that together reach every compile-time flag, every activation, aligned operands and unaligned operands. A case
runs the package's own launcher on a simulated GPU that records the launch; only the choice of the tile is replaced.

The covering set takes, for every target, every tile of every kernel with one variant. A tile of a matrix product is
taken twice, for float32 and for a 16-bit dtype. The next target takes the next variant. Further cases are added until
every variant and every dtype meets every target. The variant depends on the case alone, so a change to the tables
leaves the other cases as they are. The ``HOT`` kernels take their first variant on one target of each family. Of the
``SIBLINGS``, whose matrix units are those of a family, every third case is taken, which are the cases of other kernels,
tiles and variants for each of them. Where torch allows tf32, float32 products are other code: the set has the largest
and the smallest tile of each, and the tiles that only tf32 has. ``make compile-all`` compiles the full product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

import torch

from fastmlp.kernels.configs import Tile
from fastmlp.kernels.device import Device
from tests.ptxsim import Launch
from tests.support.precision import set_matmul

from .targets import TARGETS, Target

__all__ = ["SIBLINGS", "Case", "KernelCases", "covering", "full"]

#: One target of each family of matrix units, and the kernels whose first variant matters most for speed.
FAMILIES = ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942")
HOT = ("linear_fwd", "linear_dgrad", "linear_wgrad")
SIBLINGS = ("sm_86", "sm_89", "gfx90a", "gfx1100")

Launcher = Callable[[torch.dtype, Any], object]


@dataclass(frozen=True)
class KernelCases:
    """How to reach one launcher's kernels.

    Attributes:
        kernels: the Triton functions that the launcher launches.
        tiles: the tiles that configs can choose for a dtype, a device and a variant; ``(None,)`` where there is only
            one.
        variants: launches by name, each a function of a dtype and a tile.
        force: a context in which the launcher takes the given tile.
        aligned: whether a variant's operands are contiguous and their rows are whole 16-byte pieces, for a dtype and a
            tile.
        gemm: the Triton functions among ``kernels`` that are matrix products; they must use the target's matrix units.
    """

    kernels: tuple[str, ...]
    tiles: Callable[[torch.dtype, Device, str], Sequence[Any]]
    variants: dict[str, Launcher]
    force: Callable[[Any], AbstractContextManager[None]]
    aligned: Callable[[str, torch.dtype, Any], bool]
    gemm: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One launch to compile or to execute: the launcher ``kernel`` and everything that determines the code.

    With ``tf32``, torch allows tf32 products of float32.
    """

    kernel: str
    target: Target
    dtype: torch.dtype
    tile: Any
    variant: str
    tf32: bool = False

    @property
    def name(self) -> str:
        """E.g. sm_80/linear_fwd/float32/128x128x16-8w4s/sigmoid, or sm_80/linear_fwd/tf32/..."""
        parts = [self.target.name, self.kernel, "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")]
        return "/".join([*parts, *([] if self.tile is None else [tile_name(self.tile)]), self.variant])

    @property
    def entry(self) -> KernelCases:
        """The kernel's entry in the registry."""
        return registry()[self.kernel]

    @property
    def aligned(self) -> bool:
        """Whether all operands could be loaded 16 bytes at a time."""
        return self.entry.aligned(self.variant, self.dtype, self.tile)

    def run(self, **simulation: Any) -> list[Launch]:
        """The launches that the launcher makes on the simulated target, by default assembled and recorded only."""
        simulation.setdefault("assemble", not simulation.get("execute"))
        with _allowing(self.tf32), self.target.simulated(**simulation) as gpu, self.entry.force(self.tile):
            self.entry.variants[self.variant](self.dtype, self.tile)
        return gpu.launches


@contextmanager
def _allowing(tf32: bool) -> Iterator[None]:
    """With ``tf32``, torch allows tf32 products meanwhile; else it says what it said."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if tf32:
            set_matmul("tf32")
        yield
    finally:
        set_matmul(before)


def tile_name(tile: Any) -> str:
    """A ``configs.Tile`` is written as 128x128x16-8w4s, any other tile as its fields."""
    values = tuple(tile)
    if hasattr(tile, "num_stages"):
        return "x".join(map(str, values[:3])) + f"-{tile.num_warps}w{tile.num_stages}s"
    return "x".join(map(str, values))


@lru_cache
def registry() -> dict[str, KernelCases]:
    """Every launcher of the kernels by name."""
    from . import elementwise_cases, gemm_cases, loss_cases, softmax_cases, step_cases

    families = (gemm_cases, elementwise_cases, softmax_cases, loss_cases, step_cases)
    return {kernel: entry for family in families for kernel, entry in family.KERNELS.items()}


def full() -> Iterator[Case]:
    """The whole product."""
    for target in TARGETS.values():
        device = target.device
        for kernel, entry in registry().items():
            for dtype in target.dtypes:
                for variant in entry.variants:
                    for tile in entry.tiles(dtype, device, variant):
                        yield Case(kernel, target, dtype, tile, variant)
            for variant in entry.variants:
                for tile in _tf32_tiles(entry, device, variant):
                    yield Case(kernel, target, torch.float32, tile, variant, tf32=True)


def _tf32_tiles(entry: KernelCases, device: Device, variant: str) -> Sequence[Any]:
    """The tiles of a product where torch allows tf32; none on a device without it, nor for other kernels."""
    if not (entry.gemm and device.has_tf32):
        return ()
    with _allowing(True):
        return entry.tiles(torch.float32, device, variant)


def covering() -> Iterator[Case]:
    """The set that CI compiles; the module docstring says what it covers."""
    for number, target in enumerate(TARGETS.values()):
        device = target.device
        for kernel, entry in registry().items():
            variants = list(entry.variants)
            chosen: set[Case] = set()
            for size, tile, served in _places(entry, target, number):
                hot = kernel in HOT and target.name in FAMILIES and variants[0] in served
                variant = variants[0] if hot else _pick(served, number, kernel, size, tile)
                dtypes = [dtype for dtype in target.dtypes if dtype.itemsize == size]
                chosen.add(Case(kernel, target, _pick(dtypes, number, tile, variant), tile, variant))
            for variant in [v for v in variants if v not in {case.variant for case in chosen}]:
                dtype = _pick(target.dtypes, number, kernel, variant)
                tile = _pick(entry.tiles(dtype, device, variant), number, variant)
                chosen.add(Case(kernel, target, dtype, tile, variant))
            for dtype in [d for d in target.dtypes if d not in {case.dtype for case in chosen}]:
                variant = _pick(variants, number, kernel, dtype)
                tile = _pick(entry.tiles(dtype, device, variant), number, kernel, dtype)
                chosen.add(Case(kernel, target, dtype, tile, variant))
            ends = _tf32_tiles(entry, device, variants[0])
            known = {tile for variant in variants for tile in entry.tiles(torch.float32, device, variant)}
            of_tf32 = {tile: v for v in variants[::-1] for tile in _tf32_tiles(entry, device, v)}
            for tile, variant in of_tf32.items():
                if tile not in known or tile in (*ends[:1], *ends[-1:]):
                    chosen.add(Case(kernel, target, torch.float32, tile, variant, tf32=True))
            cases = sorted(chosen, key=lambda case: case.name)
            yield from (cases[number % 3 :: 3] or cases[:1]) if target.name in SIBLINGS else cases


def _pick(items: Sequence[Any], number: int, *what: object) -> Any:
    """One of ``items``, chosen by a hash of ``what``; the next target gets the next item."""
    return items[(crc32(repr(what).encode()) + number) % len(items)]


def _places(entry: KernelCases, target: Target, number: int) -> list[tuple[int, Any, list[str]]]:
    """(operand size, tile, variants that can have the tile).

    A kernel that ``configs`` tiles has every size with every tile. The tiles of other kernels take the sizes in turn.
    """
    device, variants = target.device, list(entry.variants)
    tiles = entry.tiles(torch.float32, device, variants[0])
    if not isinstance(tiles[0], Tile):
        return [((4, 2)[(i + number) % 2], t, variants) for i, t in enumerate(tiles if len(tiles) > 1 else 2 * tiles)]
    served: dict[tuple[int, Tile], list[str]] = {}
    for dtype in target.dtypes[:2]:
        for variant in variants:
            for tile in entry.tiles(dtype, device, variant):
                served.setdefault((dtype.itemsize, tile), []).append(variant)
    return [(size, tile, names) for (size, tile), names in served.items()]
