"""kernels/reduce_sum.py against the sum in float64."""

from __future__ import annotations

import pytest
import torch

from fastmlp.kernels.reduce_sum import BLOCK, reduce_sum
from tests.support.harness import FLOATS, assert_within_budget, nan_like, poisoned


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 130])
def test_counts(lane, count, dtype):
    g = torch.Generator().manual_seed(count)
    partial = poisoned(torch.rand(count, generator=g), layout="dense")
    out = nan_like((), dtype).to(lane)
    reduce_sum(partial.to(lane), out, 0.37)
    own = (partial.sum() * 0.37).to(dtype)
    assert_within_budget(out.cpu(), partial.double().sum() * 0.37, own, reduction=max(1, count))


def test_two_runs_are_equal_bit_by_bit(lane):
    partial = torch.randn(5 * BLOCK + 3, generator=torch.Generator().manual_seed(0)).to(lane)
    outs = [torch.empty((), device=lane) for _ in range(2)]
    for out in outs:
        reduce_sum(partial, out, 1.0)
    assert torch.equal(*outs)


def test_non_finite_values_reach_the_sum(lane):
    partial = torch.ones(BLOCK + 5)
    partial[BLOCK + 2] = float("nan")
    out = torch.zeros((), device=lane)
    reduce_sum(partial.to(lane), out, 1.0)
    assert out.isnan().item()
