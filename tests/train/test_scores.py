"""Losses of values, the held-out part, the best epoch, and what `fit` takes as data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import fastmlp
from fastmlp.base.losses import LOSSES, STEP_LOSSES
from fastmlp.data import ImageDataset, Table
from fastmlp.train import evaluate, fit, held_out
from fastmlp.train.engines import engine_for
from fastmlp.train.initial import initialize_
from fastmlp.train.scores import metric_of, record

VALUES = [name for name in STEP_LOSSES if record(name).target == "values"]


def smooth(n: int = 64, outputs: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [n, 4], and smooth functions of them from 0 to 1."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, torch.sigmoid(torch.stack([x[:, 0] - x[:, i + 1] for i in range(outputs)], 1))


def model_of(outputs: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> fastmlp.MLP:
    return initialize_(fastmlp.MLP((4, 8, outputs), "tanh", dtype=dtype), seed)


def test_the_losses_of_values():
    assert set(VALUES) == {"mse", "l1", "huber", "bce"}
    assert {metric_of(name) for name in set(STEP_LOSSES) - set(VALUES)} == {"accuracy"}
    assert {name for name in VALUES if metric_of(name) == "accuracy"} == {"bce"}


@pytest.mark.parametrize("loss", VALUES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_losses_and_metrics_are_torchs(loss, outputs):
    model, (x, y) = model_of(outputs), smooth(50, outputs)
    function = LOSSES[STEP_LOSSES[loss]].torch
    with torch.no_grad():
        a = model(x).double()
    value, metric = evaluate(model, (x, y), 16, loss=loss)
    assert value == pytest.approx(function(a, y.double()).item(), rel=1e-6)
    if metric_of(loss) == "r2":
        mean = y.double().mean(0)
        assert metric == pytest.approx(1 - ((a - y) ** 2).sum().item() / ((y - mean) ** 2).sum().item(), rel=1e-6)
    else:
        assert metric is None
        hard = (y > 0.5).float()
        assert evaluate(model, (x, hard), loss=loss)[1] == ((a > 0) == (hard == 1)).double().mean().item()


def test_targets_without_variance_have_no_r2():
    assert evaluate(model_of(), (smooth(8)[0], torch.ones(8)), loss="mse")[1] is None


@pytest.mark.parametrize("loss", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fit_learns_values(loss, dtype):
    x, y = smooth(128)
    model = model_of(dtype=dtype)
    before = evaluate(model, (x.to(dtype), y), loss=loss)[0]
    history = fit(model, (x.to(dtype), y.flatten()), (x.to(dtype), y), loss=loss, epochs=8, batch_size=16, lr=0.05)
    assert history.loss == loss
    assert history.last.test_loss < before
    assert history.last.test_accuracy is None
    if metric_of(loss) == "r2":
        assert history.last.test_r2 > 0.5


@pytest.mark.parametrize("loss", VALUES)
def test_engines_take_torchs_steps(loss):
    x, y = smooth(32, 2)
    function = LOSSES[STEP_LOSSES[loss]].torch
    for engine in ("autograd", "step"):
        model = model_of(2, torch.float64)
        plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.data.copy_(ours)
        fit(
            model,
            (x.double(), y.double()),
            epochs=1,
            batch_size=8,
            lr=0.1,
            loss=loss,
            schedule="constant",
            engine=engine,
        )
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        for rows in torch.randperm(32, generator=torch.Generator().manual_seed(0)).split(8):
            optimizer.zero_grad()
            function(plain(x[rows].double()), y[rows].double()).backward()
            optimizer.step()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["step", "autograd"])
def test_squared_errors_of_probabilities_are_a_loss_of_classes(engine):
    model, given = model_of(3), data(40)
    loss = "softmax_squared_error"
    history = fit(model, given, given, loss=loss, epochs=1, batch_size=8, lr=0.1, engine=engine)
    with torch.no_grad():
        p = model(given[0]).softmax(1)
    expected = (p - F.one_hot(given[1], 3)).square().sum(1).mean().item()
    assert history.last.test_loss == pytest.approx(expected, rel=1e-5)
    assert history.last.test_accuracy == (p.argmax(1) == given[1]).double().mean().item()


def test_auto_is_the_step_of_an_mlp_and_autograd_of_other_modules():
    assert engine_for(model_of()) == "step"
    assert engine_for(model_of().to_torch()) == "autograd"


# Validation


class Losses:
    """An engine that adds 1 to the parameters at each call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def epoch(self, images: Tensor, *rest: object) -> Tensor:
        self.rows = len(images)
        for p in self.model.parameters():
            p += 1
        return torch.tensor(1.0)


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations with losses by the data's name, and a list of what was evaluated."""
    looks: list[str] = []
    script = {"validation": iter([3.0, 1.0, 2.0, 1.0]), "test": iter([0.5] * 9)}
    names: dict[int, str] = {}

    def scored(model: nn.Module, data: tuple[Tensor, Tensor], loss: str, **rest: None) -> tuple[float, float]:
        name = names.get(id(data), "validation")
        looks.append(name)
        return next(script[name]), 0.25

    monkeypatch.setattr("fastmlp.train.loop.evaluate", scored)
    return looks, names


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.arange(n) % 3


def test_the_best_epoch_is_kept_and_the_test_data_seen_once(scripted):
    looks, names = scripted
    model, test, seen = model_of(3), data(), []
    names[id(test)] = "test"
    start = [p.clone() for p in model.parameters()]
    history = fit(
        model,
        data(),
        test,
        validation=data(),
        epochs=4,
        batch_size=40,
        lr=0.1,
        engine=Losses(model),
        on_epoch=seen.append,
    )
    assert looks == ["validation"] * 4 + ["test"]
    assert history.best.epoch == 2  # the first of two with the least loss
    assert (history.best.test_loss, history.best.test_accuracy) == (0.5, 0.25)
    assert [result.test_loss for result in history.epochs] == [None, 0.5, None, None]
    assert [result.validation_loss for result in seen] == [3, 1, 2, 1]
    assert all(result.test_loss is None for result in seen)
    for before, after in zip(start, model.parameters(), strict=True):
        assert torch.equal(before + 1 + 1, after)


def test_a_share_is_held_out():
    model = model_of(3)
    engine = Losses(model)
    history = fit(model, data(), validation=0.25, epochs=1, batch_size=64, lr=0.1, engine=engine)
    assert engine.rows == 30
    assert history.best.validation_loss is not None
    assert history.best.test_loss is None
    for share in (0, 1, 0.001, -1, math.nan):
        with pytest.raises(ValueError, match=r"hold out must be above 0|cannot be divided"):
            fit(model, data(), validation=share, epochs=1, lr=0.1)


def test_without_validation_the_best_epoch_is_the_last():
    history = fit(model_of(3), data(), data(), epochs=2, lr=0.1)
    assert history.best is history.last
    assert history.best.validation_loss is None


def test_on_epoch_ends_the_training():
    history = fit(model_of(3), data(), epochs=9, lr=0.1, on_epoch=lambda result: result.epoch == 2)
    assert len(history.epochs) == 2
    history = fit(model_of(3), data(), epochs=3, lr=0.1, on_epoch=lambda result: "yes")
    assert len(history.epochs) == 3


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_every_class_is_held_out_alike(share):
    y = torch.arange(400) % 4
    y[:100] = 0
    kept, held = held_out(y, share, 3)
    assert sorted(torch.cat((kept, held)).tolist()) == list(range(400))
    assert len(held) == round(400 * share)
    counts, every = y[held].bincount(minlength=4), y.bincount()
    assert ((counts - every * share).abs() <= 1).all()
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())
    again = held_out(y, share, 3)[1]
    assert torch.equal(held, again)
    assert not torch.equal(held, held_out(y, share, 4)[1])


def test_values_are_held_out_by_a_permutation():
    y = torch.randn(50, 2)
    state = torch.get_rng_state()
    held = held_out(y, 0.2)[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(held) == 10
    assert held.diff().unique().numel() > 1


# Data


def test_kinds_of_data():
    x, y = data(12)
    kinds = [
        (x, y),
        [x, y],
        (x, y.to(torch.uint8)),
        (x.view(12, 2, 2), y),
        TensorDataset(x, y),
        Table(x, y, "a", "b", "c", ("0", "1", "2")),
    ]
    losses = {evaluate(model_of(3), kind) for kind in kinds}
    assert len(losses) == 1
    pixels = torch.randint(0, 256, (12, 4), dtype=torch.uint8)
    images = ImageDataset(pixels, y, "a", "b", "c", ("0", "1", "2"))
    assert evaluate(model_of(3), images) == evaluate(model_of(3), (pixels, y))
    for kind in kinds:
        assert fit(model_of(3), kind, kind, validation=kind, epochs=1, lr=0.1).best.epoch == 1


X, Y = torch.randn(6, 4), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("given", "loss", "error", "words"),
    [
        (X, "mse", TypeError, r"expected data as a pair of tensors \(x, y\), or as a data set .*, got Tensor"),
        ((X.numpy(), Y.numpy()), "mse", TypeError, "convert arrays with torch.as_tensor"),
        ((X[0], Y), "mse", ValueError, r"expected inputs \[N, features\] or \[N, ...\], got \[4\]"),
        ((X, Y[0]), "mse", ValueError, "as many images as labels and at least one, got 6 and a single number"),
        (
            (X, Y.float()),
            "cross_entropy",
            RuntimeError,
            r"class numbers int64 \[6\], got torch.float32 \[6\]; for values",
        ),
        ((X, Y[:, None]), "cross_entropy", RuntimeError, r"class numbers int64 \[6\], got torch.int64 \[6, 1\]$"),
        ((X, Y), "mse", RuntimeError, "expected floating-point targets for mse, got torch.int64; convert them with"),
        ((X, Y.float()), "mse", ValueError, r"expected targets \[6, 3\] for mse and a model of 3 outputs, got \[6\]"),
        ((X, 2 * torch.ones(6, 3)), "bce", ValueError, "expected targets from 0 to 1 for bce, got 2 to 2"),
        ((X, Y), "msee", ValueError, r"unknown loss 'msee'; expected one of cross_entropy, mse, .*Did you mean 'mse'"),
    ],
)
def test_wrong_data(given, loss, error, words):
    with pytest.raises(error, match=words):
        fit(model_of(3), given, loss=loss, epochs=1, lr=0.1)
    with pytest.raises(error, match=words):
        evaluate(model_of(3), given, loss=loss)


def test_nan_targets_are_refused_by_bce_and_diverge_else():
    y = torch.full((6, 3), float("nan"))
    with pytest.raises(ValueError, match="expected targets from 0 to 1"):
        fit(model_of(3), (X, y), loss="bce", epochs=1, lr=0.1)
    with pytest.raises(fastmlp.train.DivergenceError):
        fit(model_of(3), (X, y), loss="mse", epochs=1, lr=0.1)


def test_large_values_are_no_divergence():
    """The loss of a guess is measured in the units of the targets."""
    x, y = smooth(64)
    history = fit(model_of(), (x, 1e4 * y + 1e5), loss="mse", epochs=2, batch_size=16, lr=1e-3)
    assert history.last.train_loss < 1e10


def test_ignored_rows_choose_no_epoch_and_count_for_nothing():
    """In the loss and the accuracy of an evaluation, in the choice of the best epoch, and in the guess at the start."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g)
    y = (x[:, 0] > 0).long() + 1
    for ignored in (0, -100):
        y[::2] = ignored
        model = model_of(3)
        history = fit(model, (x, y), validation=0.3, lr=0.3, epochs=6, batch_size=20, ignore_index=ignored)
        assert history.best.epoch > 2
        assert history.best.validation_accuracy > 0.9
        counted = x[1::2], y[1::2]
        assert evaluate(model, (x, y), ignore_index=ignored) == pytest.approx(evaluate(model, counted), rel=1e-6)
    with pytest.raises(ValueError, match="every label is -100, which is ignored, so no row counts"):
        evaluate(model, (x[::2], y[::2]), ignore_index=-100)


@pytest.mark.parametrize("engine", ["step", "autograd"])
def test_data_on_a_tape_are_not_trained(engine):
    """Neither the data nor what computed them get a gradient, and no step walks back through their graph."""
    x, y = smooth()
    start = x.clone().requires_grad_()
    model, twin = model_of(), model_of()
    settings: dict[str, Any] = {
        "loss": "mse",
        "validation": 0.2,
        "batch_size": 8,
        "epochs": 2,
        "lr": 0.1,
        "engine": engine,
    }
    fit(model, (start * 1, y.requires_grad_()), **settings)
    fit(twin, (x, y.detach()), **settings)
    assert start.grad is None
    assert y.grad is None
    for ours, plain in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("stretch", [1, 100])
def test_a_batch_of_ignored_rows_is_no_divergence(stretch, monkeypatch):
    """Its loss is the mean of nothing, as torch's, and it changes nothing; other batches make the loss of an epoch."""
    monkeypatch.setattr("fastmlp.train.loop.CHECK_EVERY", stretch)
    x, y = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, -100, 1, 2, -100, 0, 1])
    model, twin = model_of(3), model_of(3)
    twin.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "batch_size": 1, "epochs": 1, "schedule": "constant"}
    history = fit(model, (x, y), ignore_index=-100, **settings)
    step, losses = fastmlp.TrainStep(twin, lr=0.1), []
    for row in torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist():
        if y[row] >= 0:
            losses.append(step(x[row : row + 1], y[row : row + 1]).item())
    assert history.last.train_loss == pytest.approx(sum(losses) / 5)
    for ours, alone in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, alone)
    with pytest.raises(fastmlp.train.DivergenceError, match="the loss became nan"):
        fit(model, (x.index_fill(0, torch.tensor([2]), torch.nan), y), ignore_index=-100, **settings)


def test_float64_is_evaluated_in_float64():
    model = model_of(3, torch.float64)
    with torch.no_grad():
        model.layers[-1].weight.mul_(1e40)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    assert evaluate(model, (x, y))[0] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("batch_size", [0, 2.5, "all"])
def test_batch_sizes_of_evaluations(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got"):
        evaluate(model_of(3), data(), batch_size)


def test_settings_of_other_types_and_schedules_that_go_below_0():
    fit(model_of(3), data(), lr=torch.tensor(0.1), epochs=1)
    for engine in ("step", "autograd"):
        with pytest.raises(ValueError, match="expected the schedule to return finite numbers of at least 0, got -1"):
            fit(model_of(3), data(), lr=0.1, epochs=1, schedule=lambda step, steps, warmup: -1, engine=engine)
