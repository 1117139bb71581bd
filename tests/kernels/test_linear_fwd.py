"""kernels/linear_fwd.py against reference.linear_act in float64."""

from __future__ import annotations

import pytest
import torch

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import linear_fwd
from tests.support.harness import FLOATS, assert_within_budget, nan_like, poisoned

SHAPES = [(1, 1, 1), (17, 63, 130), (63, 17, 1), (33, 130, 17), (64, 64, 64), (5, 1, 40)]  # M, K, N


def case(M: int, K: int, N: int, dtype: torch.dtype, *, bias: bool = True, layout: str = "rows", seed: int = 0):
    """Poisoned (x, weight, bias) of one problem."""
    g = torch.Generator().manual_seed(seed)
    x = poisoned(torch.randn(M, K, generator=g).to(dtype), layout=layout)
    w = poisoned((torch.randn(N, K, generator=g) / K**0.5).to(dtype), layout=layout)
    b = poisoned(torch.randn(N, generator=g).to(dtype)) if bias else None
    return x, w, b


def check(lane, x, w, b, activation, a, z=None):
    """A (and Z) against float64, within the budget that torch sets in the same dtype."""
    K = w.shape[1]
    double = [t if t is None or t.dtype == torch.uint8 else t.double() for t in (x, w, b)]
    for got, f, what in ((a, activation, "A"), (z, "identity", "Z")):
        if got is not None:
            expected = reference.linear_act(*double, f)
            assert_within_budget(got.cpu(), expected, reference.linear_act(x, w, b, f), reduction=K, what=what)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(lane, shape, dtype):
    x, w, b = case(*shape, dtype)
    a, z = linear_fwd(x.to(lane), w.to(lane), b.to(lane), "sigmoid")
    assert z is None
    check(lane, x, w, b, "sigmoid", a)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(lane, activation, dtype):
    x, w, b = case(17, 40, 33, dtype)
    x = x * 3
    save_z = saved_for_grad(activation) == "z"
    a, z = linear_fwd(x.to(lane), w.to(lane), b.to(lane), activation, save_z=save_z)
    assert (z is not None) == save_z
    check(lane, x, w, b, activation, a, z)


def test_tanh_near_zero_keeps_its_digits(lane):
    """Each value is checked by itself; 1 - 2 / (1 + e^2z) would be accurate only relative to the largest value."""
    x = torch.logspace(-12, 1, 66)[:, None] * torch.tensor([1.0, -1.0])
    a, _ = linear_fwd(x.view(-1, 1).to(lane), torch.ones(1, 1).to(lane), None, "tanh")
    expected = torch.tanh(x.view(-1, 1).double())
    assert ((a.cpu().double() - expected).abs() <= 2 * 2.0**-23 * expected.abs()).all()


@pytest.mark.parametrize("layout", ["dense", "columns", "spread"])
def test_strides(lane, layout):
    x, w, b = case(33, 63, 17, torch.float32, layout=layout)
    a, _ = linear_fwd(x.to(lane), w.to(lane), b.to(lane), "tanh")
    check(lane, x, w, b, "tanh", a)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_bias_and_given_outputs(lane, dtype):
    x, w, _ = case(17, 32, 20, dtype, bias=False)
    a = nan_like((17, 20), dtype).to(lane)
    z = nan_like((17, 20), dtype).to(lane)
    got_a, got_z = linear_fwd(x.to(lane), w.to(lane), None, "silu", save_z=True, a=a, z=z)
    assert got_a is a
    assert got_z is z
    check(lane, x, w, None, "silu", a, z)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", [16, 63, 784])
def test_uint8_pixels(lane, K, dtype):
    g = torch.Generator().manual_seed(1)
    x = poisoned(torch.randint(0, 256, (17, K), generator=g, dtype=torch.uint8))
    w = poisoned((torch.randn(33, K, generator=g) / K**0.5).to(dtype))
    a, _ = linear_fwd(x.to(lane), w.to(lane), None, "sigmoid")
    check(lane, x, w, None, "sigmoid", a)


@pytest.mark.parametrize("layout", ["dense", "spread"])
def test_gathered_rows(lane, layout):
    x, w, b = case(40, 33, 17, torch.float32)
    rows = torch.tensor([39, 0, 7, 7, 12, 1, 38, 20, 5])
    a, _ = linear_fwd(x.to(lane), w.to(lane), b.to(lane), "relu", rows=poisoned(rows, layout=layout).to(lane))
    check(lane, x[rows], w, b, "relu", a)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 5, 0), (3, 0, 4)], ids=str)
def test_empty(lane, shape):
    M, K, N = shape
    x, w, b = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    a, _ = linear_fwd(x.to(lane), w.to(lane), b.to(lane), "sigmoid")
    check(lane, x, w, b, "sigmoid", a)
