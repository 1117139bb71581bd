"""NaN and infinities in every kernel, with the bits that GPUs give NaN.

An operation on a CPU makes the NaN 0x7fc00000. An operation on a GPU makes the NaN 0x7fffffff, and its negation is
0xffffffff. Code that computes with the bits of floating-point numbers must keep every one of these a NaN, although the
largest wrap around in an integer addition.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from fastmlp.kernels import (
    activation_bwd,
    cross_entropy,
    cross_entropy_fwd,
    elementwise_loss,
    head,
    linear_fwd,
    softmax_squared_error,
)
from fastmlp.kernels.device import Device, current_device, input_precision
from fastmlp.kernels.tiling import _tf32
from tests.kernels.products import PRODUCTS, draw
from tests.support.precision import set_matmul

# The interpreter is numpy, which warns of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

PATTERNS = {"CPU": 0x7FC00000, "GPU": 0x7FFFFFFF, "GPU, negated": 0xFFFFFFFF}
M, K, N = 33, 40, 17


def number(bits: int) -> torch.Tensor:
    """The float32 with these bits, as a 0-d tensor, because Python's float would not keep the bits."""
    return torch.tensor(bits - ((bits >> 31) << 32), dtype=torch.int32).view(torch.float32)


@pytest.fixture(params=["ieee", "tf32"])
def precision(request, default_precision, monkeypatch):
    """Torch's setting for float32 products. The interpreter has no tf32, but rounds and splits the operands too."""
    monkeypatch.setattr(Device, "has_tf32", property(lambda self: self.backend != "hip" and self.arch != 75))
    set_matmul(request.param)
    return request.param


@pytest.mark.everywhere
@pytest.mark.parametrize("name", PRODUCTS)
def test_nan_in_a_product(lane, precision, name):
    """The result has NaN in the row or column whose operand has NaN, and nowhere else."""
    for pattern, bits in PATTERNS.items():
        a, b = draw(M, K), draw(N, K)
        a[3, 7] = number(bits)
        for what, got in PRODUCTS[name](lane, a, b).items():
            nan = got.cpu().view(M, -1).isnan()
            assert nan[3].all(), f"{pattern}: NaN was lost on its way to {what}"
            assert nan.sum() == nan[3].numel(), f"{pattern}: NaN in other rows of {what}"
        a, b = draw(M, K), draw(N, K)
        b[5, 2] = number(bits)
        nan = next(iter(PRODUCTS[name](lane, a, b).values())).cpu().isnan()
        assert nan[:, 5].all(), f"{pattern}: NaN was lost"
        assert nan.sum() == M, f"{pattern}: NaN in other columns"


@pytest.mark.everywhere
@pytest.mark.parametrize("name", PRODUCTS)
def test_infinities_in_a_product(lane, precision, name):
    """Infinities give torch's results, but NaN where float32 operands are split (inf - inf, see ``tiling.dot``)."""
    split = input_precision(current_device(), torch.float32).startswith("tf32x3")
    for infinity in (math.inf, -math.inf):
        a, b = draw(M, K), draw(N, K)
        a[3, 7] = infinity
        got = next(iter(PRODUCTS[name](lane, a, b).values())).cpu()
        assert got[torch.arange(M) != 3].isfinite().all()
        expected = torch.full((N,), math.nan) if split else infinity * b[:, 7].sign()
        torch.testing.assert_close(got[3], expected, equal_nan=True)


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, _tf32(tl.load(x_ptr + offs), True))


@pytest.mark.everywhere
def test_rounding_to_tf32(lane):
    """A value is rounded to the nearest, ties to either side. NaN stays NaN; infinities and 0 stay as they are."""
    if current_device().arch == 75:
        pytest.skip("sm_75 has no tf32")
    special = [*PATTERNS.values(), 0x7F800000, 0xFF800000, 0, 0x80000000, 1, 0x3F801000, 0x3F803000, 0x3F802FFF]
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F7FE000, (256,), generator=g) | (torch.randint(0, 2, (256,), generator=g) << 31)
    bits[: len(special)] = torch.tensor(special)
    x = (bits - ((bits >> 31) << 32)).int().view(torch.float32)
    y = torch.zeros(256).to(lane)
    _round_kernel[(1,)](x.to(lane), y, BLOCK=256)
    y = y.cpu()
    assert torch.equal(y.isnan(), x.isnan())
    infinite = x.isinf()
    assert torch.equal(y[infinite], x[infinite])
    finite = x.isfinite()
    x, y = x[finite], y[finite]
    assert (y.view(torch.int32) & 0x1FFF == 0).all(), "more than 10 fraction bits"
    cut = x.view(torch.int32) & -0x2000
    near, far = (t.view(torch.float32).double() for t in (cut, cut + 0x2000))  # towards 0, and away from it
    error = (y.double() - x.double()).abs()
    assert torch.equal(error, torch.minimum((x.double() - near).abs(), (far - x.double()).abs()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nan_in_the_losses(lane, pattern):
    """A row with NaN has loss NaN, gradient NaN and no correct prediction; other rows are unaffected."""
    z, y = draw(9, 10), torch.arange(9)
    z[3, 4] = number(PATTERNS[pattern])
    z[y != 3, y[y != 3]] = 9.0
    correct = torch.full((9,), -1, dtype=torch.int32).to(lane)
    results = [
        *cross_entropy(z.to(lane), y.to(lane), correct=correct),
        *softmax_squared_error(z.to(lane), y.to(lane)),
    ]
    assert correct.tolist() == [int(row != 3) for row in range(9)]
    h = z.clone()
    weight = torch.eye(10)
    correct.fill_(-1)
    results += head(h.to(lane), weight.to(lane), None, y.to(lane), correct=correct)
    assert correct.tolist() == [int(row != 3) for row in range(9)]
    for got in results:
        nan = got.cpu().view(9, -1).isnan()
        assert nan[3].all()
        assert nan.sum() == nan[3].numel()
    assert cross_entropy_fwd(z.to(lane), y.to(lane))[0].isnan()
    loss, gradient = elementwise_loss(z.to(lane), draw(9, 10).to(lane), "mse", scale=1.0)[:2]
    assert loss.isnan().any()
    assert gradient.cpu().isnan().nonzero().tolist() == [[3, 4]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nan_in_the_activations(lane, pattern):
    z = draw(3, 5)
    z[1, 2] = number(PATTERNS[pattern])
    for activation in ("identity", "sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu"):
        a, _ = linear_fwd(z.to(lane), torch.eye(5).to(lane), None, activation)
        assert a.cpu().isnan().nonzero().tolist() == [[1, n] for n in range(5)], activation
        if activation != "identity":
            dz = activation_bwd(torch.ones(3, 5).to(lane), z.to(lane), activation)
            expected = [] if activation.endswith("relu") else [[1, 2]]  # their f' is constant everywhere
            assert dz.cpu().isnan().nonzero().tolist() == expected, activation
