"""Ragged outputs of the largest tiles, whose epilogues take a block in parts.

The rule gives such tiles to outputs larger than a simulated GPU can compute, so these tests force them on small
outputs. ``test_traffic`` tests full blocks of every tile.
"""

from __future__ import annotations

import pytest
import torch

from fastmlp import kernels, reference
from fastmlp.kernels.configs import all_tiles
from tests.compile.cases import registry
from tests.compile.targets import TARGETS
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.execute

#: Two by two blocks of 128 x 128; the last has 72 rows and, in its right half, 16 columns.
ROWS, COLS, DEPTH = 200, 208, 48


@pytest.fixture(params=["sm_80-float32", "sm_80-bfloat16", "sm_120-float32", "sm_120-float16"])
def setting(request):
    name, dtype = request.param.split("-")
    return TARGETS[name], getattr(torch, dtype)


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def test_linear_fwd(setting):
    target, dtype = setting
    x, w, b = draw(dtype, ROWS, DEPTH), draw(dtype, COLS, DEPTH), draw(dtype, COLS)
    tile = next(all_tiles("fwd", dtype, target.device, wide=True))
    with target.simulated(execute=True), registry()["linear_fwd"].force(tile):
        a, z = kernels.linear_fwd(x, w, b, "silu", save_z=True)
    for got, activation in ((a, "silu"), (z, "identity")):
        exact, own = (reference.linear_act(x.to(d), w.to(d), b.to(d), activation) for d in (torch.float64, dtype))
        assert_within_budget(got, exact, own, reduction=DEPTH)


def test_linear_dgrad(setting):
    target, dtype = setting
    dz, w, a = draw(dtype, ROWS, DEPTH), draw(dtype, DEPTH, COLS), draw(dtype, ROWS, COLS).sigmoid()
    tile = next(all_tiles("dgrad", dtype, target.device, wide=True))
    with target.simulated(execute=True), registry()["linear_dgrad"].force(tile):
        dx = kernels.linear_dgrad(dz, w, a, "sigmoid")
    exact, own = ((dz.to(d) @ w.to(d)) * (a.to(d) * (1 - a.to(d))) for d in (torch.float64, dtype))
    assert_within_budget(dx, exact, own, reduction=DEPTH)
