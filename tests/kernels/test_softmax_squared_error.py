"""kernels/softmax_squared_error.py against the formulas of fastmlp.reference in float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from fastmlp import reference
from fastmlp.kernels import softmax_squared_error, softmax_squared_error_bwd, softmax_squared_error_fwd
from tests.support.harness import assert_within_budget, nan_like, poisoned

# Triton's interpreter is numpy, which warns of the differences of huge logits.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (17, 2), (63, 10), (130, 17), (5, 63), (3, 1000)]  # M, C
OUTSIDE = 7.0


def logits_of(M: int, C: int, dtype: torch.dtype, *, layout: str = "rows") -> Tensor:
    g = torch.Generator().manual_seed(0)
    return poisoned((torch.randn(M, C, generator=g) * 3).to(dtype), layout=layout)


def target_of(M: int, C: int, kind: str, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if kind == "values":
        return poisoned(torch.randn(M, C, generator=g).to(dtype), layout="spread")
    labels = torch.randint(0, C, (M,), generator=g)
    return poisoned(labels if kind == "labels" else labels.to(torch.uint8))


def dense(target: Tensor, C: int) -> Tensor:
    """The target as values [M, C] in float64."""
    if target.is_floating_point():
        return target.double()
    return torch.nn.functional.one_hot(target.long(), C).double()


def by_torch(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch's loss of each row, dZ and dY in z's dtype."""
    z, y = z.detach().clone().requires_grad_(), y.to(z.dtype).requires_grad_()
    loss = ((torch.softmax(z, 1) - y) ** 2).sum(1)
    loss.backward(g.to(loss.dtype).expand_as(loss))
    return loss.detach(), z.grad, y.grad  # type: ignore[return-value]


def check(lane, z: Tensor, target: Tensor, *, scale: float = 0.125) -> None:
    C = z.shape[1]
    y = dense(target, C)
    expected = reference.softmax_squared_error(z.double(), y)
    g = torch.linspace(-1, 2, z.shape[0])
    torch_loss, torch_dz, torch_dy = by_torch(z, y, g * scale)
    dz_expected, dy_expected = reference.softmax_squared_error_backward(g.double() * scale, z.double(), y)

    before = z.clone()
    rows = softmax_squared_error_fwd(z.to(lane), target.to(lane)).cpu()
    assert_within_budget(rows, expected, torch_loss, reduction=C, what="loss of each row")
    total = softmax_squared_error_fwd(z.to(lane), target.to(lane), scale=scale).cpu()
    torch_total = torch_loss.sum() * scale
    assert_within_budget(total, expected.sum() * scale, torch_total, reduction=z.numel(), what="loss")
    dz, dy = softmax_squared_error_bwd(
        g.to(lane), z.to(lane), target.to(lane), scale=scale, want_dy=target.is_floating_point()
    )
    assert dz is not None
    assert_within_budget(dz.cpu(), dz_expected, torch_dz, reduction=C, what="dZ")
    if dy is not None:
        assert_within_budget(dy.cpu(), dy_expected, torch_dy, reduction=C, what="dY")

    # One pass, into memory that must not change around it.
    memory = torch.full((z.shape[0] + 2, C + 6), OUTSIDE, dtype=z.dtype).to(lane)
    out = memory[1:-1, 3:-3]
    out.fill_(math.nan)
    loss = nan_like((z.shape[0],), torch.float32).to(lane)
    got = softmax_squared_error(z.to(lane), target.to(lane), scale=scale, loss=loss, dz=out)
    assert got[0] is loss
    assert got[1] is out
    _, torch_dz, _ = by_torch(z, y, torch.tensor(scale))
    dz_expected, _ = reference.softmax_squared_error_backward(torch.tensor(scale).double(), z.double(), y)
    assert_within_budget(loss.cpu(), expected, torch_loss, reduction=C, what="loss, one pass")
    assert_within_budget(out.cpu(), dz_expected, torch_dz, reduction=C, what="dZ, one pass")
    outside = memory.cpu()
    outside[1:-1, 3:-3] = OUTSIDE
    assert (outside == OUTSIDE).all(), "written outside dZ"
    assert torch.equal(z, before), "the logits are the caller's"


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["labels", "values"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(lane, shape, kind):
    check(lane, logits_of(*shape, torch.float32), target_of(*shape, kind, torch.float32))


@pytest.mark.parametrize("kind", ["uint8 labels", "values"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_dtypes(lane, dtype, kind):
    check(lane, logits_of(63, 10, dtype, layout="dense"), target_of(63, 10, kind, dtype))


@pytest.mark.parametrize("layout", ["columns", "spread"])
def test_strides(lane, layout):
    check(lane, logits_of(40, 10, torch.float32, layout=layout), target_of(40, 10, "labels", torch.float32))


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_rows_longer_than_a_block(lane, monkeypatch, kind):
    module = importlib.import_module("fastmlp.kernels.softmax_squared_error")
    monkeypatch.setattr(module, "WHOLE_ROW", 32)
    monkeypatch.setattr(module, "BLOCK_C", 32)
    check(lane, logits_of(3, 230, torch.float32), target_of(3, 230, kind, torch.float32))


def test_real_long_rows(lane):
    check(lane, logits_of(2, 10_007, torch.float32), target_of(2, 10_007, "labels", torch.float32))


def test_upstream_of_one_number(lane):
    z, target = logits_of(17, 10, torch.float32), target_of(17, 10, "labels", torch.float32)
    dz, dy = softmax_squared_error_bwd(torch.tensor(0.5).to(lane), z.to(lane), target.to(lane), scale=0.25)
    _, one_pass = softmax_squared_error(z.to(lane), target.to(lane), scale=0.125)
    assert dz is not None
    assert dy is None
    assert torch.equal(dz.cpu(), one_pass.cpu())


def test_no_jacobian_in_the_arithmetic(lane):
    """The kernel against the explicit C x C Jacobian of "Explanatory Notes for 6.390": dZ = J^T 2 (p - y)."""
    z, target = logits_of(5, 10, torch.float32), target_of(5, 10, "labels", torch.float32)
    p = torch.softmax(z.double(), 1)
    jacobian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = (jacobian.transpose(1, 2) @ (2 * (p - dense(target, 10))).unsqueeze(2)).squeeze(2)
    _, dz = softmax_squared_error(z.to(lane), target.to(lane))
    torch.testing.assert_close(dz.cpu().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("whole_row", [8192, 2], ids=["whole", "blocks"])
def test_label_out_of_range_is_nan_in_its_row(lane, monkeypatch, whole_row):
    module = importlib.import_module("fastmlp.kernels.softmax_squared_error")
    monkeypatch.setattr(module, "WHOLE_ROW", whole_row)
    monkeypatch.setattr(module, "BLOCK_C", 16)
    z = logits_of(4, 10, torch.float32)
    loss, dz = softmax_squared_error(z.to(lane), torch.tensor([0, 10, -1, 9]).to(lane))
    assert loss.cpu().isnan().tolist() == [False, True, True, False]
    assert dz.cpu().isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("whole_row", [8192, 2], ids=["whole", "blocks"])
def test_infinite_and_huge_logits(lane, monkeypatch, whole_row):
    """A logit of -inf has probability 0; logits near 1e4 keep their differences."""
    module = importlib.import_module("fastmlp.kernels.softmax_squared_error")
    monkeypatch.setattr(module, "WHOLE_ROW", whole_row)
    monkeypatch.setattr(module, "BLOCK_C", 16)
    z = torch.tensor([[-math.inf, 0.0, 1.0], [1e4, 1e4 - 2, 1e4 + 1], [3e38, -3e38, 0.0]])
    y = torch.tensor([2, 1, 0])
    loss, dz = softmax_squared_error(z.to(lane), y.to(lane))
    expected = reference.softmax_squared_error(z.double(), dense(y, 3))
    dz_expected, _ = reference.softmax_squared_error_backward(torch.tensor(1.0).double(), z.double(), dense(y, 3))
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dz.cpu().double(), dz_expected, rtol=1e-6, atol=1e-7)


def test_empty(lane):
    loss, dz = softmax_squared_error(torch.empty(0, 10).to(lane), torch.empty(0, dtype=torch.long).to(lane))
    assert loss.shape == (0,)
    assert dz.shape == (0, 10)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "values"])
@pytest.mark.parametrize("classes", [10, 100])
def test_targets_gathered_and_a_factor_on_the_device(lane, monkeypatch, labels, classes):
    """Rows of 100 classes are split, as rows too long for one program are."""
    module = importlib.import_module("fastmlp.kernels.softmax_squared_error")
    monkeypatch.setattr(module, "WHOLE_ROW", 64)
    monkeypatch.setattr(module, "BLOCK_C", 64)
    g = torch.Generator().manual_seed(0)
    z, rows = logits_of(9, classes, torch.float16), torch.randint(0, 12, (9,), generator=g).to(lane)
    y = (torch.randint(0, classes, (12,), generator=g) if labels else torch.rand(12, classes, generator=g)).to(lane)
    got = softmax_squared_error(z.to(lane), y, scale=0.1, factor=torch.tensor(1024.0).to(lane), rows=rows)
    want = softmax_squared_error(z.to(lane), y[rows], scale=0.1 * 1024)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
