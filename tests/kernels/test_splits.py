"""Which tile and how many splits a weight gradient gets: the programs against the room for them."""

from __future__ import annotations

import pytest
import torch

from fastmlp.kernels.configs import LARGEST_UPDATED, Tile, cdiv, gemm_tile, splits
from fastmlp.kernels.device import Device

LAYERS = ((512, 784), (512, 512), (10, 512))
DEVICES = [
    Device("cuda", 90, 132, 232448),
    Device("cuda", 80, 108, 166912),
    Device("cuda", 89, 128, 101376),
    Device("cuda", 100, 148, 232448),
    Device("cuda", 75, 40, 65536),
    Device("hip", "gfx942", 304, 65536),
]


def chosen(device: Device, m: int, dtype: torch.dtype, layers=LAYERS, *, wide: bool = True) -> tuple[Tile, int, int]:
    """(tile, splits, programs) of the update."""
    n, k = max(layers, key=lambda shape: shape[0] * shape[1])
    tile = gemm_tile("update", n, k, m, dtype, device, wide=wide, layers=layers)
    count = splits("update", tile, layers, m, dtype, device)
    return tile, count, count * sum(cdiv(n, tile.rows) * cdiv(k, tile.cols) for n, k in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=lambda d: str(d.arch))
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_splits_fill_the_multiprocessors(device, dtype, wide):
    """Up to 1,024 rows nothing is split, and beyond no multiprocessor has much more to do than the average."""
    for m in (64, 512, 1024):
        assert chosen(device, m, dtype, wide=wide)[1] == 1
    for m in (4096, 16384, 65536):
        _, count, programs = chosen(device, m, dtype, wide=wide)
        assert m // count >= 256
        busiest = cdiv(programs, device.multiprocessors)
        assert programs >= 2 / 3 * busiest * device.multiprocessors, f"{programs} programs at batch {m}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_too_large_for_an_optimizer_are_split(dtype):
    for m in (64, 1100, 2048, 4096, 65536):
        for layers in (LAYERS, ((4096, 4096),), ((64, 64),), ((2048, 784), (2048, 2048))):
            tile, count, _ = chosen(DEVICES[0], m, dtype, layers)
            assert count > 1 or tile.rows * tile.cols <= LARGEST_UPDATED


def test_programs_beside_the_tiles_are_counted():
    """140 programs on 132 multiprocessors would take as long as 264."""
    tile, device = Tile(128, 128, 64, 8, 3), DEVICES[0]
    for beside in range(20):
        count = splits("wgrad", tile, ((512, 784),), 4096, torch.bfloat16, device, beside=beside)
        busiest = cdiv(count * (28 + beside), 132)
        assert count * (28 + beside) >= 2 / 3 * busiest * 132


@pytest.mark.launch
def test_partial_sums_have_room_for_any_precision():
    """A user may allow tf32 after the first step, whose batch is then split more often."""
    from fastmlp.kernels.layout import Layer, Layout
    from fastmlp.kernels.wgrad_update import _plan, workspace
    from tests.ptxsim import SimulatedGPU

    layout = Layout([Layer(torch.zeros(n, k), torch.zeros(n)) for n, k in LAYERS])
    with SimulatedGPU(80, execute=False):
        counts = [_plan(layout, 4096, torch.float32, wide=True, summed=True, tf32=tf32)[1] for tf32 in (False, True)]
        partial = workspace(layout, 4096, torch.float32, torch.device("cpu"), direct=True)
    assert counts[0] < counts[1]
    assert partial.shape[0] >= counts[1]
