"""kernels/elementwise_loss.py against the formulas of fastmlp.reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmlp import reference
from fastmlp.base.losses import LOSSES
from fastmlp.kernels import elementwise_loss, elementwise_loss_bwd, elementwise_loss_fwd
from tests.support.harness import assert_within_budget, nan_like, poisoned

# Triton's interpreter is numpy, which warns of log 0, inf - inf and 0 / 0. The border cases are made of these.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SHAPES = [(1, 1), (17, 10), (130, 17), (3, 1000)]


def operands(shape: tuple[int, int], loss: str, dtype: torch.dtype, layout: str = "rows") -> tuple[Tensor, Tensor]:
    """Predictions and targets in the loss's domain."""
    g = torch.Generator().manual_seed(0)
    a, y = 3 * torch.randn(shape, generator=g), 2 * torch.randn(shape, generator=g)
    domain = LOSSES[loss].input
    if domain == "probabilities":
        a = torch.sigmoid(a)
    if domain != "values":
        y = torch.rand(shape, generator=g)
        y[::2] = y[::2].round()
    return poisoned(a.to(dtype), layout=layout), poisoned(y.to(dtype), layout=layout)


def check(lane, a: Tensor, y: Tensor, loss: str) -> None:
    ad, yd = a.double(), y.double()
    g = torch.linspace(-1, 2, a.numel()).view(a.shape)
    expected = reference.elementwise_loss(ad, yd, loss)
    in_dtype = reference.elementwise_loss(a, y, loss)
    rows = elementwise_loss_fwd(a.to(lane), y.to(lane), loss).cpu()
    assert_within_budget(rows, expected, in_dtype, reduction=1, what="loss")
    total = elementwise_loss_fwd(a.to(lane), y.to(lane), loss, scale=0.25).cpu()
    torch_total = in_dtype.sum() * 0.25
    assert_within_budget(total, expected.sum() * 0.25, torch_total, reduction=a.numel(), what="sum")
    da, dy = elementwise_loss_bwd(g.to(lane), a.to(lane), y.to(lane), loss, scale=0.5, want_dy=True)
    for got, grad in ((da, reference.elementwise_loss_grad), (dy, reference.elementwise_loss_target_grad)):
        assert got is not None
        want = 0.5 * g.double() * grad(ad, yd, loss)
        own = (0.5 * g).to(a.dtype) * grad(a, y, loss)
        assert_within_budget(got.cpu(), want, own, reduction=1, what=grad.__name__)
    values, out = nan_like(tuple(a.shape), torch.float32), nan_like(tuple(a.shape), a.dtype)
    values, out = elementwise_loss(a.to(lane), y.to(lane), loss, scale=0.5, loss=values.to(lane), da=out.to(lane))
    assert_within_budget(values.cpu(), expected, in_dtype, reduction=1, what="loss, one pass")
    want = 0.5 * reference.elementwise_loss_grad(ad, yd, loss)
    own = 0.5 * reference.elementwise_loss_grad(a, y, loss)
    assert_within_budget(out.cpu(), want, own, reduction=1, what="dA, one pass")


@pytest.mark.covering
@pytest.mark.parametrize("loss", reference.ELEMENTWISE_LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(lane, shape, loss):
    check(lane, *operands(shape, loss, torch.float32), loss)


@pytest.mark.covering
@pytest.mark.parametrize("loss", reference.ELEMENTWISE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(lane, dtype, loss):
    check(lane, *operands((17, 10), loss, dtype, "dense"), loss)


@pytest.mark.parametrize("layout", ["columns", "spread"])
def test_strides(lane, layout):
    a, y = operands((17, 10), "mse", torch.float32, layout)
    check(lane, a, y, "mse")
    check(lane, a, poisoned(y, layout="rows"), "mse")


def test_expanded_upstream(lane):
    a, y = operands((17, 10), "l1", torch.float32)
    spread, _ = elementwise_loss_bwd(
        torch.tensor(0.5).expand(17, 10).to(lane), a.to(lane), y.to(lane), "l1", want_dy=False
    )
    number, _ = elementwise_loss_bwd(torch.tensor(0.5).to(lane), a.to(lane), y.to(lane), "l1", want_dy=False)
    assert spread is not None
    assert number is not None
    assert torch.equal(spread.cpu(), number.cpu())


@pytest.mark.parametrize("delta", [0.25, 3.0, math.inf])
def test_delta(lane, delta):
    a, y = operands((17, 10), "huber", torch.float32)
    y[0] = a[0] - 0.25  # at the border of the first delta
    losses = elementwise_loss_fwd(a.to(lane), y.to(lane), "huber", delta=delta).cpu()
    torch.testing.assert_close(losses, reference.elementwise_loss(a, y, "huber", delta))
    g = torch.tensor(2.0).to(lane)
    da, dy = elementwise_loss_bwd(g, a.to(lane), y.to(lane), "huber", delta=delta, want_dy=True)
    expected = 2 * reference.elementwise_loss_grad(a, y, "huber", delta)
    assert da is not None
    assert dy is not None
    torch.testing.assert_close(da.cpu(), expected)
    torch.testing.assert_close(dy.cpu(), -expected)
    assert float(elementwise_loss_fwd(a.to(lane), y.to(lane), "huber", scale=1.0, delta=delta)) == pytest.approx(
        reference.elementwise_loss(a.double(), y.double(), "huber", delta).sum().item(), rel=1e-5
    )


def test_logarithms_keep_their_digits(lane):
    """Losses down to 1e-38 have a small relative error, up to the rounding of exp's argument."""
    z = torch.tensor([[20.0, -20.0, 60.0, -60.0, 1.0, -0.01, 0.0, 88.0]])
    y = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.0]])
    got = elementwise_loss_fwd(z.to(lane), y.to(lane), "bce_with_logits").cpu()
    expected = reference.elementwise_loss(z.double(), y.double(), "bce_with_logits")
    assert ((got - expected).abs() <= expected * (1e-6 + z.abs() * 2.0**-24)).all()
    p = torch.tensor([[1 - 2.0**-20, 2.0**-20, 1e-12, 0.5, 0.75, 1 - 2.0**-24]])
    y = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    got = elementwise_loss_fwd(p.to(lane), y.to(lane), "binary_cross_entropy").cpu()
    torch.testing.assert_close(
        got.double(), reference.elementwise_loss(p.double(), y.double(), "binary_cross_entropy"), rtol=1e-6, atol=0
    )


def test_borders_as_torch(lane):
    """Probabilities 0 and 1, differences of 0, NaN and infinities."""
    a, y = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    losses, grads = elementwise_loss(a.to(lane), y.to(lane), "binary_cross_entropy")
    assert losses.cpu().tolist() == [[0.0, 100.0, 100.0, 0.0]]
    torch.testing.assert_close(grads.cpu(), torch.tensor([[0.0, -1e12, 1e12, 0.0]]))
    losses, grads = elementwise_loss(a.to(lane), y.to(lane), "nllm")
    assert losses.cpu().tolist() == [[0.0, math.inf, 0.0, 0.0]]
    special, zero = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]]), torch.zeros(1, 4)
    for loss in ("mse", "l1", "huber", "bce_with_logits"):
        values, grads = elementwise_loss(special.to(lane), zero.to(lane), loss)
        torchs = LOSSES[loss].torch(special, zero, reduction="none")
        torch.testing.assert_close(values.cpu(), torchs, equal_nan=True)
        torch.testing.assert_close(values.cpu(), reference.elementwise_loss(special, zero, loss), equal_nan=True)
        expected = reference.elementwise_loss_grad(special, zero, loss)
        torch.testing.assert_close(grads.cpu(), expected, equal_nan=True)


def test_two_runs_are_equal(lane):
    a, y = operands((130, 170), "mse", torch.float32)
    runs = [elementwise_loss_fwd(a.to(lane), y.to(lane), "mse", scale=1.0).cpu() for _ in range(2)]
    assert torch.equal(*runs)


def test_empty(lane):
    losses, da = elementwise_loss(torch.empty(0, 3).to(lane), torch.empty(0, 3).to(lane), "mse")
    assert losses.shape == da.shape == (0, 3)
    assert elementwise_loss_fwd(torch.empty(0, 3).to(lane), torch.empty(0, 3).to(lane), "mse", scale=1.0).item() == 0


def test_targets_gathered_and_a_factor_on_the_device(lane):
    a, y = operands((21, 17), "mse", torch.float16)
    rows = torch.randint(0, 21, (21,), generator=torch.Generator().manual_seed(1))
    factor = torch.tensor(1024.0).to(lane)
    got = elementwise_loss(a.to(lane), y.to(lane), "mse", scale=0.1, factor=factor, rows=rows.to(lane))
    want = elementwise_loss(a.to(lane), y[rows].to(lane), "mse", scale=0.1 * 1024)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
