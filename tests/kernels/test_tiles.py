"""The results of every tile that configs can choose, on a ragged problem of several programs.

The other tests take the tile that the rule chooses for their shape, and the rule chooses large tiles for large shapes
only.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from fastmlp import reference
from fastmlp.kernels import configs, linear_dgrad, linear_fwd, linear_wgrad
from fastmlp.kernels.configs import Tile
from fastmlp.kernels.device import Device, current_device
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.optimizer import HYPER_COLUMNS
from fastmlp.kernels.wgrad_update import wgrad_update
from tests.compile.cases import registry
from tests.support.harness import assert_within_budget, poisoned

KINDS = ("fwd", "dgrad", "wgrad")
CONTIGUOUS = {"fwd": ("depth",), "dgrad": ("depth", "cols"), "wgrad": ("rows", "cols")}


def shapes(kind: str, tile: Tile, *, wide: bool, full: bool) -> Sequence[tuple[int, int, int]]:
    """(rows, cols, depth) of the output and its reduction: a full tile plus a few rows, columns and steps.

    Where operands are ``wide``, their contiguous dimensions have 16 more than the tile.
    """
    contiguous = CONTIGUOUS[kind] if wide else ()
    more = {"rows": 3, "cols": 5, "depth": tile.depth + 7} | dict.fromkeys(contiguous, 16)
    ragged = (tile.rows + more["rows"], tile.cols + more["cols"], tile.depth + more["depth"])
    if not full:
        return [ragged]
    others = [(tile.rows, tile.cols, tile.depth), (2 * tile.rows, 2 * tile.cols, 4096)]
    return [ragged, *others, *([] if wide else [(1, 1, 1), (257, 129, 63)])]


def check(kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, lane: torch.device, *, wide: bool) -> None:
    """One product of this output shape and reduction, against float64."""
    g = torch.Generator().manual_seed(rows + cols + depth)

    def draw(*shape: int) -> torch.Tensor:
        values = (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)
        return poisoned(values, pad=16 if wide else 5)

    if kind == "fwd":
        x, w, b = draw(rows, depth), draw(cols, depth), draw(cols)
        actual, _ = linear_fwd(x.to(lane), w.to(lane), b.to(lane), "sigmoid")
        expected, own = (reference.linear_act(x.to(d), w.to(d), b.to(d), "sigmoid") for d in (torch.float64, dtype))
    elif kind == "dgrad":
        dz, w = draw(rows, depth), draw(depth, cols)
        actual = linear_dgrad(dz.to(lane), w.to(lane))
        expected, own = (dz.to(d) @ w.to(d) for d in (torch.float64, dtype))
    else:
        dz, x = draw(depth, rows), draw(depth, cols)
        actual, _ = linear_wgrad(dz.to(lane), x.to(lane))
        expected, own = (dz.to(d).T @ x.to(d) for d in (torch.float64, dtype))
    assert_within_budget(actual.cpu(), expected, own, reduction=depth, what=f"{kind} {rows} x {cols} over {depth}")


def tiles_of(kind: str, dtype: torch.dtype, *, wide: bool, full: bool) -> list[Tile]:
    device = current_device()
    if device.arch == 75 and dtype == torch.bfloat16:
        pytest.skip("sm_75 has no bfloat16")
    tiles = list(configs.all_tiles(kind, dtype, device, wide=wide))
    if not full and dtype.itemsize == 2 and device.arch != 75 and len(tiles) > 1:
        tiles = tiles[dtype == torch.bfloat16 :: 2]  # both 16-bit dtypes have the same tiles; each takes half
    return tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_every_tile(
    lane: torch.device, kind: str, dtype: torch.dtype, wide: bool, pytestconfig: pytest.Config
) -> None:  # fmt: skip
    full = pytestconfig.getoption("--full")
    for tile in tiles_of(kind, dtype, wide=wide, full=full):
        with registry()[f"linear_{kind}"].force(tile):
            for shape in shapes(kind, tile, wide=wide, full=full):
                check(kind, *shape, dtype, lane, wide=wide)


@pytest.mark.parametrize(("arch", "multiprocessors"), [(90, 132), (80, 108), (89, 128), (100, 148), (120, 170)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fwd", "dgrad"])
def test_the_rule_occupies_the_multiprocessors(kind: str, dtype: torch.dtype, arch: int, multiprocessors: int) -> None:
    """The busiest multiprocessor has at most half as many tiles again as the average, at the reference network's sizes.

    The 108 multiprocessors of an A100 do not divide the 128 smallest tiles of 64 rows well. Two such tiles fit one
    multiprocessor.
    """
    device = Device("cuda", arch, multiprocessors, 99 << 10)
    for rows in (64, 128, 256, 512, 1024, 2048, 4096, 16_384, 65_536):
        tile = configs.gemm_tile(kind, rows, 512, 784 if kind == "fwd" else 512, dtype, device, wide=True)
        programs = configs.cdiv(rows, tile.rows) * configs.cdiv(512, tile.cols)
        most = configs.cdiv(programs, multiprocessors)
        assert 3 * programs >= 2 * most * multiprocessors or (arch, rows) == (80, 64), (rows, tile)
        assert tile.num_warps >= 4, (rows, tile)


def test_short_reductions_are_not_sliced() -> None:
    """A step of a sliced tile is longer than the reduction of a tiny layer, most of which would be masked out."""
    h100 = Device("cuda", 90, 132, 227 << 10)
    assert configs.gemm_tile("fwd", 64, 512, 784, torch.float32, h100, wide=True).slices == 4
    assert configs.gemm_tile("fwd", 64, 512, 48, torch.float32, h100, wide=True).slices == 1
    assert configs.gemm_tile("wgrad", 512, 784, 64, torch.float32, h100, wide=True).slices == 1


@pytest.mark.parametrize(
    ("splits", "wide"), [(1, False), (2, False), (0, True)], ids=["updated at once", "partial sums", "wide"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_tile_of_the_update(
    lane: torch.device, dtype: torch.dtype, splits: int, wide: bool, monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """With W = 0 and a learning rate of 1 the update leaves -dW in two layers; programs may share the batch.

    The tiles of wide operands are updated at once and have partial sums in turns.
    """
    module = importlib.import_module("fastmlp.kernels.wgrad_update")
    hyper_row = torch.tensor((1.0, *[0.0] * (HYPER_COLUMNS - 1))).to(lane)
    for i, tile in enumerate(tiles_of("update", dtype, wide=wide, full=pytestconfig.getoption("--full"))):
        monkeypatch.setattr(module, "splits", lambda *args, count=splits or 2 - i % 2, **kwargs: count)
        g = torch.Generator().manual_seed(tile.rows)
        m, widths = 3 * tile.depth + 7, (tile.cols + 5, tile.rows + 3, 5)
        if wide:
            widths = (tile.cols + 16, tile.rows + 16, 16)
        xs, dzs = ([torch.randn(m, n, generator=g).to(dtype) for n in w] for w in (widths[:-1], widths[1:]))
        layers = []
        for k, n in pairwise(widths):
            weight, bias = torch.zeros(n, k).to(lane), torch.zeros(n).to(lane)
            low = (weight.to(dtype), bias.to(dtype)) if dtype.itemsize == 2 else (None, None)
            layers.append(Layer(weight, bias, *low))
        with registry()["wgrad_update"].force(tile):
            wgrad_update(Layout(layers), [z.to(lane) for z in dzs], [x.to(lane) for x in xs], "sgd", hyper_row)
        for layer, dz, x in zip(layers, dzs, xs, strict=True):
            for got, low, (expected, own) in zip(
                (layer.weight, layer.bias),
                (layer.low_weight, layer.low_bias),
                zip(*(reference.linear_wgrad(dz.to(d), x.to(d)) for d in (torch.float64, dtype)), strict=True),
                strict=True,
            ):
                assert got is not None
                assert_within_budget(-got.cpu(), expected, own, reduction=m, what=f"update {tile}")
                assert low is None or torch.equal(low, got.to(dtype))
