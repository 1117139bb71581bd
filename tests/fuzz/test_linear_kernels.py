"""The launchers of the linear layer against float64, on drawn shapes, strides, dtypes and options."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastmlp import reference
from fastmlp.activations import saved_for_grad
from fastmlp.kernels import Dropout, activation_bwd, linear_dgrad, linear_fwd, linear_wgrad
from fastmlp.ops import torch_ops
from fastmlp.reference.dropout import keep_mask
from tests.fuzz.cases import Spec, activations, dims, dtypes, fuzz, root, specs
from tests.support.harness import assert_within_budget, nan_like, poisoned

# Triton's interpreter is numpy, which warns where e^z becomes infinite on the way to a finite result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@dataclass(frozen=True)
class Drops:
    """Dropout of a layer; ``state`` is the seed and the step."""

    state: tuple[int, int]
    layer: int
    p: float
    stream: int

    def build(self, lane: torch.device) -> Dropout:
        return Dropout(torch.tensor(self.state).to(lane), self.layer, self.p, self.stream)

    def factor(self, rows: int, cols: int) -> Tensor:
        """What dropout multiplies by, in float64."""
        return keep_mask(*self.state, self.layer, rows, cols, self.p, self.stream).double() / (1 - self.p)


_int64 = st.integers(-(2**63), 2**63 - 1)
_drops = st.builds(
    Drops,
    state=st.tuples(_int64, st.integers(0, 2**63 - 1)),
    layer=st.sampled_from([0, 1, 2, 16, 99]),
    p=st.sampled_from([1e-6, 0.1, 0.25, 0.5, 0.9]),
    stream=st.sampled_from([0, 1, 7]),
)


@dataclass(frozen=True)
class Forward:
    x: Spec
    weight: Spec
    bias: Spec | None
    activation: str
    save_z: bool
    rows: Spec | None  #: seed of the rows to gather; the shape is [M]
    dropout: Drops | None = None


@st.composite
def forwards(draw: st.DrawFn) -> Forward:
    M, K, N = draw(dims(3))
    dtype = draw(dtypes)
    gathered = draw(st.booleans())
    stored = draw(st.sampled_from([1, 7, 40])) if gathered else M
    pixels = draw(st.booleans())
    return Forward(
        x=draw(specs((stored, K), torch.uint8 if pixels else dtype, expanded=True)),
        weight=draw(specs((N, K), dtype, expanded=True, scale=root(K))),
        bias=draw(st.none() | specs((N,), dtype)),
        activation=draw(activations),
        save_z=draw(st.booleans()),
        rows=draw(specs((M,), torch.int64, dense=True)) if gathered else None,
        dropout=draw(st.none() | _drops),
    )


def absolute(*tensors: Tensor) -> list[Tensor]:
    return [t.double().abs() for t in tensors]


def largest(t: Tensor) -> float:
    return t.max().item() if t.numel() else 0.0


def build_rows(spec: Spec | None, stored: int) -> Tensor | None:
    if spec is None:
        return None
    g = torch.Generator().manual_seed(spec.seed)
    return poisoned(torch.randint(0, stored, spec.shape, generator=g), pad=spec.pad)


@fuzz(25, forwards(), launches=True)
def test_linear_fwd(lane, case: Forward):
    x, w = case.x.build(), case.weight.build()
    b = None if case.bias is None else case.bias.build()
    rows = build_rows(case.rows, x.shape[0])
    taken = x if rows is None else x[rows]
    shape = (taken.shape[0], w.shape[0])
    a = nan_like(shape, w.dtype).to(lane)
    a, z = linear_fwd(
        x.to(lane),
        w.to(lane),
        None if b is None else b.to(lane),
        case.activation,
        save_z=case.save_z,
        rows=None if rows is None else rows.to(lane),
        a=a,
        dropout=None if case.dropout is None else case.dropout.build(lane),
    )
    K = w.shape[1]
    wide = [reference.pixels(taken, torch.float64).double(), w.double(), None if b is None else b.double()]
    z64 = reference.linear_act(*wide)
    ax, aw = absolute(wide[0], wide[1])
    magnitude = largest(ax @ aw.t()) + (0.0 if b is None else largest(b.double().abs()))
    own = reference.linear_act(taken, w, b)
    assert (z is not None) == case.save_z
    if z is not None:
        assert_within_budget(z.cpu(), z64, own, reduction=K, magnitude=magnitude, what="Z")
    expected, torchs = reference.activate(z64, case.activation), reference.linear_act(taken, w, b, case.activation)
    got = a.cpu()
    if case.dropout is not None:
        factor = case.dropout.factor(*shape)
        assert (got[factor == 0] == 0).all()
        expected, torchs = expected * factor, torchs * factor.to(torchs.dtype)
        magnitude /= 1 - case.dropout.p
        if case.activation == "step":
            got = got * (1 - case.dropout.p)
            got, expected = got.round(), expected * (1 - case.dropout.p)
    if case.activation == "step":
        # 0 and 1 are both right where rounding can move Z over the jump.
        assert ((got == 0) | (got == 1)).all()
        near = z64.abs() <= 2.0**-23 * max(1.0, K**0.5) * magnitude
        assert torch.equal(got.double()[~near], expected[~near])
        return
    assert_within_budget(got, expected, torchs, reduction=K, magnitude=magnitude, what="A")


@dataclass(frozen=True)
class InputGradient:
    dz: Spec
    weight: Spec
    z: Spec  #: pre-activation of the layer below
    activation: str
    dropout: Drops | None = None


@st.composite
def input_gradients(draw: st.DrawFn) -> InputGradient:
    M, K, N = draw(dims(3))
    dtype = draw(dtypes)
    return InputGradient(
        dz=draw(specs((M, N), dtype, expanded=True)),
        weight=draw(specs((N, K), dtype, expanded=True, scale=root(N))),
        z=draw(specs((M, K), dtype, dense=True, scales=(1.0, 4.0))),
        activation=draw(activations),
        dropout=draw(st.none() | _drops),
    )


def kept(z: Tensor, activation: str, factor: Tensor | None = None) -> Tensor | None:
    """The tensor that the forward pass would have kept for f', in poisoned storage."""
    kind = saved_for_grad(activation)
    if kind is None:
        return None
    a = reference.activate(z, activation)
    if factor is not None:
        a = a * factor.to(a.dtype)
    return poisoned(z if kind == "z" else a, layout="dense")


def derivative(saved: Tensor | None, activation: str) -> Tensor | float:
    """f' in float64 from the kept tensor."""
    if saved is None:
        return 1.0 if activation == "identity" else 0.0
    if saved_for_grad(activation) == "a":
        return reference.activation_grad_from_output(saved.double(), activation)
    return reference.activation_grad(saved.double(), activation)


@fuzz(20, input_gradients(), launches=True)
def test_linear_dgrad(lane, case: InputGradient):
    dz, w = case.dz.build(), case.weight.build()
    factor, drops, scale = dropped(case, lane)
    saved = kept(case.z.values(), case.activation, factor)
    moved = None if saved is None else saved.to(lane)
    dx = nan_like((dz.shape[0], w.shape[1]), w.dtype).to(lane)
    assert linear_dgrad(dz.to(lane), w.to(lane), moved, case.activation, dx=dx, dropout=drops) is dx
    expected, torchs = gradients(dz.double() @ w.double(), dz @ w, saved, case, factor)
    adz, aw = absolute(dz, w)
    assert_within_budget(
        dx.cpu(), expected, torchs, reduction=w.shape[0], magnitude=scale * largest(adz @ aw), what="dX"
    )


def dropped(case: InputGradient, lane: torch.device) -> tuple[Tensor | None, Dropout | None, float]:
    """(what dropout multiplies by, what the launcher takes, the scale)."""
    if case.dropout is None:
        return None, None, 1.0
    return case.dropout.factor(*case.z.shape), case.dropout.build(lane), 1 / (1 - case.dropout.p)


def gradients(
    exact: Tensor, own: Tensor, saved: Tensor | None, case: InputGradient, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dZ of the exact dA and of torch's."""
    if case.dropout is not None and factor is not None:
        exact, own = exact * factor, own * factor.to(own.dtype)
        if saved_for_grad(case.activation) == "a" and saved is not None:
            kept_share = 1 - case.dropout.p
            exact = exact * derivative(saved.double() * kept_share, case.activation)
            return exact, torch_ops.activation_bwd(own, saved * kept_share, case.activation)
    return exact * derivative(saved, case.activation), torch_ops.activation_bwd(own, saved, case.activation)


@fuzz(10, input_gradients(), launches=True)
def test_activation_bwd(lane, case: InputGradient):
    da = Spec(case.z.shape, case.z.dtype, case.dz.layout, case.dz.pad, case.dz.scale, case.dz.seed).build()
    factor, drops, scale = dropped(case, lane)
    saved = kept(case.z.values(), case.activation, factor)
    dz = nan_like(tuple(da.shape), da.dtype).to(lane)
    moved = None if saved is None else saved.to(lane)
    assert activation_bwd(da.to(lane), moved, case.activation, dz=dz, dropout=drops) is dz
    expected, torchs = gradients(da.double(), da, saved, case, factor)
    magnitude = scale * largest(da.double().abs())
    assert_within_budget(dz.cpu(), expected, torchs, reduction=1, magnitude=magnitude, what="dZ")


@dataclass(frozen=True)
class WeightGradient:
    dz: Spec
    x: Spec
    bias: bool
    rows: Spec | None


@st.composite
def weight_gradients(draw: st.DrawFn) -> WeightGradient:
    M, K, N = draw(dims(3))
    dtype = draw(dtypes)
    gathered = draw(st.booleans())
    stored = draw(st.sampled_from([1, 7, 40])) if gathered else M
    return WeightGradient(
        dz=draw(specs((M, N), dtype, expanded=True, scales=(1.0, 1e-2))),
        x=draw(specs((stored, K), draw(st.sampled_from([dtype, torch.uint8])), expanded=True, scales=(1.0, 5.0))),
        bias=draw(st.booleans()),
        rows=draw(specs((M,), torch.int64, dense=True)) if gathered else None,
    )


@fuzz(20, weight_gradients(), launches=True)
def test_linear_wgrad(lane, case: WeightGradient):
    dz, x = case.dz.build(), case.x.build()
    rows = build_rows(case.rows, x.shape[0])
    taken = x if rows is None else x[rows]
    N, K = dz.shape[1], x.shape[1]
    dw = nan_like((N, K), dz.dtype).to(lane)
    db = nan_like((N,), dz.dtype).to(lane) if case.bias else None
    moved = None if rows is None else rows.to(lane)
    got = linear_wgrad(dz.to(lane), x.to(lane), bias=case.bias, rows=moved, dw=dw, db=db)
    assert got[0] is dw
    assert got[1] is db
    expected = reference.linear_wgrad(dz.double(), reference.pixels(taken, torch.float64).double())
    torchs = reference.linear_wgrad(dz, taken)
    adz, ax = absolute(dz, reference.pixels(taken, torch.float64))
    M = dz.shape[0]
    assert_within_budget(dw.cpu(), expected[0], torchs[0], reduction=M, magnitude=largest(adz.t() @ ax), what="dW")
    if db is not None:
        assert_within_budget(db.cpu(), expected[1], torchs[1], reduction=M, magnitude=largest(adz.sum(0)), what="db")


def test_a_wrong_result_is_found(lane):
    """The fuzzer's check itself sees one element that is off by more than the budget."""
    case = Forward(Spec((3, 5), torch.float32), Spec((4, 5), torch.float32), None, "identity", False, None)
    x, w = case.x.build(), case.weight.build()
    a, _ = linear_fwd(x.to(lane), w.to(lane), None, "identity")
    a[2, 3] += 1e-5
    with pytest.raises(AssertionError, match=r"error \S+e-0[56] at \[2, 3\] .* over the budget"):
        assert_within_budget(a.cpu(), x.double() @ w.double().t(), x @ w.t(), reduction=5)
