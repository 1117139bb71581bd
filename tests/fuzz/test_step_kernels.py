"""The launchers of the training step's own kernels against float64: the head, and the gradient with the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fastmlp import reference
from fastmlp.kernels import head
from fastmlp.kernels.head import MAX_CLASSES
from fastmlp.kernels.layout import Layer, Layout
from fastmlp.kernels.wgrad_update import wgrad_update
from fastmlp.step.optimizers import optimizer_of
from tests.fuzz.cases import Labels, Spec, activations, dims, dtypes, fuzz, labels, root, specs
from tests.fuzz.test_linear_kernels import absolute, build_rows, derivative, kept, largest
from tests.fuzz.test_loss_kernels import double, moved, spread
from tests.support.harness import EPS32, assert_within_budget, nan_like, poisoned
from tests.support.torchs import torch_optimizer

# Triton's interpreter is numpy, which warns of inf - inf and 0 / 0 in elements that a mask then drops.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SCALE = 0.25


@dataclass(frozen=True)
class Head:
    h: Spec  #: pixels, or Z_{L-1}, from which the activation makes H
    weight: Spec
    bias: Spec | None
    target: Labels
    class_weight: Spec | None
    smoothing: float
    activation: str
    rows: Spec | None  #: seed of the rows to gather; the shape is [M]
    gather_h: bool


@st.composite
def heads(draw: st.DrawFn) -> Head:
    M, K, C = draw(dims(3).filter(lambda shape: shape[2] <= MAX_CLASSES))
    dtype = draw(dtypes)
    gathered, pixels = draw(st.booleans()), draw(st.booleans())
    gather_h = gathered and draw(st.booleans())
    stored = draw(st.sampled_from([1, 7, 40])) if gathered else M
    return Head(
        h=draw(specs((stored if gather_h else M, K), torch.uint8 if pixels else dtype, scales=(1.0, 3.0))),
        weight=draw(specs((C, K), dtype, scale=root(K), scales=(1.0, 3.0))),
        bias=draw(st.none() | specs((C,), dtype, scales=(1.0,))),
        target=draw(labels((stored,), C)),
        class_weight=draw(st.none() | specs((C,), torch.float32, scales=(1.0,))),
        smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        # Gathered rows and pixels are the input of a network of one layer, so there is no layer below.
        activation="identity" if gather_h or pixels else draw(activations),
        rows=draw(specs((M,), torch.int64, dense=True)) if gathered else None,
        gather_h=gather_h,
    )


@fuzz(15, heads(), launches=True)
def test_head(lane, case: Head):
    w, target = case.weight.build(), case.target.build()
    b = None if case.bias is None else case.bias.build()
    cw = None if case.class_weight is None else case.class_weight.build()
    cw = None if cw is None else cw.copy_(cw.abs())
    rows = build_rows(case.rows, target.shape[0])
    below = not case.gather_h and case.h.dtype != torch.uint8
    h, saved = case.h.build(), None
    if below:
        z_prev = h.clone()
        h.copy_(reference.activate(z_prev, case.activation))
        saved = kept(z_prev, case.activation)
    M, (C, K) = case.target.shape[0] if rows is None else rows.shape[0], w.shape
    options = {"ignore_index": case.target.ignore_index, "smoothing": case.smoothing}
    out = {"loss": nan_like((M,), torch.float32), "dz": nan_like((M, C), w.dtype), "logits": nan_like((M, C), w.dtype)}
    if below:
        out["dz_prev"] = nan_like((M, K), w.dtype)
    correct = torch.full((M,), -1, dtype=torch.int32).to(lane)
    moved_out = {name: t.to(lane) for name, t in out.items()}
    hl, wl, bl, tl, sl, rl, cl = moved(lane, h, w, b, target, saved, rows, cw)
    head(
        hl, wl, bl, tl, activation=case.activation, saved=sl, scale=SCALE, class_weight=cl, rows=rl,
        gather_h=case.gather_h, want_dz_prev=below, correct=correct, **moved_out, **options,
    )  # fmt: skip
    got = {name: t.cpu() for name, t in moved_out.items()}

    taken = h if rows is None or not case.gather_h else h[rows]
    x, y = reference.pixels(taken, w.dtype), target if rows is None else target[rows]
    wide = reference.pixels(taken, torch.float64).double()
    loss, dz, da, z = reference.head(
        wide, w.double(), *double(b), y, class_weight=None if cw is None else cw.double(), scale=SCALE, **options
    )
    own_z = F.linear(x, w, b).requires_grad_()
    own = F.cross_entropy(
        own_z, y.long(), None if cw is None else cw.to(w.dtype), label_smoothing=case.smoothing, reduction="none",
        ignore_index=case.target.ignore_index,
    )  # fmt: skip
    own.backward(torch.full_like(own, SCALE))
    assert own_z.grad is not None
    products = wide.abs() @ w.double().abs().t()
    terms = largest(products) + (0.0 if b is None else largest(b.double().abs()))
    size = spread(z, cw, y) + terms * (1.0 if cw is None else max(1.0, cw.double().max().item()))
    for name, want, torchs, magnitude in (
        ("logits", z, own_z.detach(), terms),
        ("loss", loss, own.detach(), size),
        ("dz", dz, own_z.grad, SCALE * size),
    ):
        assert_within_budget(got[name], want, torchs, reduction=K + C, magnitude=magnitude, what=name)
    if below:
        slope = derivative(saved, case.activation)
        torchs = (own_z.grad @ w) * (slope.to(w.dtype) if isinstance(slope, Tensor) else slope)
        # dZ is rounded to W's dtype and has the error of the logits; the products with W may cancel.
        aw = w.double().abs()
        rounding = torch.finfo(w.dtype).eps / EPS32 * largest((dz.abs() @ aw) * abs(slope))
        passed_on = SCALE * size * largest(aw.sum(0) * abs(slope))
        assert_within_budget(
            got["dz_prev"], da * slope, torchs, reduction=K + C, magnitude=rounding + passed_on, what="dZ_prev"
        )
    # Rounded logits can be equal where the kernel's own logits differ. The rounded logit of a label counted as correct
    # must be the largest; the label of any other row may have the largest too.
    assert ((correct.cpu() == 0) | (correct.cpu() == 1)).all()
    right = (y >= 0) & (y < C)
    at_label = got["logits"].gather(1, y.long().clamp(0, C - 1)[:, None])[:, 0]
    assert (at_label == got["logits"].amax(1))[(correct.cpu() == 1) & right].all()
    assert ((correct.cpu() == 1) <= right).all()


@dataclass(frozen=True)
class Update:
    sizes: tuple[int, ...]
    dzs: tuple[Spec, ...]
    xs: tuple[Spec, ...]
    bias: bool
    optimizer: str
    weight_decay: float
    low: torch.dtype | None  #: dtype of the 16-bit copies
    rows: Spec | None
    unscale: float | None
    seed: int


LR, MOMENTUM, BETAS, EPS = 0.1, 0.9, (0.9, 0.999), 0.1
#: The kernel's name of a rule, its settings, and how far a parameter moves per change of its gradient. Adam and RMSprop
#: divide by sqrt(v) + eps, which is at least eps.
RULES: dict[str, tuple[dict[str, Any], float]] = {
    "sgd": ({}, 1.0),
    "momentum": ({"momentum": MOMENTUM}, 1.0 + MOMENTUM),
    "nesterov": ({"momentum": MOMENTUM, "nesterov": True}, 1.0 + 2 * MOMENTUM),
    "adamw": ({"optimizer": "adamw", "betas": BETAS, "eps": EPS}, 2.0 / EPS),
    "adam amsgrad": ({"optimizer": "adam", "betas": BETAS, "eps": EPS, "amsgrad": True}, 2.0 / EPS),
    "adamw maximize": ({"optimizer": "adamw", "betas": BETAS, "eps": EPS, "maximize": True}, 2.0 / EPS),
    "rmsprop": ({"optimizer": "rmsprop", "alpha": 0.9, "eps": EPS}, 4.0 / EPS),
    "rmsprop centered momentum": (
        {"optimizer": "rmsprop", "alpha": 0.9, "eps": EPS, "momentum": MOMENTUM, "centered": True},
        (4.0 + 4 * MOMENTUM) / EPS,
    ),
    "lion": ({"optimizer": "lion"}, 0.0),
}
STEPS = 2


@st.composite
def updates(draw: st.DrawFn) -> Update:
    count = draw(st.integers(1, 4))
    sizes = draw(dims(count + 1))
    # Several programs share a batch of 600 rows.
    m = draw(st.sampled_from([1, 7, 16, 33, 600]))
    dtype = draw(dtypes)
    gathered = draw(st.booleans())
    first = (draw(st.sampled_from([1, 7, 40])) if gathered else m, sizes[0])
    inner = st.sampled_from(["dense", "rows"])  # the kernel needs an inner stride of 1

    def x_spec(i: int) -> st.SearchStrategy[Spec]:
        kinds = st.sampled_from([dtype, torch.uint8]) if i == 0 else st.just(dtype)
        return st.builds(
            Spec, st.just(first if i == 0 else (m, sizes[i])), kinds, inner, st.integers(1, 9), seed=st.integers(0, 99)
        )

    return Update(
        sizes=sizes,
        dzs=tuple(draw(specs((m, n), dtype, dense=True, scales=(1.0, 0.01))) for n in sizes[1:]),
        xs=tuple(draw(x_spec(i)) for i in range(count)),
        bias=draw(st.booleans()),
        optimizer=draw(st.sampled_from(sorted(RULES))),
        weight_decay=draw(st.sampled_from([0.0, 0.02])),
        low=None if dtype == torch.float32 else draw(st.sampled_from([None, dtype])),
        rows=draw(specs((m,), torch.int64, dense=True)) if gathered else None,
        unscale=draw(st.sampled_from([None, 0.5])),
        seed=draw(st.integers(0, 99)),
    )


@fuzz(15, updates(), launches=True)
def test_wgrad_update(lane, case: Update):
    g = torch.Generator().manual_seed(case.seed)
    weights = [torch.randn(n, k, generator=g) for k, n in pairwise(case.sizes)]
    biases = [torch.randn(n, generator=g) if case.bias else None for n in case.sizes[1:]]
    w, b = ([None if t is None else poisoned(t, layout="dense").to(lane) for t in ts] for ts in (weights, biases))
    low_w, low_b = ([None if t is None or case.low is None else t.to(case.low) for t in ts] for ts in (w, b))
    layout = Layout([Layer(*t) for t in zip(w, b, low_w, low_b, strict=True)])
    settings, gain = RULES[case.optimizer]
    settings = {"lr": LR, "weight_decay": case.weight_decay, **settings}
    rule = optimizer_of(settings.get("optimizer", "sgd"), {k: v for k, v in settings.items() if k != "optimizer"})
    states = [torch.zeros(layout.total, device=lane) for _ in rule.states]
    dzs, xs = [spec.build() for spec in case.dzs], [spec.build() for spec in case.xs]
    rows = build_rows(case.rows, xs[0].shape[0])
    taken = [xs[0] if rows is None else xs[0][rows], *xs[1:]]
    factor = 1.0 if case.unscale is None else case.unscale

    # torch's optimizers run in float64, and in float32 on gradients in the products' dtype.
    params = [
        [t.to(d, copy=True) for pair in zip(weights, biases, strict=True) for t in pair if t is not None]
        for d in (torch.float64, torch.float32)
    ]
    optimizers = [torch_optimizer(ps, settings) for ps in params]
    unsure = [torch.zeros_like(p, dtype=torch.bool) for p in params[0]]
    loss = torch.full((), math.nan, device=lane)
    loss_rows = torch.rand(dzs[0].shape[0], generator=g)
    for step in range(1, STEPS + 1):
        (row,) = rule.rows(*(torch.tensor([value], dtype=torch.float64) for value in (LR, step))).to(lane)
        wgrad_update(
            layout, [t.to(lane) for t in dzs], [t.to(lane) for t in xs], rule.kernel, row,
            states=states, rows=None if rows is None else rows.to(lane),
            unscale=None if case.unscale is None else torch.tensor(case.unscale, device=lane),
            loss_rows=poisoned(loss_rows).to(lane), loss=loss,
        )  # fmt: skip
        for ps, optimizer in zip(params, optimizers, strict=True):
            wide = ps[0].dtype == torch.float64
            grads = []
            for dz, x in zip(dzs, taken, strict=True):
                dz, x = (dz.double(), reference.pixels(x, torch.float64).double()) if wide else (dz, x)
                grads += reference.linear_wgrad(dz, x)[: 2 if case.bias else 1]
            for p, grad in zip(ps, grads, strict=True):
                p.grad = grad.to(p.dtype) * factor
            if wide and case.optimizer == "lion":  # all steps have one gradient, whose sign rounding decides near 0
                for near, p in zip(unsure, ps, strict=True):
                    assert p.grad is not None
                    near |= p.grad.abs() <= 0.01 * p.grad.abs().max()
            optimizer.step()
    torch.testing.assert_close(loss.cpu(), loss_rows.mean())

    got = [t for pair in zip(w, b, strict=True) for t in pair if t is not None]
    m = dzs[0].shape[0]
    sums = []
    for dz, x in zip(dzs, taken, strict=True):
        adz, ax = absolute(dz, reference.pixels(x, torch.float64))
        sums += [largest(adz.t() @ ax), largest(adz.sum(0))][: 2 if case.bias else 1]
    for i, (p, truth, own, size) in enumerate(zip(got, *params, sums, strict=True)):
        magnitude = STEPS * LR * gain * factor * size + truth.abs().max().item()
        results = [torch.where(unsure[i], 0.0, t.cpu()) for t in (p, truth, own)]
        assert_within_budget(*results, reduction=m, magnitude=magnitude, what=f"parameter {i}")
    for copied, master in zip(low_w + low_b, w + b, strict=True):
        if copied is not None:
            assert torch.equal(copied.cpu(), master.cpu().to(case.low))
