"""Dropout in a TrainStep on a CPU: the masks of autograd, whatever the loss, the optimizer and the call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastmlp
from fastmlp import MLP, MLPEnsemble, TrainStep
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.cpu import MEMBER_WAYS
from tests.support.steps import (
    batches,
    check_against_torch,
    check_float64,
    either_way,  # noqa: F401
    network,
    one_thread,  # noqa: F401
    problem,
    torch_loss,
)
from tests.support.torchs import OPTIMIZERS, torch_optimizer

SIZES, RATES, MEMBERS = (13, 20, 11, 5), (0.25, 0.5), 3


def dropping(activation: Any = "tanh", rates: Any = RATES, *, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    model = network(SIZES, activation)
    model.dropout = rates
    return model


def ensemble(activation: Any = "tanh") -> MLPEnsemble:
    torch.manual_seed(0)
    return MLPEnsemble(SIZES, MEMBERS, activation, dtype=torch.float64, dropout=RATES)


@pytest.mark.parametrize(("activation", "optimizer"), [("sigmoid", "sgd"), ("gelu", "adamw")])
def test_a_hundred_steps_are_torchs(activation, optimizer):
    """In float64 to 1e-10, and in float32 within the budget, with the masks computed again."""
    check_against_torch(dropping(activation), batches(*problem(SIZES, 70), 24, 100), OPTIMIZERS[optimizer])


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_every_loss(loss):
    check_float64(dropping(), batches(*problem(SIZES, 40, loss=loss), 16, 10), OPTIMIZERS["momentum"], loss=loss)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "identity", ("tanh", "relu")])
@pytest.mark.parametrize("rates", [(0.0, 0.5), (0.9, 0.0)])
def test_a_layer_may_drop_nothing(activation, rates):
    check_float64(dropping(activation, rates), batches(*problem(SIZES, 40), 16, 10), OPTIMIZERS["sgd"])


def by_autograd(model: MLP | MLPEnsemble, x: Tensor, y: Tensor, loss: str = "cross_entropy") -> Tensor:
    out = model(x)
    if isinstance(model, MLP):
        return torch_loss(loss, out, y)
    return torch.stack([torch_loss(loss, of_member, y) for of_member in out])


def assert_same(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 1e-11) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("make", [dropping, ensemble])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_autograd_and_a_step_see_the_same_masks(make, name):
    """They may take turns: the number of the pass is the model's."""
    model = make()
    twin, x_y = copy.deepcopy(model), batches(*problem(SIZES, 40), 16, 9)
    step, optimizer = TrainStep(model, **OPTIMIZERS[name]), torch_optimizer(list(twin.parameters()), OPTIMIZERS[name])
    for i, (x, y) in enumerate(x_y):
        loss = step(x, y)
        optimizer.zero_grad()
        expected = by_autograd(twin, x, y)
        expected.sum().backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        if i == 4:
            for each in (model, twin):  # a pass that trains nothing counts too
                each(x)
    assert_same(twin, model)
    assert model.dropout_state[1] == len(x_y) + 1


@pytest.mark.parametrize("make", [dropping, ensemble])
def test_gradients_accumulate_with_a_mask_each(make):
    model = make()
    twin, (one, two) = copy.deepcopy(model), batches(*problem(SIZES, 40), 16, 2)
    step = TrainStep(model, lr=0.1)
    step.gradients(*one)
    gradients = step.gradients(*two, accumulate=True)
    (by_autograd(twin, *one).sum() + by_autograd(twin, *two).sum()).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-10, atol=1e-12)
    assert model.dropout_state[1] == 2


@pytest.mark.parametrize("make", [dropping, ensemble])
@pytest.mark.parametrize("batch_size", [16, 1])
def test_an_epoch_is_its_steps(make, batch_size):
    model = make()
    twin, (x, y) = copy.deepcopy(model), problem(SIZES, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    TrainStep(model, lr=0.1).epoch(x, y, batch_size, order)
    step = TrainStep(twin, lr=0.1)
    for rows in order.split(batch_size):
        step(x[rows], y[rows])
    assert_same(twin, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [dropping, ensemble])
def test_narrow_dtypes_drop_the_same_elements(make, dtype):
    """A run in a narrow dtype stays near the run in float64."""
    model = make()
    twin = copy.deepcopy(model).to(dtype)
    exact, narrow = TrainStep(model, lr=0.1), TrainStep(twin, lr=0.1)
    for x, y in batches(*problem(SIZES, 40), 16, 4):
        torch.testing.assert_close(narrow(x.to(dtype), y).double(), exact(x, y), rtol=0.03, atol=0.03)
    assert torch.equal(twin.dropout_state, model.dropout_state)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("way", MEMBER_WAYS)
def test_members_that_stop_change_no_masks(monkeypatch, way):
    """Whatever the threads and the pieces, and with members that are not side by side."""
    monkeypatch.setattr("fastmlp.step.cpu_ensemble._RUNS", 1)
    torch.manual_seed(0)
    model = MLPEnsemble(SIZES, 6, "tanh", dtype=torch.float64, dropout=RATES)
    twin = copy.deepcopy(model)
    step = TrainStep(model, lr=0.1, optimizer="adamw")
    step._engine._way = way
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0)
    active = torch.tensor([True, True, False, True, False, True])
    for i, (x, y) in enumerate(batches(*problem(SIZES, 40), 16, 4)):
        step.active = True if i < 2 else active
        losses = step(x, y)
        kept = [p.detach().clone() for p in twin.parameters()]
        optimizer.zero_grad()
        expected = by_autograd(twin, x, y)
        expected.sum().backward()
        optimizer.step()
        with torch.no_grad():
            for p, before in zip(twin.parameters(), kept, strict=True):
                p[~step.active] = before[~step.active]
        torch.testing.assert_close(losses[step.active], expected[step.active].detach(), rtol=1e-9, atol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p[active], q[active], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [dropping, ensemble])
def test_a_step_follows_the_model(make):
    """Evaluation mode, another probability, a loaded state: as autograd does."""
    model = make()
    twin = copy.deepcopy(model)
    saved = copy.deepcopy(model.state_dict())
    x, y = problem(SIZES, 16)
    step, optimizer = TrainStep(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    changes = [
        lambda m: None,
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: setattr(m, "dropout", 0.75),
        lambda m: setattr(m, "dropout", (0.0, 0.5)),
        lambda m: m.load_state_dict(saved),
        lambda m: m.layers[0].requires_grad_(False),
        lambda m: setattr(m, "dropout", 0.0),
    ]
    for change in changes:
        for each in (model, twin):
            change(each)
        loss = step(x, y)
        optimizer.zero_grad()
        expected = by_autograd(twin, x, y)
        expected.sum().backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        assert_same(twin, model)
    assert not model.state_dict().keys() & {"dropout_state"}


def test_dropout_that_comes_later():
    model = dropping(rates=0.0)
    step = TrainStep(model, lr=0.1)
    x, y = problem(SIZES, 16)
    step(x, y)
    torch.manual_seed(7)
    model.dropout = 0.5
    twin = copy.deepcopy(model)
    torch.testing.assert_close(step(x, y), by_autograd(twin, x, y).detach(), rtol=1e-10, atol=1e-12)


def test_a_step_that_fails_is_not_counted():
    model = dropping()
    step = TrainStep(model, lr=0.1)
    x, y = problem(SIZES, 16)
    with pytest.raises(IndexError):
        step(x, y + SIZES[-1])
    assert model.dropout_state[1] == 0
    step(x[:0], y[:0])
    assert model.dropout_state[1] == 0


def test_a_state_that_is_gone_is_an_error():
    model = dropping()
    step = TrainStep(model, lr=0.1)
    x, y = problem(SIZES, 16)
    model._buffers["dropout_state"] = torch.zeros(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"dropout_state to be int64 \[2\] on cpu, got torch.float32"):
        step(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_runs_of_one_seed_are_equal_to_the_bit():
    def run(seed: int) -> MLP:
        model = dropping(seed=seed)
        step = TrainStep(model, lr=0.1, momentum=0.9)
        for batch in batches(*problem(SIZES, 40), 16, 5):
            step(*batch)
        return model

    one, two, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)


@pytest.mark.parametrize("make", [dropping, ensemble])
def test_a_resumed_run_is_equal_to_the_bit(make):
    data = batches(*problem(SIZES, 40), 16, 6)
    whole = make()
    step = TrainStep(whole, lr=0.01, optimizer="adamw")
    for batch in data[:3]:
        step(*batch)
    model_state, state = copy.deepcopy(whole.state_dict()), step.state_dict()
    for batch in data[3:]:
        step(*batch)
    torch.manual_seed(99)
    resumed = make() if make is ensemble else dropping(seed=5)
    again = TrainStep(resumed, lr=0.01, optimizer="adamw")
    resumed.load_state_dict(model_state)
    again.load_state_dict(state)
    for batch in data[3:]:
        again(*batch)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_average_has_the_state_too():
    model = dropping()
    step = TrainStep(model, lr=0.1, ema_decay=0.9)
    step(*problem(SIZES, 16))
    copy.deepcopy(model).load_state_dict(step.ema_state_dict())


def test_copies_of_a_step_go_on_alike():
    step = TrainStep(dropping(), lr=0.1, momentum=0.9)
    batch = problem(SIZES, 16)
    step(*batch)
    other = copy.deepcopy(step)
    assert torch.equal(step(*batch), other(*batch))
    assert_same(step.model, other.model)


@pytest.mark.parametrize("engine", ["step", "autograd"])
def test_fit_trains_with_dropout_and_judges_without(engine):
    torch.manual_seed(0)
    x, y = torch.randn(96, 6), torch.randint(0, 3, (96,))
    model = MLP((6, 16, 3), "tanh", dropout=0.5)
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    plain.dropout = 0.0
    history = fastmlp.fit(model, (x, y), (x, y), lr=0.1, epochs=2, batch_size=32, engine=engine)
    assert model.dropout_state[1] == 6
    fastmlp.fit(plain, (x, y), lr=0.1, epochs=2, batch_size=32, engine=engine)
    assert not torch.allclose(plain.layers[0].weight, model.layers[0].weight)
    loss = F.cross_entropy(model.eval()(x), y).item()
    assert history.last.test_loss == pytest.approx(loss, rel=1e-4)
    again = start
    fastmlp.fit(again, (x, y), lr=0.1, epochs=2, batch_size=32, engine=engine)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("engine", ["step", "autograd"])
def test_a_resumed_fit_is_equal_to_the_bit(tmp_path, engine):
    torch.manual_seed(0)
    x, y = torch.randn(96, 6), torch.randint(0, 3, (96,))
    whole = MLP((6, 16, 3), "tanh", dropout=0.5)
    part, options = copy.deepcopy(whole), {"lr": 0.1, "batch_size": 32, "engine": engine, "schedule": "constant"}
    fastmlp.fit(whole, (x, y), epochs=4, **options)
    fastmlp.fit(part, (x, y), epochs=2, checkpoint=tmp_path / "state", **options)
    resumed = MLP((6, 16, 3), "tanh", dropout=0.5)
    fastmlp.fit(resumed, (x, y), epochs=4, resume=tmp_path / "state", **options)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    resumed.dropout = 0.4
    with pytest.raises(ValueError, match=r"dropout=0.4 differs from the 0.5"):
        fastmlp.fit(resumed, (x, y), epochs=5, resume=tmp_path / "state", **options)
