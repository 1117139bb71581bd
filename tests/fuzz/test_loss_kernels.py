"""The launchers of the losses against float64: labels and probabilities, weights, smoothing, ignored rows, strides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fastmlp import reference
from fastmlp.base.losses import LOSSES
from fastmlp.kernels import (
    cross_entropy,
    cross_entropy_bwd,
    cross_entropy_fwd,
    elementwise_loss,
    elementwise_loss_bwd,
    elementwise_loss_fwd,
    softmax_squared_error,
    softmax_squared_error_bwd,
    softmax_squared_error_fwd,
    softmax_tiles,
)
from tests.fuzz.cases import Labels, Spec, dims, dtypes, fuzz, labels, specs
from tests.support.harness import assert_within_budget, nan_like, poisoned

# Triton's interpreter is numpy, which warns of inf - inf and 0 / 0 in elements that a mask then drops.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def assert_close(got: Tensor, expected: Tensor, torchs: Tensor, *, reduction: int, magnitude: float, what: str) -> None:
    """Results are within the budget, and NaN where they are not defined (the mean over no rows)."""
    undefined = expected.isnan()
    assert torch.equal(got.isnan(), undefined), f"{what}: NaN in other places than expected"
    got, expected, torchs = (t.masked_fill(undefined, 0.0) for t in (got, expected, torchs))
    assert_within_budget(got, expected, torchs, reduction=reduction, magnitude=magnitude, what=what)


@dataclass(frozen=True)
class CrossEntropy:
    z: Spec
    target: Labels | Spec
    weight: Spec | None
    smoothing: float
    reduction: str
    upstream: Spec | None  #: upstream gradient of the rows, for the reduction "none"
    whole_row: int  #: rows of more classes take the path of very long rows

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(Z, target, weight); probabilities and weights are not negative."""
        target = self.target.build()
        if isinstance(self.target, Spec):
            target = target.copy_(target.abs())
        weight = None if self.weight is None else self.weight.build()
        return self.z.build(), target, None if weight is None else weight.copy_(weight.abs())

    @property
    def options(self) -> dict[str, Any]:
        ignore_index = self.target.ignore_index if isinstance(self.target, Labels) else -100
        return {"ignore_index": ignore_index, "smoothing": self.smoothing}


@st.composite
def cross_entropies(draw: st.DrawFn, *, positions: bool) -> CrossEntropy:
    dtype = draw(dtypes)
    if positions and draw(st.booleans()):
        N, C, S = draw(dims(3).filter(lambda shape: math.prod(shape) <= 4096))
        shape, row_shape = (N, C, S), (N, S)
    else:
        M, C = draw(dims(2))
        shape, row_shape = (M, C), (M,)
    return CrossEntropy(
        z=draw(specs(shape, dtype, scales=(1.0, 0.01, 20.0))),
        target=draw(labels(row_shape, C) | specs(shape, dtype)),
        weight=draw(st.none() | specs((C,), dtype)),
        smoothing=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
        upstream=draw(specs(row_shape, dtype, scales=(1.0,), expanded=len(row_shape) > 1)),
        whole_row=draw(st.sampled_from([16384, 8])),
    )


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


def torchs_own(z: Tensor, target: Tensor, weight: Tensor | None, case: CrossEntropy, reduction: str, g: Tensor):
    """torch's (loss, dZ, dTarget) in Z's dtype."""
    z = z.detach().clone().requires_grad_()
    target = target.clone().requires_grad_() if target.is_floating_point() else target.long()
    loss = F.cross_entropy(
        z,
        target,
        weight,
        ignore_index=case.options["ignore_index"],
        label_smoothing=case.smoothing,
        reduction=reduction,
    )
    loss.backward(g.to(loss.dtype))
    return loss.detach(), z.grad, target.grad


def spread(z: Tensor, weight: Tensor | None, target: Tensor) -> float:
    """The size of the terms of a row's loss: the range of the row's logits times the largest weight and target mass."""
    reach = (z.double().amax(1) - z.double().amin(1)).max().item() + 1.0
    mass = target.double().sum(1).max().item() + 1.0 if target.is_floating_point() else 1.0
    return reach * mass * (1.0 if weight is None else weight.double().max().item())


def moved(lane: torch.device, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(lane) for t in tensors]


@fuzz(20, cross_entropies(positions=False), launches=True)
def test_cross_entropy_one_pass(lane, case: CrossEntropy):
    z, target, weight = case.tensors()
    M, C = z.shape
    before = z.clone()
    dz, loss = nan_like((M, C), z.dtype).to(lane), nan_like((M,), torch.float32).to(lane)
    zl, tl, wl = moved(lane, z, target, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_tiles, "WHOLE_ROW", case.whole_row)
        cross_entropy(zl, tl, weight=wl, scale=0.125, loss=loss, dz=dz, **case.options)
    assert torch.equal(z, before)
    expected = reference.cross_entropy(*double(z, target, weight), **case.options, reduction="none")
    g = torch.full_like(expected, 0.125)
    dz_expected, _ = reference.cross_entropy_backward(g, *double(z, target, weight), **case.options, reduction="none")
    own, own_dz, _ = torchs_own(z, target, weight, case, "none", g)
    size = spread(z, weight, target)
    assert_close(loss.cpu(), expected, own, reduction=C, magnitude=size, what="loss")
    assert_close(dz.cpu(), dz_expected, own_dz, reduction=C, magnitude=0.125 * size, what="dZ")


@fuzz(20, cross_entropies(positions=True), launches=True)
def test_cross_entropy_two_passes(lane, case: CrossEntropy):
    z, target, weight = case.tensors()
    C, rows = z.shape[1], z.numel() // z.shape[1]
    zl, tl, wl = moved(lane, z, target, weight)
    options = {"weight": wl, **case.options}
    wide = double(z, target, weight)
    expected = reference.cross_entropy(*wide, **case.options, reduction=case.reduction)
    upstream = case.upstream.build() if case.reduction == "none" else torch.tensor(0.75)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_tiles, "WHOLE_ROW", case.whole_row)
        loss, stats, denominator = cross_entropy_fwd(zl, tl, reduction=case.reduction, dtype=torch.float32, **options)
        dz, dt = cross_entropy_bwd(
            upstream.to(lane), zl, tl, stats, denominator=denominator, want_dt=target.is_floating_point(), **options
        )
    dz_expected, dt_expected = reference.cross_entropy_backward(
        upstream.double(), *wide, **case.options, reduction=case.reduction
    )
    own, own_dz, own_dt = torchs_own(z, target, weight, case, case.reduction, upstream)
    size, terms = spread(z, weight, target), rows if case.reduction == "sum" else 1
    assert_close(loss.cpu(), expected, own, reduction=C * rows, magnitude=size * terms, what="loss")
    assert dz is not None
    share = upstream.double().abs().max().item()
    if case.reduction == "mean":
        counted = rows if denominator is None else float(denominator.cpu())
        share = share / counted if counted > 0 else share
    assert_close(dz.cpu(), dz_expected, own_dz, reduction=C * rows, magnitude=share * size, what="dZ")
    assert (dt is None) == (dt_expected is None)
    if dt is not None and dt_expected is not None:
        assert_close(dt.cpu(), dt_expected, own_dt, reduction=C * rows, magnitude=share * size, what="dTarget")


@dataclass(frozen=True)
class Elementwise:
    a: Spec
    y: Spec
    loss: str
    scale: float
    upstream: Spec

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(A, Y). They are probabilities where the loss takes logarithms."""
        a, y = self.a.build(), self.y.build()
        if LOSSES[self.loss].input == "probabilities":
            # A division by a smaller number overflows float16.
            a.copy_(torch.sigmoid(a.float()).clamp(0.01, 0.99))
        if LOSSES[self.loss].input != "values":
            y.copy_(torch.sigmoid(y.float()).where(y.float() > 0, 0.0))
        return a, y


@st.composite
def elementwises(draw: st.DrawFn) -> Elementwise:
    shape = draw(dims(2))
    dtype = draw(dtypes)
    return Elementwise(
        a=draw(specs(shape, dtype, scales=(1.0, 0.1, 8.0))),
        y=draw(specs(shape, dtype, scales=(1.0, 0.1, 8.0))),
        loss=draw(st.sampled_from(reference.ELEMENTWISE_LOSSES)),
        scale=draw(st.sampled_from([1.0, 0.01])),
        upstream=draw(specs(shape, dtype, expanded=True, scales=(1.0,))),
    )


@fuzz(15, elementwises(), launches=True)
def test_elementwise_loss(lane, case: Elementwise):
    a, y = case.tensors()
    name, scale = case.loss, case.scale
    al, yl = moved(lane, a, y)
    da = nan_like(tuple(a.shape), a.dtype).to(lane)
    loss, _ = elementwise_loss(al, yl, name, scale=scale, da=da)
    total = elementwise_loss_fwd(al, yl, name, scale=scale)
    g = case.upstream.build()
    da2, dy2 = elementwise_loss_bwd(g.to(lane), al, yl, name, scale=scale, want_dy=True)
    wide = double(a, y)
    expected, own = (reference.elementwise_loss(*t, name) for t in (wide, (a, y)))
    d_expected, d_own = (reference.elementwise_loss_grad(*t, name) for t in (wide, (a, y)))
    dy_expected, dy_own = (reference.elementwise_loss_target_grad(*t, name) for t in (wide, (a, y)))
    size = a.double().abs().max().item() + y.double().abs().max().item() + 1.0
    close = {"reduction": 1, "magnitude": size * size}
    assert_close(loss.cpu(), expected, own, what="loss", **close)
    assert_close(da.cpu(), scale * d_expected, scale * d_own, what="dA", **close)
    assert da2 is not None
    assert dy2 is not None
    upstream = scale * g
    assert_close(da2.cpu(), scale * g.double() * d_expected, upstream * d_own, what="dA of g", **close)
    assert_close(dy2.cpu(), scale * g.double() * dy_expected, upstream * dy_own, what="dY of g", **close)
    sums = [scale * t.sum() for t in (expected, own)]
    magnitude = scale * expected.abs().sum().item() + size * size
    assert_close(total.cpu(), *sums, reduction=a.numel(), magnitude=magnitude, what="sum")


@dataclass(frozen=True)
class SquaredError:
    z: Spec
    target: Labels | Spec
    scale: float
    upstream: Spec


@st.composite
def squared_errors(draw: st.DrawFn) -> SquaredError:
    M, C = draw(dims(2))
    dtype = draw(dtypes)
    return SquaredError(
        z=draw(specs((M, C), dtype, scales=(1.0, 0.01, 10.0))),
        target=draw(labels((M,), C, ignoring=False) | specs((M, C), dtype)),
        scale=draw(st.sampled_from([1.0, 0.01])),
        upstream=draw(specs((M,), dtype, scales=(1.0,))),
    )


@fuzz(10, squared_errors(), launches=True)
def test_softmax_squared_error(lane, case: SquaredError):
    z, target = case.z.build(), case.target.build()
    M, C = z.shape
    g = case.upstream.build()
    y = target if target.is_floating_point() else F.one_hot(target.long(), C).to(z.dtype)
    zl, tl, gl = moved(lane, z, target, g)
    dz = nan_like((M, C), z.dtype).to(lane)
    loss, _ = softmax_squared_error(zl, tl, scale=case.scale, dz=dz)
    total = softmax_squared_error_fwd(zl, tl, scale=case.scale)
    dz2, dy2 = softmax_squared_error_bwd(gl, zl, tl, scale=case.scale, want_dy=target.is_floating_point())
    wide = double(z, y)
    expected, own = (reference.softmax_squared_error(*t) for t in (wide, (z, y)))
    rows = torch.full((M,), case.scale, dtype=torch.float64)
    size = (1.0 + y.double().abs().sum(1).max().item()) ** 2
    close = {"reduction": C, "magnitude": size}
    assert_close(loss.cpu(), expected, own, what="loss", **close)
    scaled = [reference.softmax_squared_error_backward(rows.to(t[0].dtype), *t)[0] for t in (wide, (z, y))]
    assert_close(dz.cpu(), *scaled, what="dZ", **close)
    truth, torchs = (
        reference.softmax_squared_error_backward(case.scale * g.to(t[0].dtype), *t) for t in (wide, (z, y))
    )
    assert dz2 is not None
    close["magnitude"] = size * g.double().abs().max().item()
    assert_close(dz2.cpu(), truth[0], torchs[0], what="dZ of g", **close)
    if dy2 is not None:
        assert_close(dy2.cpu(), truth[1], torchs[1], what="dY of g", **close)
    magnitude = size * M * case.scale
    assert_close(
        total.cpu(),
        case.scale * expected.sum(),
        case.scale * own.sum(),
        reduction=C * M,
        magnitude=magnitude,
        what="sum",
    )


def test_poisoned_labels_are_out_of_range():
    """A read of the memory around the labels would change the results of these tests."""
    y = poisoned(torch.zeros(3, dtype=torch.int64), layout="dense")
    assert y._base is not None
    assert y._base.max() == torch.iinfo(torch.int64).max
