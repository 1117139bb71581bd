"""kernels/linear_dgrad.py against reference formulas in float64."""

from __future__ import annotations

import pytest
import torch

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import linear_dgrad
from fastmlp.kernels.column_sums import ColumnSums
from tests.support.harness import FLOATS, assert_within_budget, nan_like, poisoned

SHAPES = [(1, 1, 1), (17, 63, 130), (63, 17, 1), (33, 130, 17), (64, 64, 64), (5, 40, 1)]  # M, K, N


def case(M: int, K: int, N: int, dtype: torch.dtype, *, layout: str = "rows"):
    """Poisoned (dz, weight) and a pre-activation z [M, K] of the layer below."""
    g = torch.Generator().manual_seed(0)
    dz = poisoned(torch.randn(M, N, generator=g).to(dtype), layout=layout)
    w = poisoned((torch.randn(N, K, generator=g) / N**0.5).to(dtype), layout=layout)
    return dz, w, (2 * torch.randn(M, K, generator=g)).to(dtype)


def expected(dz, w, z, activation):
    """(float64 truth, torch in the same dtype) of (dZ W) * f'(z)."""
    truth, own = (
        reference.linear_dgrad(a, b) * reference.activation_grad(c, activation)
        for a, b, c in ((dz.double(), w.double(), z.double()), (dz, w, z))
    )
    return truth, own


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(lane, shape, dtype):
    dz, w, z = case(*shape, dtype)
    dx = linear_dgrad(dz.to(lane), w.to(lane))
    assert_within_budget(dx.cpu(), *expected(dz, w, z, "identity"), reduction=shape[2])


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_the_layer_below(lane, activation, dtype):
    dz, w, z = case(17, 33, 40, dtype)
    kept = {"z": z, "a": reference.activate(z, activation), None: None}[saved_for_grad(activation)]
    saved = None if kept is None else poisoned(kept, layout="dense").to(lane)
    dx = linear_dgrad(dz.to(lane), w.to(lane), saved, activation, dx=nan_like((17, 33), dtype).to(lane))
    # f' from a rounded A differs from f' of z by A's rounding. Torch computes f' from a rounded A too.
    truth, own = expected(dz, w, z, activation)
    if saved_for_grad(activation) == "a":
        own = torch.autograd.grad(reference.activate(z.requires_grad_(), activation), z, reference.linear_dgrad(dz, w))[
            0
        ]
    assert_within_budget(dx.cpu(), truth, own, reduction=40)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5), (70, 63, 17), (33, 150, 40)], ids=str)
def test_sums_of_rows(lane, shape, dtype):
    """The blocks' sums add up to those of dX as it is stored, and nothing else is written."""
    dz, w, z = case(*shape, dtype)
    sums = ColumnSums(shape[0], shape[1], lane)
    sums.values.fill_(float("nan"))
    dx = linear_dgrad(dz.to(lane), w.to(lane), z.to(lane), "gelu", sums=sums).cpu()
    got = sums.values.cpu()
    assert sums.blocks > 0
    assert got[sums.blocks :].isnan().all()
    assert got[:, shape[1] :].isnan().all()
    assert_within_budget(
        got[: sums.blocks, : shape[1]].sum(0), dx.double().sum(0), dx.float().sum(0), reduction=shape[0]
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_sums_leave_out_rows_beyond_the_last(lane, dtype):
    """An infinite weight times a row that is not there would make the sum NaN."""
    dz, w, _ = case(17, 20, 16, dtype)
    dz[:, 0], w[0, 3] = 1.0, float("inf")
    sums = ColumnSums(17, 20, lane)
    linear_dgrad(dz.to(lane), w.to(lane), sums=sums)
    assert (sums.values[: sums.blocks, 3].cpu() == float("inf")).all()


@pytest.mark.parametrize("layout", ["dense", "columns", "spread"])
def test_strides(lane, layout):
    dz, w, z = case(33, 63, 17, torch.float32, layout=layout)
    dx = linear_dgrad(dz.to(lane), w.to(lane))
    assert_within_budget(dx.cpu(), *expected(dz, w, z, "identity"), reduction=17)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 4), (3, 5, 0)], ids=str)
def test_empty(lane, shape):
    M, K, N = shape
    dx = linear_dgrad(torch.ones(M, N, device=lane), torch.ones(N, K, device=lane))
    assert torch.equal(dx.cpu(), torch.zeros(M, K))
