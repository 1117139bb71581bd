"""kernels/head.py against reference.head in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import cross_entropy, head
from fastmlp.kernels.column_sums import ColumnSums, padded
from fastmlp.kernels.head import MAX_CLASSES
from tests.support.harness import assert_within_budget, nan_like, poisoned

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (17, 63, 10), (63, 17, 2), (130, 64, 17), (5, 1, 40), (16, 130, 10)]  # M, K, C
OPTIONS = [
    pytest.param({"smoothing": 0.1}, id="smoothing"),
    pytest.param({"class_weight": True}, id="weight"),
    pytest.param({"class_weight": True, "smoothing": 0.3, "ignore_index": 1}, id="weight-smoothing-ignore"),
]


def case(M: int, K: int, C: int, dtype: torch.dtype, activation: str = "identity", *, layout: str = "rows"):
    """Poisoned (h, weight, bias, labels, z_prev). h is f(z_prev), rounded; about a fifth of the labels are ignored."""
    g = torch.Generator().manual_seed(M + K + C)
    z_prev = torch.randn(M, K, generator=g).to(dtype)
    h = poisoned(reference.activate(z_prev, activation), layout=layout)
    w = poisoned((torch.randn(C, K, generator=g) * 2 / K**0.5).to(dtype), layout=layout)
    b = poisoned(torch.randn(C, generator=g).to(dtype))
    y = torch.randint(0, C, (M,), generator=g)
    y[3::5] = -100
    return h, w, b, poisoned(y), poisoned(z_prev, layout=layout)


def f_prime(h: Tensor, z_prev: Tensor, activation: str) -> Tensor:
    """f' from the tensor that the kernel is given: the rounded output, or Z for gelu and silu."""
    if saved_for_grad(activation) == "a":
        return reference.activation_grad_from_output(h, activation)
    return reference.activation_grad(z_prev, activation)


def expected_of(h, w, b, y, z_prev, activation, scale, options):
    """(loss, dZ, dZ_prev, logits) in the dtype of the arguments."""
    loss, dz, da, z = reference.head(h, w, b, y, scale=scale, **options)
    return loss, dz, da * f_prime(h, z_prev, activation), z


def torchs(h, w, b, y, z_prev, activation, scale, options):
    """The same results by torch's own operations in the working dtype: linear, cross_entropy, their backward, f'."""
    h = h.detach().clone().requires_grad_()
    z = F.linear(h, w, b)
    z.retain_grad()
    loss = F.cross_entropy(
        z,
        y,
        options.get("class_weight"),
        ignore_index=options.get("ignore_index", -100),
        label_smoothing=options.get("smoothing", 0.0),
        reduction="none",
    )
    loss.backward(torch.full_like(loss, scale))
    return loss.detach(), z.grad, h.grad * f_prime(h.detach(), z_prev, activation), z.detach()


def check(lane, h, w, b, y, z_prev, activation="identity", *, scale=0.25, **options) -> None:
    """All outputs of the kernel. They start as NaN."""
    (M, K), C = h.shape, w.shape[0]
    dtype = w.dtype
    loss, correct = nan_like((M,), torch.float32).to(lane), torch.full((M,), -1, dtype=torch.int32).to(lane)
    dz, dz_prev = nan_like((M, C), dtype).to(lane), nan_like((M, K), dtype).to(lane)
    logits = nan_like((M, C), torch.float32).to(lane)
    saved = {"a": h, "z": z_prev, None: None}[saved_for_grad(activation)]
    got = head(
        h.to(lane),
        w.to(lane),
        None if b is None else b.to(lane),
        y.to(lane),
        activation=activation,
        saved=None if saved is None else saved.to(lane),
        scale=scale,
        loss=loss,
        dz=dz,
        dz_prev=dz_prev,
        logits=logits,
        correct=correct,
        **{k: v.to(lane) if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    assert got == (loss, dz, dz_prev) or all(a is b for a, b in zip(got, (loss, dz, dz_prev), strict=True))
    doubled = [t if t is None or not t.is_floating_point() else t.double() for t in (h, w, b, y, z_prev)]
    in_double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = expected_of(*doubled, activation, scale, in_double)
    own = torchs(h, w, b, y, z_prev, activation, scale, options)
    for actual, want, torch_result, what in zip(
        (loss, dz, dz_prev, logits), expected, own, ("loss", "dZ", "dZ_prev", "logits"), strict=True
    ):
        assert_within_budget(actual.cpu(), want, torch_result, reduction=K + C, what=what)
    assert torch.equal(correct.cpu(), (logits.cpu().argmax(1) == y).int())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(lane, shape):
    check(lane, *case(*shape, torch.float32, "sigmoid"), "sigmoid")


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("shape", [(17, 63, 10), (33, 128, 17)], ids=str)
def test_dtypes(lane, shape, dtype):
    check(lane, *case(*shape, dtype, "tanh"), "tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_below(lane, activation):
    check(lane, *case(17, 40, 10, torch.float32, activation), activation)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(lane, options):
    h, w, b, y, z_prev = case(17, 40, 10, torch.float32, "relu")
    if options.get("class_weight"):
        options = {**options, "class_weight": poisoned(torch.rand(10, generator=torch.Generator().manual_seed(2)))}
    y[y == -100] = options.get("ignore_index", -100)
    check(lane, h, w, b, y, z_prev, "relu", **options)


@pytest.mark.parametrize("layout", ["dense", "columns", "spread"])
def test_strides(lane, layout):
    check(lane, *case(33, 63, 17, torch.float32, "silu", layout=layout), "silu")


@pytest.mark.parametrize("C", [64, MAX_CLASSES - 1, MAX_CLASSES])
def test_many_classes(lane, C):
    h, w, _, y, z_prev = case(19, 48, C, torch.float32, "sigmoid")
    check(lane, h, w, None, y, z_prev, "sigmoid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(lane, dtype):
    """There are so many blocks of rows that programs share none of them."""
    check(lane, *case(700, 32, 10, dtype, "relu"), "relu")


def test_allocates_what_is_not_given(lane):
    h, w, b, y, _ = (t.to(lane) for t in case(17, 40, 10, torch.float32))
    loss, dz, dz_prev = head(h, w, b, y)
    assert (loss.dtype, loss.shape) == (torch.float32, (17,))
    assert dz.shape == (17, 10)
    assert dz_prev is not None
    assert dz_prev.shape == (17, 40)
    alone = head(h, w, b, y, want_dz_prev=False)
    assert alone[2] is None
    assert torch.equal(alone[0], loss)
    assert torch.equal(alone[1], dz)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 63, 10), (130, 80, 17)], ids=str)
def test_sums_of_rows(lane, shape, dtype):
    """The blocks' sums add up to those of dZ and dZ_prev as they are stored. dZ may have more columns."""
    M, K, C = shape
    h, w, b, y, z_prev = case(M, K, C, dtype, "gelu")
    sums, prev_sums = ColumnSums(M, C, lane), ColumnSums(M, K, lane)
    for of in (sums, prev_sums):
        of.values.fill_(math.nan)
    dz = nan_like((M, padded(C)), dtype).to(lane)
    inputs = [t.to(lane) for t in (h, w, b, y)]
    _, _, dz_prev = head(*inputs, activation="gelu", saved=z_prev.to(lane), dz=dz, sums=sums, prev_sums=prev_sums)
    assert dz[:, C:].isnan().all()
    dz = dz[:, :C]
    for of, t in ((sums, dz), (prev_sums, dz_prev)):
        t, values = t.cpu(), of.values.cpu()
        assert of.blocks > 0
        assert values[of.blocks :].isnan().all()
        assert values[:, t.shape[1] :].isnan().all()
        assert_within_budget(values[: of.blocks, : t.shape[1]].sum(0), t.double().sum(0), t.float().sum(0), reduction=M)
    again = head(*inputs, activation="gelu", saved=z_prev.to(lane))
    assert torch.equal(again[1], dz)
    assert torch.equal(again[2], dz_prev)


def test_equals_separate_kernels(lane):
    """Loss and dZ equal those of linear followed by ``cross_entropy``, up to the rounding of the product."""
    h, w, b, y, _ = case(33, 40, 10, torch.float32)
    loss, dz, _ = head(h.to(lane), w.to(lane), b.to(lane), y.to(lane), scale=0.5)
    loss2, dz2 = cross_entropy(F.linear(h, w, b).to(lane), y.to(lane), scale=0.5)
    torch.testing.assert_close(loss, loss2)
    torch.testing.assert_close(dz, dz2)


def test_rows_gathered_and_scale_on_the_device(lane):
    h, w, b, _, _ = (t.to(lane) for t in case(33, 40, 10, torch.float32))
    g = torch.Generator().manual_seed(0)
    labels = poisoned(torch.randint(0, 10, (60,), generator=g, dtype=torch.uint8))
    rows = torch.randperm(60, generator=g)[:33]
    got = head(h, w, b, labels.to(lane), rows=poisoned(rows).to(lane), factor=torch.tensor(0.125).to(lane))
    for a, e in zip(got, head(h, w, b, labels[rows].long().to(lane), scale=0.125), strict=True):
        # To the compiler this is another kernel, in which it may fuse other products and sums.
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_single_layer_on_pixels(lane, dtype):
    """Softmax regression gathers pixels by row and has no layer below."""
    g = torch.Generator().manual_seed(3)
    images = poisoned(torch.randint(0, 256, (50, 49), generator=g, dtype=torch.uint8))
    labels = torch.randint(0, 10, (50,), generator=g)
    w = poisoned((torch.randn(10, 49, generator=g) / 7).to(dtype))
    rows = torch.randperm(50, generator=g)[:17]
    loss, dz, dz_prev = head(
        images.to(lane), w.to(lane), None, labels.to(lane), rows=rows.to(lane), gather_h=True, want_dz_prev=False
    )
    assert dz_prev is None
    x = images[rows]
    expected, dz_expected, _, _ = reference.head(x.double() / 255, w.double(), None, labels[rows])
    own, own_dz, _, _ = torchs(
        reference.pixels(x, dtype), w, None, labels[rows], torch.zeros(17, 49, dtype=dtype), "identity", 1.0, {}
    )
    assert_within_budget(loss.cpu(), expected, own, reduction=59, what="loss")
    assert_within_budget(dz.cpu(), dz_expected, own_dz, reduction=59, what="dZ")


def test_label_out_of_range_is_nan_in_its_row(lane):
    h, w, b, _, _ = case(9, 20, 10, torch.float32)
    y = torch.tensor([0, 10, 9, -1, 2**40, 3, -(2**62), 11, 4])
    bad = (y < 0) | (y > 9)
    for got in head(h.to(lane), w.to(lane), b.to(lane), y.to(lane)):
        rows = got.cpu().view(9, -1)
        assert rows[bad].isnan().all()
        assert not rows[~bad].isnan().any()


def test_nan_stays_in_its_row(lane):
    h, w, b, _, _ = case(18, 20, 10, torch.float32)
    h[3, 7] = math.nan
    for got in head(h.to(lane), w.to(lane), b.to(lane), torch.zeros(18, dtype=torch.long).to(lane)):
        rows = got.cpu().view(18, -1).isnan()
        assert rows[3].all()
        assert not rows[torch.arange(18) != 3].any()


def test_two_runs_are_bitwise_equal(lane):
    h, w, b, y, _ = (t.to(lane) for t in case(40, 64, 10, torch.float32))
    for a, e in zip(head(h, w, b, y), head(h, w, b, y), strict=True):
        assert torch.equal(a, e)


def test_no_rows(lane):
    w = torch.zeros(10, 4).to(lane)
    loss, dz, dz_prev = head(torch.zeros(0, 4).to(lane), w, None, torch.zeros(0, dtype=torch.long).to(lane))
    assert loss.shape == (0,)
    assert dz.shape == (0, 10)
    assert dz_prev is not None
    assert dz_prev.shape == (0, 4)


def test_no_inputs(lane):
    """K = 0: the logits are the bias."""
    b = torch.tensor([0.0, 1.0, 2.0])
    loss, dz, dz_prev = head(
        torch.zeros(2, 0).to(lane), torch.zeros(3, 0).to(lane), b.to(lane), torch.tensor([0, 2]).to(lane)
    )
    expected = F.cross_entropy(b.expand(2, 3), torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(dz.cpu(), b.softmax(0) - torch.eye(3)[[0, 2]])
    assert dz_prev is not None
    assert dz_prev.shape == (2, 0)
