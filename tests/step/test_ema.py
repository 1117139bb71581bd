"""The moving average of the parameters that TrainStep keeps, against torch's and against its formula in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastmlp
from tests.support.harness import EPS32
from tests.support.steps import (
    allocations,
    assert_run_within_budget,
    batches,
    converted,
    flat,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
)

SIZES = (13, 17, 11, 5)
STEPS = 100
DECAY = 0.97
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3},
    "momentum, clipped": {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "lion, groups": {"optimizer": "lion", "lr": 0.003, "param_groups": [{"params": "*.bias", "lr": 0.01}]},
}


def averaged(step: fastmlp.TrainStep) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in step.ema_state_dict().values()])


def by_formula(runs: list[torch.Tensor], dtype: torch.dtype, warmup: bool) -> torch.Tensor:
    """The average of parameters after each step, the first of them before any."""
    average = runs[0].to(dtype)
    for t, values in enumerate(runs[1:], 1):
        decay = min(DECAY, (1 + t) / (10 + t)) if warmup else DECAY
        average = decay * average + (1 - decay) * values.to(dtype)
    return average.double()


@pytest.mark.parametrize("warmup", [False, True], ids=["", "warm-up"])
@pytest.mark.parametrize("rule", RULES)
def test_against_the_formula(rule, warmup):
    """The average of the step's own parameters; in float32 within the budget of the formula in float32."""
    data = batches(*problem(SIZES, 70), 24, STEPS)
    for dtype in (torch.float64, torch.float32):
        model = converted(network(SIZES), dtype)
        step = fastmlp.TrainStep(model, **RULES[rule], ema_decay=DECAY, ema_warmup=warmup)
        runs = [flat(model)]
        assert torch.equal(averaged(step), runs[0])
        for x, y in data:
            step(*for_step(x, y, dtype))
            runs.append(flat(model))
        expected = by_formula(runs, torch.float64, warmup)
        if dtype == torch.float64:
            assert (averaged(step) - expected).norm() <= 1e-13 * expected.norm()
        else:
            assert_run_within_budget(averaged(step), expected, by_formula(runs, dtype, warmup), STEPS, EPS32)
        assert (averaged(step) - runs[-1]).norm() > 1e-3 * runs[-1].norm(), "the average is the parameters"


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_parameters_are_what_they_were(rule):
    x, y = problem(SIZES, 24)
    plain, other = network(SIZES), network(SIZES)
    one, two = (fastmlp.TrainStep(m, **RULES[rule], **own) for m, own in ((plain, {}), (other, {"ema_decay": 0.9})))
    for _ in range(3):
        assert torch.equal(one(x, y), two(x, y))
    assert one.epoch(x, y, 1) == pytest.approx(two.epoch(x, y, 1).item(), rel=1e-6)
    torch.testing.assert_close(flat(plain), flat(other), rtol=1e-10, atol=0)


def test_against_torchs_averaged_model():
    model = network(SIZES)
    data = batches(*problem(SIZES, 70), 24, 30)
    twin = copy.deepcopy(model).to_torch()
    average = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(twin)  # torch's first update is a copy
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    step = fastmlp.TrainStep(model, lr=0.1, momentum=0.9, ema_decay=DECAY)
    for x, y in data:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        average.update_parameters(twin)
        step(x, y)
    expected = torch.cat([p.detach().flatten() for p in average.module.parameters()])
    assert (averaged(step) - expected).norm() <= 1e-10 * expected.norm()
    copied = copy.deepcopy(model)
    copied.load_state_dict(step.ema_state_dict())
    assert torch.equal(flat(copied), averaged(step))


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16], ids=str)
def test_16_bits(params):
    """The average is that of the float32 masters."""
    model = converted(network(SIZES), params)
    step = fastmlp.TrainStep(model, lr=0.1, dtype=torch.bfloat16, ema_decay=0.5)
    runs = [flat(model)]
    for x, y in batches(*problem(SIZES, 70), 24, 10):
        step(*for_step(x, y, torch.bfloat16))
        state = step.state_dict()
        masters = [state.get(f"{name}.master", p.detach()) for name, p in model.named_parameters()]
        runs.append(torch.cat([p.double().flatten() for p in masters]))
    assert {t.dtype for t in step.ema_state_dict().values()} == {torch.float32}
    average = runs[0]
    for values in runs[1:]:
        average = (average + values) / 2
    assert (averaged(step) - average).norm() <= 1e-6 * average.norm()
    model.load_state_dict(step.ema_state_dict())


def test_skipped_steps_do_not_count():
    """float16: a step that overflows leaves the average and the warm-up as they are."""
    models = [converted(network(SIZES), torch.float32) for _ in range(2)]
    steps = [fastmlp.TrainStep(m, lr=0.1, dtype=torch.float16, ema_decay=0.9, ema_warmup=True) for m in models]
    x, y = for_step(*problem(SIZES, 24), torch.float32)
    scale = steps[0]._engine.optimizer.loss_scale
    scale.scale.fill_(2.0**40)
    before = averaged(steps[0])
    steps[0](x, y)
    assert torch.equal(averaged(steps[0]), before)
    scale.set_counters({"loss_scale": 2.0**15, "loss_scale_good_steps": 0.0})
    for _ in range(2):
        steps[0](x, y)
        steps[1](x, y)
    assert torch.equal(averaged(steps[0]), averaged(steps[1]))
    assert [s.state_dict()["step"].item() for s in steps] == [2.0, 2.0]


@pytest.mark.parametrize("rule", RULES)
def test_resumes_to_the_bit(rule):
    models = [network(SIZES), network(SIZES, seed=3)]
    settings = {**RULES[rule], "ema_decay": 0.9, "ema_warmup": True}
    step, other = (fastmlp.TrainStep(m, **settings) for m in models)
    x, y = problem(SIZES, 24)
    for started in (False, True):
        models[1].load_state_dict(models[0].state_dict())
        other.load_state_dict(step.state_dict())
        twins = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
        for one in (step, other, *twins):
            one(x, y)
            one.epoch(x, y, 16)
        for one in (other, *twins):
            assert torch.equal(averaged(one), averaged(step)), started
    assert "ema" in {name.rpartition(".")[2] for name in step.state_dict()}


def test_begins_with_what_is_loaded_before_the_first_update():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.0, ema_decay=0.9)
    model.load_state_dict(network(SIZES, seed=5).state_dict())
    assert torch.equal(averaged(step), flat(model))
    step.gradients(*problem(SIZES, 8))
    step.update()
    torch.testing.assert_close(averaged(step), flat(model), rtol=1e-15, atol=0)


CHANGES = {
    "frozen layer": lambda step: step.model.layers[1].requires_grad_(False),
    "activation": lambda step: setattr(step.model.layers[0], "activation", "relu"),
    "weight decay": lambda step: step.optimizer.param_groups[0].update(weight_decay=1e-4),
    "clipping": lambda step: step.optimizer.param_groups[0].update(max_grad_norm=1.0),
    "maximize": lambda step: step.optimizer.param_groups[0].update(maximize=True),
}


@pytest.mark.parametrize("saves", [False, True], ids=["", "saved in between"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_average_survives_a_change_of_the_step(change, saves):
    """Every change for which a step builds its engine anew."""
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1, ema_decay=0.9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(4):
        if i == 2:
            CHANGES[change](step)
            if saves:
                step.state_dict()
        step(*problem(SIZES, 24, seed=i))
        for name, p in model.named_parameters():
            if p.requires_grad:
                expected[name].lerp_(p.detach(), 0.1)
    for name, average in step.ema_state_dict().items():
        torch.testing.assert_close(average, expected[name], rtol=1e-12, atol=1e-14)


def test_a_parameter_that_was_never_trained_is_its_average():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1, ema_decay=0.9)
    model.layers[0].requires_grad_(False)
    step(*problem(SIZES, 24))
    assert torch.equal(step.ema_state_dict()["layers.0.weight"], model.layers[0].weight)
    model.layers[0].requires_grad_(True)
    before = model.layers[0].weight.detach().clone()
    step(*problem(SIZES, 24))
    expected = before.lerp(model.layers[0].weight.detach(), 0.1)
    torch.testing.assert_close(step.ema_state_dict()["layers.0.weight"], expected, rtol=1e-12, atol=1e-14)


def test_a_call_that_raises_does_not_begin_the_average():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1, ema_decay=0.9)
    x, y = problem(SIZES, 24)
    for call in (lambda: step(x, y + SIZES[-1]), lambda: step.epoch(x, y, 8, torch.tensor([24]))):
        with pytest.raises(IndexError):
            call()
    model.load_state_dict(network(SIZES, seed=5).state_dict())
    before = flat(model)
    step(x, y)
    torch.testing.assert_close(averaged(step), before.lerp(flat(model), 0.1), rtol=1e-12, atol=1e-14)


def test_frozen_parameters_and_changed_settings():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1, ema_decay=0.5)
    x, y = problem(SIZES, 24)
    step(x, y)
    kept = step.ema_state_dict()["layers.1.weight"]
    model.layers[1].requires_grad_(False)
    step(x, y)
    assert torch.equal(step.ema_state_dict()["layers.1.weight"], kept)
    model.layers[1].requires_grad_(True)
    step.optimizer.param_groups[0]["ema_decay"] = 1.0
    before = averaged(step)
    step(x, y)
    assert torch.equal(averaged(step), before)
    step.optimizer.param_groups[0]["ema_decay"] = 0.0
    step(x, y)
    assert torch.equal(averaged(step), flat(model))
    step.optimizer.param_groups[0]["ema_decay"] = None
    step(x, y)
    with pytest.raises(RuntimeError, match="keeps no average of the parameters; make it with ema_decay"):
        step.ema_state_dict()


def test_nothing_is_allocated():
    x, y = for_step(*problem(SIZES, 24), torch.float32)
    step = fastmlp.TrainStep(converted(network(SIZES), torch.float32), lr=0.1, ema_decay=0.9, ema_warmup=True)
    assert allocations(lambda: step(x, y)) == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ema_decay": 1.5}, ValueError, r"ema_decay in \[0, 1\] or None, got 1.5"),
        ({"ema_decay": "a"}, TypeError, "ema_decay to be a number, got 'a'"),
        ({"ema_warmup": True}, ValueError, "ema_warmup=True needs an ema_decay"),
        ({"ema_warmup": 0.5, "ema_decay": 0.9}, TypeError, "ema_warmup to be a bool"),
    ],
    ids=str,
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        fastmlp.TrainStep(network(SIZES), **settings)


def test_the_average_of_an_ensemble_may_begin_later():
    ensemble = fastmlp.MLPEnsemble.stack([network(SIZES)] * 2)
    step = fastmlp.TrainStep(ensemble, lr=0.1)
    step(*problem(SIZES, 8))
    before = ensemble.layers[0].weight.detach().clone()
    step.optimizer.param_groups[0]["ema_decay"] = 0.75
    step(*problem(SIZES, 8))
    expected = torch.lerp(before, ensemble.layers[0].weight.detach(), 0.25)
    torch.testing.assert_close(step.ema_state_dict()["layers.0.weight"], expected)
