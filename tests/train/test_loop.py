"""fit, evaluate, engines, schedules and starting values."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.train import CHECK_EVERY, DivergenceError, EpochResult, History, evaluate, fit
from fastmlp.train.engines import AutogradEngine, StepEngine
from fastmlp.train.initial import LEARNING_RATES, initialize_
from fastmlp.train.plots import plot_history
from fastmlp.train.schedules import SCHEDULES, lr_factors
from fastmlp.train.split import held_out
from tests.support.torchs import TORCH_ACTIVATIONS


class Data(NamedTuple):
    images: Tensor
    labels: Tensor


def blobs(n: int = 300, features: int = 12, classes: int = 3, seed: int = 0) -> Data:
    """uint8 images of separable classes: each has its own mean image."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randint(60, 200, (classes, features), generator=torch.Generator().manual_seed(99)).float()
    labels = torch.randint(0, classes, (n,), generator=g)
    images = (means[labels] + 25 * torch.randn(n, features, generator=g)).clamp(0, 255).to(torch.uint8)
    return Data(images, labels)


def small_model(activation: str = "tanh", dtype: torch.dtype = torch.float32, seed: int = 0) -> fastmlp.MLP:
    return initialize_(fastmlp.MLP((12, 16, 3), activation, dtype=dtype), seed)


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Schedules


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 500),
    warmup=st.floats(0, 1, exclude_max=True),
)
def test_factors_are_above_0_and_at_most_1(name, steps, warmup):
    factors = lr_factors(name, steps, warmup)
    assert len(factors) == steps
    assert all(0 < factor <= 1 for factor in factors)
    risen = int(warmup * steps) if name != "constant" else 0
    assert factors[:risen] == sorted(factors[:risen])
    assert factors[risen:] == sorted(factors[risen:], reverse=True)
    assert factors[risen] == 1


def test_schedule_values():
    assert lr_factors("constant", 4, 0.5) == [1, 1, 1, 1]
    assert lr_factors("linear", 10, 0.2) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert lr_factors("cosine", 5, 0.2) == pytest.approx([1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert lr_factors(lambda step, steps, warmup: step / steps, 4) == [0, 0.25, 0.5, 0.75]


def test_schedule_errors():
    with pytest.raises(ValueError, match="unknown schedule 'exp'; expected one of constant, linear, cosine"):
        lr_factors("exp", 10)
    for warmup in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match="below 1"):
            lr_factors("linear", 10, warmup)


# fit


@pytest.mark.parametrize("nesterov", [True, False])
def test_fit_takes_the_steps_of_plain_torch(nesterov):
    """Against torch's modules, loss and SGD in float64, with batches and learning rates written out here."""
    train = blobs(50)
    model = small_model(dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        theirs.data.copy_(ours)
    history = fit(
        model, train, epochs=3, batch_size=16, lr=0.3, momentum=0.8, weight_decay=0.01, nesterov=nesterov, seed=7
    )

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.8, weight_decay=0.01, nesterov=nesterov)
    generator = torch.Generator().manual_seed(7)
    factors = iter(lr_factors("linear", 3 * 4, 0.05))
    for epoch in range(3):
        total = 0.0
        for rows in torch.randperm(50, generator=generator).split(16):
            optimizer.param_groups[0]["lr"] = 0.3 * next(factors)
            loss = F.cross_entropy(plain(train.images[rows].double() / 255), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        assert history.epochs[epoch].train_loss == pytest.approx(total / 50, rel=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_rows_have_weights(loss):
    """The steps of torch's loss, weighted by hand; held-out rows take their weights with them; both engines."""
    x, labels = torch.randn(50, 12, dtype=torch.float64), torch.arange(50) % 3
    y = labels if loss == "cross_entropy" else torch.randn(50, 3, dtype=torch.float64)
    weight = torch.rand(50) * 3 + 0.01
    settings = {"epochs": 2, "batch_size": 16, "lr": 0.3, "momentum": 0.0, "schedule": "constant", "loss": loss}
    models = [small_model(dtype=torch.float64) for _ in range(3)]
    for model, engine in zip(models, ("step", "autograd", "step"), strict=True):
        more = {} if model is models[-1] else {"sample_weight": weight}
        fit(model, (x, y), engine=engine, validation=0.2, **settings, **more)

    plain = small_model(dtype=torch.float64)
    kept, held = held_out(y, 0.2)
    generator, best = torch.Generator().manual_seed(0), math.inf
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    for _ in range(2):
        for rows in torch.randperm(len(kept), generator=generator).split(16):
            a, target, s = plain(x[kept[rows]]), y[kept[rows]], weight[kept[rows]].double()
            losses = F.cross_entropy(a, target, reduction="none") if loss == "cross_entropy" else (a - target) ** 2
            optimizer.zero_grad()
            (s @ losses.reshape(len(rows), -1).mean(1) / s.sum()).backward()
            optimizer.step()
        validation, _ = evaluate(plain, (x[held], y[held]), loss=loss)
        if validation < best:
            best, expected = validation, [p.detach().clone() for p in plain.parameters()]
    for model in models[:2]:
        for ours, theirs in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(models[2].layers[0].weight, expected[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("weight", "kind", "words"),
    [
        ([1.0] * 50, TypeError, "sample_weight"),
        (torch.ones(49), RuntimeError, r"expected sample_weight of shape \[50\], one for each row, got \[49\]"),
        (torch.ones(50, dtype=torch.int64), RuntimeError, "floating-point sample_weight, got torch.int64"),
        (torch.arange(50.0), ValueError, "expected finite sample weights above 0, got 0 in row 0; leave rows out"),
        (torch.ones(50).log(), ValueError, "got 0 in row 0"),
        (torch.full((50,), math.nan), ValueError, "got nan in row 0"),
    ],
)
def test_wrong_weights(weight, kind, words):
    with pytest.raises(kind, match=words):
        fit(small_model(), blobs(50), lr=0.1, sample_weight=weight)


def test_an_engine_without_weights_is_refused():
    class Engine:
        def epoch(self, images, labels, batch_size, order, lr_factors):
            raise AssertionError

    with pytest.raises(TypeError, match="sample_weight needs an engine whose epoch takes it; Engine"):
        fit(small_model(), blobs(50), lr=0.1, sample_weight=torch.ones(50), engine=Engine())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fit_learns(dtype):
    train, test = blobs(), blobs(100, seed=1)
    model = small_model(dtype=dtype)
    before = evaluate(model, test)
    history = fit(model, train, test, epochs=8, batch_size=32, lr=0.1)
    assert len(history.epochs) == 8
    assert [result.epoch for result in history.epochs] == list(range(1, 9))
    assert history.last.test_accuracy > 0.95 > before[1]
    assert history.last.test_loss < before[0]
    assert history.last.train_loss < history.epochs[0].train_loss
    assert evaluate(model, test) == (history.last.test_loss, history.last.test_accuracy)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_same_seed_same_run():
    def run(seed: int) -> tuple[list[Tensor], list[float]]:
        model = small_model()
        history = fit(model, blobs(), epochs=2, batch_size=32, lr=0.1, seed=seed)
        return parameters(model), [result.train_loss for result in history.epochs]

    first = run(3)
    torch.rand(1)
    second = run(3)
    assert_same(first[0], second[0])
    assert first[1] == second[1]
    assert run(4)[1] != first[1]


def test_fit_leaves_the_global_generator_alone():
    model = small_model()
    state = torch.get_rng_state()
    fit(model, blobs(), epochs=1, batch_size=32, lr=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_history_and_callbacks():
    epochs, progress = [], []
    train = blobs(260)
    history = fit(
        small_model(), train, epochs=2, batch_size=2, lr=0.01, on_epoch=epochs.append, on_progress=progress.append
    )
    assert epochs == history.epochs
    assert [(p.epoch, p.step) for p in progress] == [(1, 100), (1, 130), (2, 100), (2, 130)]
    assert {(p.epochs, p.steps) for p in progress} == {(2, 130)}
    assert history.last.test_loss is None
    assert history.last.test_accuracy is None
    assert history.seconds == pytest.approx(sum(result.seconds for result in history.epochs))
    assert history.images_per_second == pytest.approx(2 * 260 / history.seconds)
    assert history.last.images_per_second == pytest.approx(260 / history.last.seconds)
    assert json.loads(json.dumps(history.as_dicts()))[0] == dataclasses.asdict(history.epochs[0])
    # The mean of an epoch is the mean of its stretches, weighted by their rows.
    stretches = [p.loss for p in progress[:2]]
    assert history.epochs[0].train_loss == pytest.approx((200 * stretches[0] + 60 * stretches[1]) / 260)


def test_one_batch_larger_than_the_data():
    model = small_model()
    before = parameters(model)
    history = fit(model, blobs(5), epochs=1, batch_size=64, lr=0.1)
    assert math.isfinite(history.last.train_loss)
    assert not torch.equal(before[0], parameters(model)[0])


def test_training_mode_while_training_evaluation_mode_while_evaluating():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 3)
            self.seen = []

        def forward(self, x):
            self.seen.append((self.training, torch.is_grad_enabled(), len(x)))
            return self.linear(x.float() / 255)

    model = Spy().eval()
    fit(model, blobs(20), blobs(7), epochs=1, batch_size=10, lr=0.1)
    assert [entry for entry in model.seen if entry[2] == 10] == [(True, True, 10)] * 2
    assert all(entry[:2] == (False, False) for entry in model.seen if entry[2] != 10)


class Stub:
    """An engine that returns the given losses, one per call, and may spoil the model."""

    def __init__(self, losses, model=None, spoil_at=None):
        self.losses = list(losses)
        self.model = model
        self.spoil_at = spoil_at
        self.calls = []

    def epoch(self, images, labels, batch_size, order, lr_factors):
        self.calls.append((len(order), list(lr_factors)))
        with torch.no_grad():
            for p in [] if self.model is None else self.model.parameters():
                p += 1
                if len(self.calls) == self.spoil_at:
                    p.view(-1)[-1] = math.inf
        return torch.tensor(self.losses[len(self.calls) - 1])


def test_engine_gets_the_whole_order_in_stretches():
    stub = Stub([1.0, 2.0, 3.0, 4.0])
    history = fit(small_model(), blobs(210), epochs=2, batch_size=2, lr=0.1, engine=stub, schedule="linear")
    assert [rows for rows, _ in stub.calls] == [2 * CHECK_EVERY, 10] * 2
    assert [factor for _, factors in stub.calls for factor in factors] == lr_factors("linear", 210)
    assert [result.train_loss for result in history.epochs] == pytest.approx([220 / 210, 640 / 210])


def test_the_host_waits_only_between_stretches(monkeypatch):
    """No step of the autograd engine reads a value from the device."""
    model = nn.Sequential(nn.Linear(12, 3))
    engine = AutogradEngine(model, lr=0.1, momentum=0.9)
    engine.loss = nn.CrossEntropyLoss()  # checks its labels on the device
    data = blobs(64)
    order = torch.arange(64)

    def refuse(*args):
        raise AssertionError("the host reads a tensor")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    loss = engine.epoch(data.images.float(), data.labels, 8, order, [1.0] * 8)
    monkeypatch.undo()
    assert math.isfinite(loss.item())


# Divergence


@pytest.mark.parametrize(("engine", "place"), [("step", "at step [23]"), ("autograd", "between steps 1 and 10")])
def test_divergence_names_the_place_and_restores_the_model(engine, place):
    model = small_model()
    before = parameters(model)
    with pytest.raises(DivergenceError, match=rf"in epoch 1, {place} of 10.*learning rate of 1e\+37"):
        fit(model, blobs(), epochs=2, batch_size=30, lr=1e38, schedule="constant", engine=engine)
    assert_same(before, parameters(model))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_last_good_epoch_is_kept(loss):
    model = small_model()
    start = parameters(model)
    seen = []
    stub = Stub([1.0, 1.0, 0.5, loss], model)
    with pytest.raises(DivergenceError) as caught:
        fit(model, blobs(300), epochs=3, batch_size=2, lr=0.1, engine=stub, on_epoch=seen.append)
    assert caught.value.epoch == 2
    assert caught.value.steps == (101, 150)
    assert caught.value.history.epochs == seen
    assert len(seen) == 1
    assert "Try a learning rate of 0.01 or smaller" in str(caught.value)
    assert_same(parameters(model), [p + 1 + 1 for p in start])


def test_infinite_parameters_are_found_at_the_end_of_the_epoch():
    model = small_model()
    stub = Stub([1.0, 1.0], model, spoil_at=2)
    with pytest.raises(DivergenceError, match="a parameter became NaN or infinite in epoch 2"):
        fit(model, blobs(20), epochs=3, batch_size=20, lr=0.1, engine=stub)
    assert all(p.isfinite().all() for p in model.parameters())


# Engines


@pytest.mark.parametrize("batch_size", [1, 16])
def test_both_engines_take_the_same_steps(batch_size):
    models = [small_model(dtype=torch.float64) for _ in range(2)]
    histories = [
        fit(model, blobs(50), blobs(20, seed=1), epochs=2, batch_size=batch_size, lr=0.1, engine=engine)
        for model, engine in zip(models, ("step", "autograd"), strict=True)
    ]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(*(history.epochs for history in histories), strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-6)
        assert ours.test_accuracy == theirs.test_accuracy


def test_auto_is_the_step_for_an_mlp_and_autograd_for_others(monkeypatch):
    made = []
    for kind in (StepEngine, AutogradEngine):
        monkeypatch.setattr(
            kind,
            "__init__",
            lambda self, *a, _kind=kind, _init=kind.__init__, **k: (made.append(_kind), _init(self, *a, **k))[1],
        )
    fit(small_model(), blobs(20), epochs=1, lr=0.1)
    fit(nn.Sequential(Pixels(), nn.Linear(12, 3)), blobs(20), epochs=1, lr=0.1)
    assert made == [StepEngine, AutogradEngine]


class Pixels(nn.Module):
    def forward(self, x):
        return x.float() / 255


def test_the_step_engine_trains_mlps_only():
    with pytest.raises(TypeError, match=r"trains a fastmlp.MLP, got Linear"):
        StepEngine(nn.Linear(3, 2), lr=0.1)
    for wrong in ({"lr": 0.0}, {"lr": 0.1, "optimizer": "adamw9"}, {"lr": 0.1, "nesterov": True}):
        with pytest.raises(ValueError):
            StepEngine(small_model(), **wrong)


def test_the_step_engine_names_the_step_that_diverged():
    data = blobs(300)
    images = data.images.float() / 255
    images[237, 5] = math.nan
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    step = (order == 237).nonzero().item() // 2 + 1
    assert step > 100, "not in the first stretch"
    with pytest.raises(DivergenceError, match=rf"the loss became nan in epoch 1, at step {step} of 150") as caught:
        fit(small_model(), Data(images, data.labels), epochs=1, batch_size=2, lr=0.1)
    assert caught.value.steps == (step, step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_do_not_lose_small_updates(dtype):
    """100 updates of 1e-4 to a weight of 1 add up, though each is below half a unit in the last place."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=dtype))

        def forward(self, x):
            return x.to(dtype) * self.weight.float().to(dtype)

    model = Model()
    # All inputs but the first are 0, so the logits are (w, 0). The gradient of w_0 is softmax_0 - 1 = -0.27 near w = 1.
    images = torch.tensor([[1.0, 0.0]], dtype=dtype)
    engine = AutogradEngine(model, lr=1e-4 / 0.2689)
    for _ in range(100):
        engine.epoch(images, torch.tensor([0]), 1, torch.tensor([0]), [1.0])
    assert model.weight[0].item() == pytest.approx(1.01, abs=torch.finfo(dtype).eps)
    assert model.weight[0].item() > 1


def test_frozen_parameters_stay():
    model = small_model()
    model.layers[0].requires_grad_(False)
    frozen, free = model.layers[0].weight.clone(), model.layers[1].weight.clone()
    fit(model, blobs(), epochs=1, batch_size=32, lr=0.1, weight_decay=0.1)
    assert torch.equal(model.layers[0].weight, frozen)
    assert not torch.equal(model.layers[1].weight, free)


# evaluate


@pytest.mark.parametrize("batch_size", [1, 7, 100, 2048])
def test_evaluate_is_the_mean_over_the_data(batch_size):
    data, model = blobs(100), small_model()
    with torch.no_grad():
        logits = model(data.images).double()
    loss, accuracy = evaluate(model, data, batch_size)
    assert loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == data.labels).sum().item() / 100


def test_evaluate_restores_the_mode():
    for training in (True, False):
        model = small_model().train(training)
        evaluate(model, blobs(10))
        assert model.training == training


def test_evaluate_restores_the_mode_of_each_module():
    model = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()
    x, y = blobs(10)
    evaluate(model, (x.float(), y))
    assert [module.training for module in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize("engine", ["step", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_callback_writes_into_parameters_stays(dtype, engine):
    model, (x, y) = small_model(dtype=dtype), blobs()

    def clear(result: EpochResult) -> None:
        if result.epoch == 1:
            with torch.no_grad():
                [p.zero_() for p in model.parameters()]

    fit(model, (x.to(dtype), y), lr=1e-9, epochs=2, engine=engine, on_epoch=clear)
    assert max(p.abs().max() for p in model.parameters()) < 1e-3


# Wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"lr": 0}, "lr must be a finite number above 0, got 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"optimizer": "adamw9"}, "unknown optimizer 'adamw9'; expected one of sgd"),
        ({"engine": "fast"}, "unknown engine 'fast'; expected one of auto, step, autograd"),
        ({"schedule": "exp"}, "unknown schedule"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(small_model(), blobs(), **{"epochs": 1, "lr": 0.1, **changes})


def test_wrong_data():
    model = small_model()
    good = blobs(10)
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        evaluate(model, Data(good.images[:0], good.labels[:0]))
    with pytest.raises(ValueError, match="got 9 and 10"):
        evaluate(model, Data(good.images[:9], good.labels))
    with pytest.raises(RuntimeError, match="expected an input with 12 features"):
        fit(model, Data(good.images[:, :5], good.labels), epochs=1, lr=0.1)
    for label in (-1, 3):
        wrong = good.labels.clone()
        wrong[4] = label
        with pytest.raises(IndexError, match="labels must be from 0 to 2 for a model of 3 classes"):
            fit(model, Data(good.images, wrong), epochs=1, lr=0.1)
    with pytest.raises(RuntimeError, match=r"data on meta and the model on cpu; move the data with \.to\('cpu'\)"):
        fit(model, Data(good.images.to("meta"), good.labels.to("meta")), epochs=1, lr=0.1)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(model, good, 0)


def test_nothing_to_train():
    model = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, blobs(), epochs=1, lr=0.1)


def test_nesterov_needs_momentum_in_the_engine_and_is_ignored_by_fit():
    with pytest.raises(ValueError, match="nesterov needs a momentum above 0"):
        AutogradEngine(small_model(), lr=0.1, nesterov=True)
    fit(small_model(), blobs(20), epochs=1, lr=0.1, momentum=0.0, nesterov=True)


# Starting values


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_initialize(activation):
    model = fastmlp.MLP((50, 40, 30), activation)
    assert initialize_(model, seed=5) is model
    gain = TORCH_ACTIVATIONS[activation].gain
    bounds = [math.sqrt(6 / 50) if gain is None else gain * math.sqrt(6 / 90), math.sqrt(6 / 70)]
    for layer, bound in zip(model.layers, bounds, strict=True):
        assert not layer.bias.any()
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    again = initialize_(fastmlp.MLP((50, 40, 30), activation), seed=5)
    assert_same(parameters(model), parameters(again))
    assert not torch.equal(model.layers[0].weight, initialize_(again, seed=6).layers[0].weight)


def test_initialize_without_bias_and_from_the_global_generator():
    torch.manual_seed(0)
    first = initialize_(fastmlp.MLP((5, 4), bias=False, dtype=torch.bfloat16))
    assert first.layers[0].weight.dtype == torch.bfloat16
    state = torch.get_rng_state()
    assert not torch.equal(first.layers[0].weight, initialize_(fastmlp.MLP((5, 4), bias=False)).layers[0].weight)
    assert not torch.equal(state, torch.get_rng_state())


def test_every_activation_has_a_learning_rate():
    assert set(LEARNING_RATES) == set(ACTIVATIONS)


# The picture


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("with_test", [True, False])
def test_plot(tmp_path, epochs, with_test):
    from PIL import Image

    results = [
        EpochResult(n + 1, 1.0 / (n + 1), 1.1 if with_test else None, 0.8 if with_test else None, 1.0, 10.0)
        for n in range(epochs)
    ]
    path = tmp_path / "new" / "curves.png"
    plot_history(History(results), path, "title", "subtitle", "caption $1 _ x")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 700
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_plot_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no epoch"):
        plot_history(History(), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
