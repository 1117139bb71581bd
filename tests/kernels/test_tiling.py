"""kernels/tiling.py: the ways to multiply float32 that the lanes' own devices do not choose."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F

from fastmlp.kernels import linear_dgrad, linear_fwd
from fastmlp.kernels.configs import Tile
from fastmlp.kernels.device import current_device
from tests.compile.cases import registry
from tests.compile.targets import TARGETS
from tests.kernels.products import PRODUCTS, draw
from tests.support.harness import assert_within_budget

M, K, N = 33, 150, 17


@pytest.mark.parametrize("precision", ["tf32x3", "tf32x3 apart"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_split_products(lane, monkeypatch, name, precision):
    """Split products are as accurate as float32, with one accumulator each (as for tcgen05) or one for all three."""
    if current_device().arch == 75:
        pytest.skip("sm_75 has no tf32")
    for stem in ("linear_fwd", "linear_dgrad", "linear_wgrad", "wgrad_update", "head"):
        module = importlib.import_module(f"fastmlp.kernels.{stem}")
        monkeypatch.setattr(module, "input_precision", lambda device, dtype, fma=False: precision)
    a, b = draw(M, K), draw(N, K)
    got = PRODUCTS[name](lane, a, b)
    exact, own = a.double() @ b.double().T, a @ b.T
    assert_within_budget(next(iter(got.values())).cpu(), exact, own, reduction=K)
    if name == "head":  # the head multiplies twice
        dz, own_dz = (z.softmax(1) - F.one_hot(z.new_zeros(M).long(), N) for z in (exact, own))
        assert_within_budget(got["dX"].cpu(), dz @ b.double(), own_dz @ b, reduction=K)


@pytest.mark.execute
@pytest.mark.parametrize("kind", ["fwd", "dgrad"])
def test_slices_are_added_in_a_fixed_order(kind):
    """Of four slices the first and the third are added, the second and the fourth, then both sums."""
    tile = Tile(16, 16, 256, 4, 3, slices=4)
    ones = torch.ones(16, 256)
    with TARGETS["sm_80"].simulated(execute=True), registry()[f"linear_{kind}"].force(tile):
        for slices, expected in (
            ((1e8, 1.0, -1e8, 1.0), 2.0),
            ((1e8, -1e8, 1.0, 1.0), 0.0),
            ((1e8, 1.0, 1.0, -1e8), 0.0),
        ):
            x = torch.zeros(16, 256)
            x[:, ::64] = torch.tensor(slices)
            result = linear_fwd(x, ones, None, "identity")[0] if kind == "fwd" else linear_dgrad(x, ones.T.contiguous())
            assert torch.equal(result, torch.full((16, 16), expected)), slices
