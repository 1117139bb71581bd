"""Memory traffic and products of every tile of every matrix product, counted in the executed code.

Operands are contiguous and every block is full. Each request can therefore consist of whole 32-byte sectors, shared
memory can be read and written without bank conflicts, and no product needs to be computed twice.
"""

from __future__ import annotations

import pytest
import torch

from fastmlp import kernels, reference
from fastmlp.kernels.configs import Tile, all_tiles
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.wgrad_update import wgrad_update
from tests.compile.cases import registry, tile_name
from tests.compile.targets import TARGETS, Target
from tests.ptxsim import TRITON, Stats, run_triton
from tests.ptxsim.samples.linear import k_linear
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.execute

#: Sectors moved, divided by the fewest that the same requests could move.
MOST_SECTORS = 1.1
#: Share of the shared-memory wavefronts that bank conflicts cause.
MOST_CONFLICTS = 0.1


def _cases(*kinds: str) -> list[object]:
    cases = []
    for target in (TARGETS["sm_80"], TARGETS["sm_120"]):
        for dtype in (torch.float32, torch.bfloat16):
            for kind in kinds:
                for tile in all_tiles(kind, dtype, target.device, wide=True):
                    name = f"{target.name}-{kind}-{str(dtype).removeprefix('torch.')}-{tile_name(tile)}"
                    cases.append(pytest.param(target, kind, dtype, tile, id=name))
    return cases


@pytest.mark.parametrize(("target", "kind", "dtype", "tile"), _cases("fwd", "dgrad", "wgrad"))
def test_sectors_and_bank_conflicts(target: Target, kind: str, dtype: torch.dtype, tile: Tile) -> None:
    """Two by two tiles of output, three blocks deep; the values of the product are checked too."""
    g = torch.Generator().manual_seed(0)
    rows, cols, depth = 2 * tile.rows, 2 * tile.cols, 3 * tile.depth

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    with target.simulated(execute=True) as gpu, registry()[f"linear_{kind}"].force(tile):
        if kind == "fwd":
            operands = draw(rows, depth), draw(cols, depth), draw(cols)
            result, _ = kernels.linear_fwd(*operands, "sigmoid")
            expected, own = (
                reference.linear_act(*(t.to(d) for t in operands), "sigmoid") for d in (torch.float64, dtype)
            )
        elif kind == "dgrad":
            dz, w, a = draw(rows, depth), draw(depth, cols), draw(rows, cols)
            result = kernels.linear_dgrad(dz, w, a, "tanh")
            expected, own = ((dz.to(d) @ w.to(d)) * (1 - a.to(d) * a.to(d)) for d in (torch.float64, dtype))
        else:
            dz, x = draw(depth, rows), draw(depth, cols)
            result, _ = kernels.linear_wgrad(dz, x)
            expected, own = (dz.to(d).T @ x.to(d) for d in (torch.float64, dtype))
    assert_within_budget(result, expected, own, reduction=depth)
    (launch,) = gpu.launches
    assert launch.stats is not None
    if TRITON >= (3, 8):  # the tables were made with 3.8; 3.6 sums the bias gradient with bank conflicts
        check(launch.stats)
    check_products(launch.stats, rows * cols * depth, dtype, tile)


@pytest.mark.parametrize(("target", "kind", "dtype", "tile"), _cases("update"))
def test_products_of_the_update(target: Target, kind: str, dtype: torch.dtype, tile: Tile) -> None:
    """Two by two tiles of a weight, three blocks of samples; the kernel's own tests check the values."""
    g = torch.Generator().manual_seed(0)
    n, k, m = 2 * tile.rows, 2 * tile.cols, 3 * tile.depth
    weight, dz, x = (torch.randn(shape, generator=g) for shape in ((n, k), (m, n), (m, k)))
    layout = Layout([Layer(weight, None, None if dtype == torch.float32 else weight.to(dtype), None)])
    with target.simulated(execute=True) as gpu, registry()["wgrad_update"].force(tile):
        wgrad_update(layout, [dz.to(dtype)], [x.to(dtype)], "sgd", torch.tensor((0.1, *[0.0] * 7)))
    (launch,) = gpu.launches
    assert launch.stats is not None
    check_products(launch.stats, n * k * m, dtype, tile)


def check_products(stats: Stats, multiplications: int, dtype: torch.dtype, tile: Tile) -> None:
    """Each multiplication is made once; a float32 product is three products of tf32 parts, or multiply-adds."""
    products = 0 if tile.fma else 3 if dtype == torch.float32 else 1
    assert stats.mma_flops == 2 * multiplications * products


def check(stats: Stats) -> None:
    """The limits on one launch."""
    requests = (stats.global_load, stats.async_copy, stats.global_store)
    sectors, fewest = (sum(kind[key] for kind in requests) for key in ("sectors", "min_sectors"))
    assert sectors <= MOST_SECTORS * fewest, f"{sectors} sectors where {fewest} suffice: {stats.hot_global[:3]}"
    shared = (stats.shared_load, stats.shared_store)
    wavefronts, conflicts = (sum(kind[key] for kind in shared) for key in ("wavefronts", "conflicts"))
    assert wavefronts > 0, "a tensor-core product made no access to shared memory"
    assert conflicts <= MOST_CONFLICTS * wavefronts, f"{conflicts} of {wavefronts} wavefronts: {stats.hot_shared[:3]}"


def test_the_limits_refuse_bank_conflicts() -> None:
    """The executor's own sample multiplies float32 by FMA, and most of its shared-memory reads collide."""
    x, w, b, o = (torch.ones(64, 64) for _ in range(4))
    stats = run_triton(
        k_linear,
        {"x": x, "w": w, "b": b[0], "o": o, "M": 64, "N": 64, "K": 64}
        | {"sxm": 64, "sxk": 1, "swn": 64, "swk": 1, "som": 64, "son": 1},
        {"ACT": "identity", "BM": 64, "BN": 64, "BK": 32, "PREC": "ieee"},
        arch=80,
    )
    with pytest.raises(AssertionError, match="wavefronts"):
        check(stats)


def test_the_limits_refuse_scattered_stores() -> None:
    """A product whose result has its columns apart writes one sector per element."""
    dz, x = torch.ones(64, 64), torch.ones(64, 32)
    dw = torch.empty(64, 8 * 32)[:, ::8]
    stats = run_triton(
        k_linear,
        {"x": dz, "w": x.T.contiguous(), "b": torch.zeros(32), "o": dw, "M": 64, "N": 32, "K": 64}
        | {"sxm": 64, "sxk": 1, "swn": 64, "swk": 1, "som": 256, "son": 8},
        {"ACT": "identity", "BM": 64, "BN": 32, "BK": 32, "PREC": "tf32"},
        arch=80,
    )
    with pytest.raises(AssertionError, match="sectors"):
        check(stats)
