"""An ensemble of one member on a CPU: the step of an MLP, with its bits, and an axis of members around everything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastmlp import MLP, MLPEnsemble, TrainStep
from fastmlp.step.cpu_one_member import OneMember
from tests.support.steps import converted, flat, network
from tests.support.torchs import OPTIMIZERS

SIZES, B = (5, 17, 6, 3), 40


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, B, 5, generator=g).to(dtype), torch.randint(0, 3, (1, B), generator=g)


def both(dtype: torch.dtype = torch.float32, products: torch.dtype | None = None, **settings):
    """The step of an ensemble and that of its member."""
    single = converted(network(SIZES, "gelu"), dtype)
    return TrainStep(MLPEnsemble.stack([single]), dtype=products, **settings), TrainStep(
        single, dtype=products, **settings
    )


def check(one: TrainStep, alone: TrainStep) -> None:
    assert isinstance(one._engine, OneMember)
    assert torch.equal(flat(one.model.unstack()[0]), flat(alone.model))
    of_one, of_alone = one.state_dict(), alone.state_dict()
    assert of_one.pop("active").tolist() == [True]
    assert of_one.keys() == of_alone.keys()
    for name, value in of_alone.items():
        assert torch.equal(of_one[name], value.unsqueeze(0)), name


@pytest.mark.parametrize(
    ("optimizer", "dtype", "products"),
    [
        ("sgd", torch.float32, None),
        ("adamw, all settings", torch.float32, None),
        ("momentum", torch.float32, torch.float16),
        ("clipping, momentum", torch.bfloat16, None),
    ],
    ids=str,
)
def test_it_is_an_mlp(optimizer, dtype, products):
    """Steps, weighted steps, accumulated gradients and epochs, with and without the axis; state that is taken up."""
    one, alone = both(dtype, products, **OPTIMIZERS[optimizer])
    x, y = batch(0, dtype)
    weight = torch.rand(1, B, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2)).view(1, B)
    assert torch.equal(one(x, y), alone(x[0], y[0]).view(1))
    assert torch.equal(one(x[0], y[0], weight[0]), alone(x[0], y[0], weight[0]).view(1))
    one.gradients(x, y), alone.gradients(x[0], y[0])
    got, want = (s.gradients(*of, accumulate=True) for s, of in ((one, (x[0], y)), (alone, (x[0], y[0]))))
    assert all(torch.equal(got[name], grad.unsqueeze(0)) for name, grad in want.items())
    one.update(), alone.update()
    losses = one.epoch(x, y, 16, order, sample_weight=weight), one.epoch(x[0], y[0], 16, order[0])
    expected = alone.epoch(x[0], y[0], 16, order[0], sample_weight=weight[0]), alone.epoch(x[0], y[0], 16, order[0])
    assert torch.equal(torch.cat(losses), torch.stack(expected))
    assert torch.equal(one.losses[:, 0], alone.losses)
    check(one, alone)
    restored = copy.deepcopy(one)
    assert torch.equal(restored(x, y), alone(x[0], y[0]).view(1))
    check(restored, alone)


def test_groups_and_averages():
    groups = [{"params": "*.bias", "lr": 0.2, "weight_decay": 0.0}]
    one, alone = both(momentum=0.9, weight_decay=0.1, param_groups=groups, ema_decay=0.9)
    x, y = batch(0)
    for step, *of in ((one, x, y), (alone, x[0], y[0])):
        step(*of)
        step.epoch(*of, 16, lr_factors=[1.0, 0.5, 0.25])
        step.lr = 0.01
        step(*of)
    check(one, alone)


def test_a_pause():
    """Nothing changes but the number of passes of dropout; gradients are 0 or as they were."""
    step = TrainStep(MLPEnsemble(SIZES, 1, dropout=0.5), momentum=0.9)
    x, y = batch(0)
    step(x, y)
    before = copy.deepcopy({**step.model.state_dict(), **step.state_dict()})
    step.active = [False]
    assert step(x, y).isnan().all()
    assert step.epoch(x, y, 16).isnan().all()
    assert all(not grad.any() for grad in step.gradients(x, y).values())
    step.update()
    after = {**step.model.state_dict(), **step.state_dict()}
    assert after.pop("dropout_state")[1] == before.pop("dropout_state")[1] + 5
    del before["active"], after["active"]
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("label", [3, -100])
@pytest.mark.parametrize("call", ["step", "native step", "epoch"])
def test_a_class_that_does_not_exist(request, call, label):
    """As of several members, -100 is no class unless it is ignored by name."""
    if call == "native step":
        request.getfixturevalue("native_code")
    x, y = batch(0)
    y[0, 7] = label
    step = TrainStep(MLPEnsemble(SIZES, 1))
    before = flat(step.model)
    calls = {"step": step, "native step": step, "epoch": lambda x, y: step.epoch(x, y, 16)}
    with pytest.raises(IndexError, match=f"class number {label} is out of range"):
        calls[call](x, y)
    assert torch.equal(flat(step.model), before)
    if label == -100:
        assert TrainStep(MLPEnsemble(SIZES, 1), ignore_index=-100)(x, y).isfinite().all()


def test_writes_and_frozen_layers_are_followed():
    one, alone = both(products=torch.bfloat16, lr=0.1)
    x, y = batch(0)
    for step, *of in ((one, x, y), (alone, x[0], y[0])):
        step(*of)
        with torch.no_grad():
            step.model.layers[1].weight.mul_(0.5)
        step.model.layers[0].requires_grad_(False)
        step(*of)
        step.model.layers[0].requires_grad_(True)
        step(*of)
    check(one, alone)
    assert not isinstance(TrainStep(MLP(SIZES))._engine, OneMember)
