"""kernels/row_weights.py: sample weights, class weights and ignored labels in the losses' kernels, and the divisor.

The oracle is torch's loss of single rows in float64, their weighted mean, and autograd.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmlp import reference
from fastmlp.kernels import cross_entropy, elementwise_loss, head, row_weights, softmax_squared_error
from tests.support.harness import assert_within_budget, nan_like, poisoned

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]

#: The module, whatever the package exports.
squared_error_module = importlib.import_module("fastmlp.kernels.softmax_squared_error")
#: Rows up to which every program sums the weights itself, and how many are added at a time.
SUMS = {"one block": (2048, 128), "blocks": (2048, 16), "a launch": (8, 16)}
ROWS = 37
OPTIONS = {
    "labels": {},
    "class weight": {"class_weight": True},
    "smoothing, class weight": {"class_weight": True, "label_smoothing": 0.2},
    "probabilities": {"probabilities": True},
    "probabilities, all": {"probabilities": True, "class_weight": True, "label_smoothing": 0.2},
}
CLASSES = 10


def sums(monkeypatch: pytest.MonkeyPatch, name: str) -> int:
    """The number of rows, with the limits set."""
    limit, block = SUMS[name]
    monkeypatch.setattr(row_weights, "SUMMED_HERE", limit)
    for constant in ("SHORT", "LONG", "BLOCK"):
        monkeypatch.setattr(row_weights, constant, block)
    return ROWS


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def problem(m: int, options: dict[str, Any], dtype: torch.dtype = torch.float32, classes: int = CLASSES):
    """(Z, targets, class weights or None, sample weights): an eighth of the labels ignored, some weights 0."""
    z = (4 * random(m, classes, seed=1) - 2).to(dtype)
    if options.get("probabilities"):
        y = random(m, classes, seed=2).softmax(1).to(dtype)
    else:
        y = torch.randint(0, classes, (m,), generator=torch.Generator().manual_seed(2))
        y[3::8] = -100
    class_weight = random(classes, seed=3) + 0.1 if options.get("class_weight") else None
    s = random(m, seed=4)
    s[::7] = 0.0
    return z, y, class_weight, s


def expected_of(z: Tensor, y: Tensor, class_weight: Tensor | None, s: Tensor | None, smoothing: float):
    """(loss, dZ, divisor) of the weighted mean, in Z's dtype."""
    z = z.detach().clone().requires_grad_()
    weight = None if class_weight is None else class_weight.to(z.dtype)
    y = y.to(z.dtype) if y.is_floating_point() else y
    rows = F.cross_entropy(z, y, weight, label_smoothing=smoothing, reduction="none")
    counted = torch.ones_like(rows) if s is None else s.to(z.dtype)
    total = counted
    if not y.is_floating_point():
        of_class = torch.ones(z.shape[1], dtype=z.dtype) if weight is None else weight
        total = counted * torch.where(y == -100, 0.0, of_class[y.clamp_min(0)])
    loss = (rows * counted).sum() / total.sum()
    return loss.detach(), torch.autograd.grad(loss, z)[0], total.sum().detach()


def check(results: tuple[Tensor, Tensor, Tensor], exact: tuple[Tensor, ...], own: tuple[Tensor, ...], m: int) -> None:
    """(sum of the losses, dZ, divisor) against float64."""
    total, dz, divisor = (t.cpu() for t in results)
    assert_within_budget((total / divisor).view(1), exact[0].view(1), own[0].view(1).float(), reduction=m, what="loss")
    assert_within_budget(divisor.view(1), exact[2].view(1), own[2].view(1).float(), reduction=m, what="divisor")
    # The gradients of all rows have one factor, the divisor's reciprocal.
    assert_within_budget(dz, exact[1], own[1], reduction=m + CLASSES, what="dZ")


def outputs(lane: torch.device, m: int, classes: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full of NaN."""
    new = {"loss": nan_like((m,), torch.float32), "dz": nan_like((m, classes), dtype)}
    return {name: t.to(lane) for name, t in {**new, "divisor": nan_like((), torch.float32)}.items()}


@pytest.mark.parametrize(
    ("dtype", "sample", "how"),
    [
        (torch.float32, True, "one block"),
        (torch.float32, False, "blocks"),
        (torch.float16, True, "a launch"),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.covering
def test_head(lane, monkeypatch, case, how, sample, dtype):
    """Logits of the head are those of a product with the unit matrix."""
    options, m = OPTIONS[case], sums(monkeypatch, how)
    z, y, class_weight, s = problem(m, options, dtype)
    out = outputs(lane, m, CLASSES, dtype)
    smoothing = options.get("label_smoothing", 0.0)
    head(
        z.to(lane), torch.eye(CLASSES, dtype=dtype).to(lane), None, poisoned(y).to(lane), want_dz_prev=False,
        class_weight=None if class_weight is None else poisoned(class_weight).to(lane),
        sample_weight=poisoned(s).to(lane) if sample else None, smoothing=smoothing, **out,
    )  # fmt: skip
    exact = expected_of(z.double(), y, class_weight, s if sample else None, smoothing)
    own = expected_of(z.float() if dtype == torch.float16 else z, y, class_weight, s if sample else None, smoothing)
    check((out["loss"].sum(), out["dz"], out["divisor"]), exact, (own[0], own[1].to(dtype), own[2]), m)


@pytest.mark.parametrize(("whole", "how"), [(True, "blocks"), (True, "a launch"), (False, "one block")], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.covering
def test_cross_entropy(lane, monkeypatch, case, how, whole):
    options, m = OPTIONS[case], sums(monkeypatch, how)
    classes = CLASSES if whole else 40
    if not whole:
        monkeypatch.setattr("fastmlp.kernels.softmax_tiles.WHOLE_ROW", 8)
    z, y, class_weight, s = problem(m, options, classes=classes)
    smoothing = options.get("label_smoothing", 0.0)
    out = outputs(lane, m, classes, torch.float32)
    cross_entropy(
        poisoned(z).to(lane), poisoned(y).to(lane), weight=None if class_weight is None else class_weight.to(lane),
        sample_weight=poisoned(s).to(lane), smoothing=smoothing, **out,
    )  # fmt: skip
    exact = expected_of(z.double(), y, class_weight, s, smoothing)
    check((out["loss"].sum(), out["dz"], out["divisor"]), exact, expected_of(z, y, class_weight, s, smoothing), m)


@pytest.mark.parametrize("launcher", ["head", "cross_entropy"])
@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize("case", ["smoothing, class weight", "probabilities, all"])
@pytest.mark.covering
def test_weights_are_gathered_like_targets(lane, monkeypatch, case, how, launcher):
    options, m = OPTIONS[case], sums(monkeypatch, how)
    z, y, class_weight, s = problem(m, options)
    back = torch.randperm(2 * m, generator=torch.Generator().manual_seed(5))[:m]  # the row of the data of each row of Z
    all_s, all_y = torch.full((2 * m,), 3.0), torch.ones((2 * m, *y.shape[1:]), dtype=y.dtype)
    all_s[back], all_y[back] = s, y
    out = outputs(lane, m, CLASSES, torch.float32)
    stored = {"sample_weight": poisoned(all_s, layout="spread").to(lane), "rows": back.to(lane), "smoothing": 0.2}
    target, weight = poisoned(all_y).to(lane), class_weight.to(lane)
    if launcher == "head":
        unit = torch.eye(CLASSES).to(lane)
        head(z.to(lane), unit, None, target, want_dz_prev=False, class_weight=weight, **stored, **out)
    else:
        cross_entropy(z.to(lane), target, weight=weight, **stored, **out)
    exact = expected_of(z.double(), y, class_weight, s, 0.2)
    check((out["loss"].sum(), out["dz"], out["divisor"]), exact, expected_of(z, y, class_weight, s, 0.2), m)


@pytest.mark.parametrize(("gathered", "how"), [(False, "one block"), (True, "blocks"), (True, "a launch")], ids=str)
@pytest.mark.parametrize("loss", ["mse", "huber", "bce_with_logits", "pos_weight"])
@pytest.mark.covering
def test_elementwise_loss(lane, monkeypatch, loss, gathered, how):
    m = sums(monkeypatch, how)
    a, y, s = 6 * random(m, 7, seed=1) - 3, random(m, 7, seed=2), random(m, seed=4)
    y[::3] = y[::3].round()
    pos_weight = 3 * random(7, seed=5) if loss == "pos_weight" else None
    name = "bce_with_logits" if loss == "pos_weight" else loss

    def mean_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        ad, yd, sd = a.to(dtype).requires_grad_(), y.to(dtype), s.to(dtype)
        if pos_weight is None:
            rows = reference.elementwise_loss(ad, yd, name, 0.5)
        else:
            rows = F.binary_cross_entropy_with_logits(ad, yd, pos_weight=pos_weight.to(dtype), reduction="none")
        value = (rows.mean(1) * sd).sum() / sd.sum()
        return value.detach(), torch.autograd.grad(value, ad)[0], 7 * sd.sum()

    rows = torch.randperm(2 * m, generator=torch.Generator().manual_seed(5))[:m] if gathered else None
    stored_y, stored_s = y, s
    if rows is not None:
        stored_y, stored_s = torch.ones(2 * m, 7), torch.full((2 * m,), 3.0)
        stored_y[rows], stored_s[rows] = y, s
    divisor, da = nan_like((), torch.float32).to(lane), nan_like((m, 7), torch.float32).to(lane)
    values, _ = elementwise_loss(
        a.to(lane), poisoned(stored_y, layout="dense").to(lane), name, delta=0.5, da=da, divisor=divisor,
        pos_weight=None if pos_weight is None else poisoned(pos_weight).to(lane),
        sample_weight=poisoned(stored_s, layout="spread").to(lane), rows=None if rows is None else rows.to(lane),
    )  # fmt: skip
    check((values.sum(), da, divisor), mean_of(torch.float64), mean_of(torch.float32), m)


@pytest.mark.parametrize(("classes", "how"), [(10, "blocks"), (10, "a launch"), (70, "one block")], ids=str)
@pytest.mark.covering
def test_softmax_squared_error(lane, monkeypatch, classes, how):
    m = sums(monkeypatch, how)
    if classes == 70:
        monkeypatch.setattr(squared_error_module, "WHOLE_ROW", 8)
        monkeypatch.setattr(squared_error_module, "BLOCK_C", 32)
    z, y, _, s = problem(m, {}, classes=classes)
    y = y.clamp_min(0)
    out = outputs(lane, m, classes, torch.float32)
    softmax_squared_error(poisoned(z).to(lane), poisoned(y).to(lane), sample_weight=poisoned(s).to(lane), **out)

    def mean_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        zd, sd = z.to(dtype).requires_grad_(), s.to(dtype)
        value = (reference.softmax_squared_error(zd, F.one_hot(y, classes).to(dtype)) * sd).sum() / sd.sum()
        return value.detach(), torch.autograd.grad(value, zd)[0], sd.sum()

    check((out["loss"].sum(), out["dz"], out["divisor"]), mean_of(torch.float64), mean_of(torch.float32), m)


@pytest.mark.parametrize("launcher", ["head", "cross_entropy"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_of_ignored_rows_are_0_where_all_are_ignored(lane, launcher, smoothing):
    """The divisor is 0. Labels out of range make everything NaN."""
    z, y = problem(37, {})[:2]
    for value in (-100, CLASSES):
        y[:] = -100
        y[5] = value
        out = outputs(lane, 37, CLASSES, torch.float32)
        if launcher == "head":
            unit = torch.eye(CLASSES).to(lane)
            head(z.to(lane), unit, None, y.to(lane), want_dz_prev=False, smoothing=smoothing, **out)
        else:
            cross_entropy(z.to(lane), y.to(lane), smoothing=smoothing, **out)
        rows = out["dz"].cpu()
        ignored = torch.arange(37) != 5
        assert (rows[ignored] == 0).all()
        if value == -100:
            assert (rows == 0).all()
            assert out["divisor"] == 0
            assert (out["loss"] == 0).all()
        else:
            assert rows[5].isnan().all()
            assert out["divisor"].isnan()


@pytest.mark.parametrize("how", ["blocks", "a launch"])
def test_two_runs_are_bitwise_equal(lane, monkeypatch, how):
    m = sums(monkeypatch, how)
    z, y, class_weight, s = (t.to(lane) for t in problem(m, OPTIONS["smoothing, class weight"]))
    runs = []
    for _ in range(2):
        divisor = torch.full((), math.nan).to(lane)
        loss, dz = cross_entropy(z, y, weight=class_weight, sample_weight=s, divisor=divisor)
        runs.append((loss, dz, divisor))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("own", [True, False], ids=["own rows", "one order"])
@pytest.mark.covering
def test_members_have_weights_of_their_own(lane, own):
    """The launch for many rows. A member's weight is that of a single model, whose threads may add in another order."""
    z, y, class_weight, s = zip(*(problem(ROWS, {"class_weight": True}) for _ in range(3)), strict=True)
    g = torch.Generator().manual_seed(0)
    labels = torch.stack([of[torch.randperm(ROWS, generator=g)] for of in y]).to(lane)
    sample = torch.stack([of[torch.randperm(ROWS, generator=g)] for of in s]).to(lane)
    rows = torch.stack([torch.randperm(ROWS, generator=g)[:21] for _ in z]).to(lane)
    of_classes = class_weight[0].to(lane)
    rows, labels = (rows, labels) if own else (rows[0], labels[0])
    divisor = nan_like((3,), torch.float32).to(lane)
    common = {"classes": CLASSES, "class_weight": of_classes}
    row_weights.total_weight(divisor, 21, target=labels, sample_weight=sample, rows=rows, **common)
    for e in range(3):
        single = nan_like((), torch.float32).to(lane)
        of = {"target": labels[e] if own else labels, "rows": rows[e] if own else rows, "sample_weight": sample[e]}
        row_weights.total_weight(single, 21, **of, **common)
        torch.testing.assert_close(divisor[e], single, rtol=1e-6, atol=0)
    assert len(divisor.unique()) == 3
