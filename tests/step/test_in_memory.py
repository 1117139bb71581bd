"""A step reads memory: that of a view may hold other values, and some tensors have none. Operators and machine code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastmlp
from fastmlp.functional import mse_loss
from tests.support.negated import negated
from tests.support.steps import either_way  # noqa: F401


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("members", [None, 3])
def test_views_that_negate(members):
    sizes = (5, 4, 3)
    models = [fastmlp.MLP(sizes, dtype=torch.float64) for _ in range(members or 1)]
    model = models[0] if members is None else fastmlp.MLPEnsemble.stack(models)
    step, x, y, weight = fastmlp.TrainStep(model, lr=0.1, loss="mse"), draw(6, 5), draw(6, 3), draw(6).abs()
    expected = [mse_loss(m(x), y).item() for m in models]
    grad = torch.autograd.grad(mse_loss(models[-1](x), y), models[-1].layers[0].weight)[0]
    for batch in ((x, y), (negated(x), y), (x, negated(y))):  # after a batch that only differs in this
        got = step.gradients(*batch)["layers.0.weight"]
        torch.testing.assert_close(got if members is None else got[-1], grad)
    weighted = step.gradients(x, y, sample_weight=weight)["layers.0.weight"].clone()
    torch.testing.assert_close(step.gradients(x, y, sample_weight=negated(weight))["layers.0.weight"], weighted)
    assert step(negated(x), negated(y)).flatten().tolist() == pytest.approx(expected)
    again = [mse_loss(m(x), y).item() for m in ([model] if members is None else model.unstack())]
    step.epoch(negated(x), negated(y), 6)
    assert step.losses.flatten().tolist() == pytest.approx(again)


def test_class_weights_that_negate():
    weight, x, y = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), draw(6, 5), torch.tensor([0, 1, 2, 2, 1, 0])
    model = fastmlp.MLP((5, 3), dtype=torch.float64)
    losses = [fastmlp.TrainStep(model, lr=0.0, class_weight=w)(x, y).item() for w in (weight, negated(weight))]
    assert losses[0] == losses[1]


def test_a_parameter_that_negates():
    model = fastmlp.MLP((5, 3))
    model.layers[0].weight = torch.nn.Parameter(negated(model.layers[0].weight.detach()))
    with pytest.raises(RuntimeError, match=r"layers.0.weight holds the negatives of its values.*resolve_neg"):
        fastmlp.TrainStep(model)
    parameter = model.layers[0].weight
    parameter.data = parameter.data.resolve_neg()  # as the message says
    step, batch = fastmlp.TrainStep(model), (torch.randn(3, 5), torch.tensor([0, 1, 2]))
    step(*batch)
    parameter.data = torch._neg_view(parameter.data)  # at the same address
    before = parameter.clone()
    with pytest.raises(RuntimeError, match=r"layers.0.weight holds the negatives of its values"):
        step(*batch)
    assert torch.equal(parameter, before)


def test_zeros_without_memory():
    model = fastmlp.MLP((5, 3))
    step, x, zeros = fastmlp.TrainStep(model, lr=0.0), torch.randn(6, 5), torch._efficientzerotensor
    expected = step(x, torch.zeros(6, dtype=torch.int64)), step(x.zero_(), torch.ones(6, dtype=torch.int64))
    assert step(torch.randn(6, 5), zeros((6,), dtype=torch.int64)).isfinite()
    assert step(zeros((6, 5)), torch.ones(6, dtype=torch.int64)) == expected[1]
    step.epoch(x, torch.arange(6) % 3, 2, order=zeros((4,), dtype=torch.int64))
    assert torch.equal(step.losses, step(x[:1], torch.zeros(1, dtype=torch.int64)).expand(2))


def test_tensors_without_strides_or_memory():
    model = fastmlp.MLP((4, 3))
    step, x, y, order = fastmlp.TrainStep(model, loss="mse"), torch.randn(3, 4), torch.randn(3, 3), torch.arange(3)
    weight, before = torch.ones(3), [p.clone() for p in model.parameters()]
    step.gradients(x, y)
    for kind in ("sparse", "mkldnn"):
        other = {t: t.to_sparse() if kind == "sparse" else t.to_mkldnn() for t in (x, y, weight)}
        with pytest.raises(RuntimeError, match=f"a dense input, got one of layout torch._?{kind}.*; use .to_dense"):
            step(other[x], y)
        with pytest.raises(RuntimeError, match=f"a dense target, got one of layout torch._?{kind}"):
            step(x, other[y])
        with pytest.raises(RuntimeError, match=f"a dense sample_weight, got one of layout torch._?{kind}"):
            step(x, y, other[weight])
    with pytest.raises(RuntimeError, match="a dense order, got"):
        step.epoch(x, y, 2, order=order.to_sparse())
    for name, arguments in {"input": (2, 1, 1), "target": (1, 2, 1), "sample_weight": (1, 1, 2)}.items():
        wrapped = [TwoTensor(t, t) if n == 2 else t for t, n in zip((x, y, weight), arguments, strict=True)]
        with pytest.raises(RuntimeError, match=f"reads {name} from memory, and a TwoTensor has no memory"):
            step(*wrapped)
    with pytest.raises(RuntimeError, match="reads order from memory, and a TwoTensor"):
        step.epoch(x, y, 2, order=TwoTensor(order, order))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors():
    model = fastmlp.MLP((4, 3))
    step, x, y = fastmlp.TrainStep(model), torch.randn(3, 4), torch.tensor([0, 1, 2])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    step(x, y)
    with fake, pytest.raises(RuntimeError, match="cannot train a real model inside FakeTensorMode"):
        step(x, y)  # which was accepted before
    with pytest.raises(
        RuntimeError, match=r"reads input from memory, and a FakeTensor has no memory.*in FakeTensorMode"
    ):
        step(fake.from_tensor(x), y)
    for batch in ((x, y), (fake.from_tensor(x), fake.from_tensor(y))):
        with fake, pytest.raises(RuntimeError, match="cannot train a real model inside FakeTensorMode"):
            step(*batch)
    assert type(step(x, y)) is Tensor
    with FakeTensorMode():
        model = fastmlp.MLP((4, 3))
        assert fastmlp.TrainStep(model)(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)).shape == ()
