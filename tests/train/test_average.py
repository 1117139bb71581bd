"""The moving average of the parameters in `fit` and `evaluate`."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmlp
from fastmlp.train import evaluate, fit
from fastmlp.train.engines import StepEngine
from tests.train.test_loop import blobs, small_model

USUAL = {"lr": 0.1, "momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fit_judges_and_keeps_the_average(dtype, validation):
    """As a model that has the average's values is judged by `evaluate`."""
    train, held = blobs(), blobs(seed=1)
    train, held = ((x.to(dtype), y) for x, y in (train, held))
    judged_by = {"validation": held} if validation else {"test": held}
    model, twin = small_model(dtype=dtype), small_model(dtype=dtype)
    engine = StepEngine(twin, **USUAL, ema_decay=0.8)
    averages = []

    def on_epoch(result):
        average = copy.deepcopy(twin)
        average.load_state_dict(engine.step.ema_state_dict())
        averages.append(average)

    rest = {"epochs": 4, "batch_size": 32, "lr": 0.1, "schedule": "constant", **judged_by}
    history = fit(model, train, **rest, ema_decay=0.8)
    fit(twin, train, **rest, engine=engine, on_epoch=on_epoch)
    split = next(iter(judged_by))
    losses = [vars(result)[f"{split}_loss"] for result in history.epochs]
    assert losses == [evaluate(average, held)[0] for average in averages]
    kept = averages[history.best.epoch - 1].state_dict()
    for of_run in (model, twin):
        assert all(torch.equal(value, kept[name]) for name, value in of_run.state_dict().items())


def test_evaluate_with_other_parameters():
    """The model keeps its own, and tensors of another precision are taken in the model's."""
    model, other, data = small_model(), small_model(seed=1), blobs()
    before, expected = evaluate(model, data), evaluate(other, data)
    parameters = {name: value.double() for name, value in other.state_dict().items()}
    assert evaluate(model, data, parameters=parameters) == expected != before
    assert evaluate(model, data) == before
    first = "layers.0.weight"
    rest = {name: value for name, value in other.state_dict().items() if name != first}
    half = copy.deepcopy(other)
    half.load_state_dict({first: model.state_dict()[first]}, strict=False)
    assert evaluate(model, data, parameters=rest) == evaluate(half, data)
    with pytest.raises(RuntimeError, match=r"'layers.0.weight' \[3\] does not fit the model; expected \["):
        evaluate(model, data, parameters={first: torch.zeros(3)})
    for parameters in ([*other.state_dict()], {first: other.state_dict()[first].numpy()}):
        with pytest.raises(TypeError, match=r"expected .*parameter"):
            evaluate(model, data, parameters=parameters)
    with pytest.raises(RuntimeError, match=r"'weight' .* does not fit the model; expected one of layers.0.weight"):
        evaluate(model, data, parameters={"weight": torch.zeros(3)})


def test_an_average_needs_the_step():
    with pytest.raises(ValueError, match="has no ema_decay, so it needs engine 'step'"):
        fit(small_model(), blobs(), lr=0.1, engine="autograd", ema_decay=0.9)


@pytest.mark.parametrize("call", [evaluate, lambda model, data: fit(model, data, lr=0.1)])
def test_an_ensemble_is_refused(call):
    ensemble = fastmlp.MLPEnsemble((12, 8, 3), 4)
    with pytest.raises(
        TypeError, match=r"expected one model, got an MLPEnsemble of 4; look at each of ensemble.unstack"
    ):
        call(ensemble, blobs())
