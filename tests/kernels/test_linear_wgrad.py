"""kernels/linear_wgrad.py against reference.linear_wgrad in float64."""

from __future__ import annotations

import pytest
import torch

from fastmlp import reference
from fastmlp.kernels import linear_wgrad
from fastmlp.kernels.configs import gemm_tile, splits
from fastmlp.kernels.device import current_device
from tests.support.harness import FLOATS, assert_within_budget, nan_like, poisoned

SHAPES = [(1, 1, 1), (17, 63, 130), (63, 17, 1), (130, 33, 17), (64, 64, 64), (5, 40, 1)]  # M, K, N


def case(M: int, K: int, N: int, dtype: torch.dtype, *, layout: str = "rows"):
    """Poisoned (dz, x)."""
    g = torch.Generator().manual_seed(0)
    dz = poisoned(torch.randn(M, N, generator=g).to(dtype), layout=layout)
    return dz, poisoned(torch.randn(M, K, generator=g).to(dtype), layout=layout)


def check(dz, x, dw, db):
    """Check dW and db against float64, within the budget that torch sets in the same dtype."""
    truth = reference.linear_wgrad(dz.double(), x if x.dtype == torch.uint8 else x.double())
    own = reference.linear_wgrad(dz, x)
    for got, want, torchs, what in zip((dw, db), truth, own, ("dW", "db"), strict=True):
        if got is not None:
            assert_within_budget(got.cpu(), want, torchs, reduction=dz.shape[0], what=what)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(lane, shape, dtype):
    dz, x = case(*shape, dtype)
    _, K, N = shape
    dw, db = nan_like((N, K), dtype).to(lane), nan_like((N,), dtype).to(lane)
    got = linear_wgrad(dz.to(lane), x.to(lane), dw=dw, db=db)
    assert got[0] is dw
    assert got[1] is db
    check(dz, x, dw, db)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_split_over_the_batch(lane, dtype):
    """Programs share each tile's reduction of this long batch, ragged in every dimension; results repeat bit by bit."""
    M, K, N = 1100, 33, 17
    device = current_device()
    tile = gemm_tile("wgrad", N, K, M, dtype, device, wide=False)
    assert splits("wgrad", tile, ((N, K),), M, dtype, device) > 1
    dz, x = case(M, K, N, dtype)
    dw, db = linear_wgrad(dz.to(lane), x.to(lane))
    check(dz, x, dw, db)
    again, again_b = linear_wgrad(dz.to(lane), x.to(lane))
    assert torch.equal(dw, again)
    assert torch.equal(db, again_b)


@pytest.mark.parametrize("layout", ["dense", "columns", "spread"])
def test_strides(lane, layout):
    dz, x = case(33, 63, 17, torch.float32, layout=layout)
    check(dz, x, *linear_wgrad(dz.to(lane), x.to(lane)))


def test_expanded_gradient(lane):
    x = torch.randn(20, 9)
    dz = torch.randn(5).expand(20, 5)
    check(dz, x, *linear_wgrad(dz.to(lane), x.to(lane)))


@pytest.mark.parametrize("layout", ["dense", "spread"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uint8_pixels_gathered(lane, dtype, layout):
    g = torch.Generator().manual_seed(1)
    x = poisoned(torch.randint(0, 256, (50, 63), generator=g, dtype=torch.uint8))
    rows = torch.randint(0, 50, (70,), generator=g)
    dz, _ = case(70, 1, 17, dtype)
    dw, db = linear_wgrad(dz.to(lane), x.to(lane), rows=poisoned(rows, layout=layout).to(lane), bias=False)
    assert db is None
    check(dz, x[rows], dw, None)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 4), (3, 5, 0)], ids=str)
def test_empty(lane, shape):
    M, K, N = shape
    dz, x = torch.ones(M, N), torch.ones(M, K)
    check(dz, x, *linear_wgrad(dz.to(lane), x.to(lane)))
