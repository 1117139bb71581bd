"""TrainStep's param groups against torch.optim's, and the schedulers that drive them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fastmlp
from tests.support.harness import EPS32
from tests.support.steps import (
    assert_run_within_budget,
    batches,
    converted,
    flat,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import TORCH_OPTIMIZERS

SIZES = (13, 17, 11, 5)
STEPS = 100
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3},
    "momentum": {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.01, "amsgrad": True},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.003, "momentum": 0.5},
    "lion": {"optimizer": "lion", "lr": 0.003, "weight_decay": 0.1},
}
#: By name, patterns of names with settings; the parameters that are left over come first.
GROUPS: dict[str, list[dict[str, Any]]] = {
    "no decay on biases": [{"params": "*.bias", "weight_decay": 0.0}],
    "own rates": [{"params": ["layers.0.*", "layers.2.bias"], "lr": 0.002}, {"params": "layers.1.weight", "lr": 0.02}],
    "own everything": [{"params": "*.weight", "weight_decay": 0.2}, {"params": "*.bias", "lr": 0.05}],
}
#: The same as parameters of an MLP of three layers, in torch's order.
MEMBERS = {
    "no decay on biases": [[0, 2, 4], [1, 3, 5]],
    "own rates": [[3, 4], [0, 1, 5], [2]],
    "own everything": [[0, 2, 4], [1, 3, 5]],
}


def of_torch(params: list[torch.Tensor], settings: dict[str, Any], groups: str) -> torch.optim.Optimizer:
    own = [{k: v for k, v in group.items() if k != "params"} for group in GROUPS[groups]]
    own = [{}] * (len(MEMBERS[groups]) - len(own)) + own
    every = [{"params": [params[i] for i in at], **o} for at, o in zip(MEMBERS[groups], own, strict=True)]
    known = {k: v for k, v in settings.items() if k not in ("optimizer", "max_grad_norm")}
    return TORCH_OPTIMIZERS[settings.get("optimizer", "sgd")](every, **{"weight_decay": 0.0, **known})


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of its own for every group."""
    factors = [lambda t, i=i: 1 / (1 + 0.02 * (i + 1) * t) for i in range(len(optimizer.param_groups))]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def by_torch(model: fastmlp.MLP, data, settings: dict[str, Any], groups: str) -> torch.Tensor:
    twin = copy.deepcopy(model).to_torch()
    optimizer = of_torch(list(twin.parameters()), settings, groups)
    scheduler = scheduler_of(optimizer)
    dtype = model.layers[0].weight.dtype
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(twin(x.to(dtype)), y).backward()
        if "max_grad_norm" in settings:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), settings["max_grad_norm"])
        optimizer.step()
        scheduler.step()
    return torch.cat([p.detach().double().flatten() for p in twin.parameters()])


def by_step(model: fastmlp.MLP, data, settings: dict[str, Any], groups: str) -> torch.Tensor:
    step = fastmlp.TrainStep(model, **settings, param_groups=GROUPS[groups])
    scheduler = scheduler_of(step.optimizer)
    for x, y in data:
        step(*for_step(x, y, model.layers[0].weight.dtype))
        scheduler.step()
    return flat(model)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("rule", RULES)
def test_against_torch(rule, groups):
    model, data, settings = network(SIZES), batches(*problem(SIZES, 70), 24, STEPS), RULES[rule]
    narrow = converted(model, torch.float32)
    expected, own = by_torch(model, data, settings, groups), by_torch(narrow, data, settings, groups)
    actual = by_step(narrow, data, settings, groups)
    assert_run_within_budget(actual, expected, own, STEPS, EPS32)
    assert (by_step(model, data, settings, groups) - expected).norm() <= 1e-10 * expected.norm()


def step_of(model: fastmlp.MLP, **settings: Any) -> fastmlp.TrainStep:
    return fastmlp.TrainStep(model, **{"lr": 0.1, **settings})


def test_one_group_is_what_no_group_is():
    data = batches(*problem(SIZES, 70), 24, 5)
    for settings in RULES.values():
        one, two = network(SIZES), network(SIZES)
        first, second = step_of(one, **settings), step_of(two, **settings, param_groups=[{"params": "*"}])
        assert len(second.optimizer.param_groups) == 1
        for x, y in data:
            assert torch.equal(first(x, y), second(x, y))
        assert torch.equal(flat(one), flat(two))


def test_groups_by_tensor_or_name_and_the_rest_first():
    model = network(SIZES)
    step = step_of(model, param_groups=[{"params": [model.layers[1].weight, "layers.?.bias"], "lr": 0.5}])
    rest, own = step.optimizer.param_groups
    assert [p is q for p, q in zip(rest["params"], (model.layers[0].weight, model.layers[2].weight), strict=True)]
    assert (rest["lr"], own["lr"], len(own["params"])) == (0.1, 0.5, 4)
    assert step.lr == [0.1, 0.5]
    step.lr = 0.25
    assert step.lr == rest["lr"] == own["lr"] == 0.25


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw"])
def test_an_epoch_multiplies_every_groups_rate(rule):
    x, y = problem(SIZES, 48)
    models = [network(SIZES) for _ in range(2)]
    one, two = (step_of(m, **RULES[rule], param_groups=GROUPS["own rates"]) for m in models)
    factors = [1.0, 0.5, 2.0]
    one.epoch(x, y, 16, lr_factors=factors)
    rates = one.lr
    for i, factor in enumerate(factors):
        for group, rate in zip(two.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        two(x[16 * i : 16 * i + 16], y[16 * i : 16 * i + 16])
    assert one.lr == rates
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-12, atol=0)


def test_plain_sgd_stays_a_product_with_its_update():
    step = step_of(network(SIZES), param_groups=GROUPS["own rates"])
    assert step._engine.network.plain
    assert not step_of(network(SIZES), param_groups=GROUPS["own everything"])._engine.network.plain
    step.optimizer.param_groups[1]["weight_decay"] = 0.1
    step(*problem(SIZES, 8))
    assert not step._engine.network.plain


@pytest.mark.parametrize("how", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["copy", "pickle"])
def test_copies(how):
    model = network(SIZES)
    step = step_of(model, **RULES["momentum"], param_groups=GROUPS["own everything"])
    scheduler = scheduler_of(step.optimizer)
    step(*problem(SIZES, 8))
    scheduler.step()
    twin = how(step)
    assert repr(twin) == repr(step)
    assert "param_groups=[(lr=0.0" in repr(step)
    assert [g.get("initial_lr") for g in twin.optimizer.param_groups] == [0.1, 0.05]
    for _ in range(2):
        assert torch.equal(step(*problem(SIZES, 8)), twin(*problem(SIZES, 8)))
    assert torch.equal(flat(model), flat(twin.model))


def test_frozen_and_thawed():
    """The groups of what is trained stay what they are."""
    model = network(SIZES)
    step = step_of(model, momentum=0.5, param_groups=[{"params": "*.bias", "lr": 0.0}])
    model.layers[0].weight.requires_grad_(False)
    start = copy.deepcopy(model)
    step(*problem(SIZES, 8))
    model.layers[0].weight.requires_grad_(True)
    first = model.layers[0].weight.detach().clone()
    step(*problem(SIZES, 8))
    for layer, before in zip(model.layers, start.layers, strict=True):
        assert torch.equal(layer.bias, before.bias)
        assert not torch.equal(layer.weight, before.weight)
    assert torch.equal(first, start.layers[0].weight)


def test_state_resumes():
    models = [network(SIZES), network(SIZES)]
    step, other = (step_of(m, **RULES["adamw"], param_groups=GROUPS["own rates"]) for m in models)
    step(*problem(SIZES, 8))
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(step.state_dict())
    for _ in range(2):
        assert torch.equal(step(*problem(SIZES, 8)), other(*problem(SIZES, 8)))
    assert torch.equal(flat(models[0]), flat(models[1]))


WRONG = [
    (
        [{"params": "*.bias", "momentum": 0.5}],
        ValueError,
        r"got 'params', 'momentum'; every other setting is the same.* with autograd",
    ),
    ([{"lr": 0.5}], ValueError, "to have 'params'"),
    ([{"params": "bias"}], ValueError, r"no parameter of the model is named 'bias'; the names are layers\.0\.weight"),
    ([{"params": [torch.zeros(3)]}], ValueError, r"tensor \[3\] that is no parameter"),
    ([{"params": "*.bias"}, {"params": "layers.0.*"}], ValueError, r"layers\.0\.bias is in param groups 0 and 1"),
    ([{"params": []}], ValueError, "to have parameters, got none"),
    ([{"params": 3}], TypeError, "parameters or their names, got 3"),
    (["*.bias"], TypeError, "list of dicts, got '\\*.bias'"),
    ([{"params": "*.bias", "lr": -1.0}], ValueError, "learning rate of at least 0"),
]


@pytest.mark.parametrize(
    ("groups", "error", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_wrong_groups(groups, error, message):
    with pytest.raises(error, match=message):
        step_of(network(SIZES), param_groups=groups)


def test_other_settings_stay_alike():
    model = network(SIZES)
    step = step_of(model, momentum=0.5, param_groups=GROUPS["own rates"])
    before = flat(model)
    step.optimizer.param_groups[1]["momentum"] = 0.9
    with pytest.raises(
        ValueError, match=r"param groups 0 and 1 have momentum=0\.5 and 0\.9; groups .* differ in lr and"
    ):
        step(*problem(SIZES, 8))
    assert torch.equal(flat(model), before)
    for group in step.optimizer.param_groups:
        group["momentum"] = 0.9
    step(*problem(SIZES, 8))
    torch.optim.lr_scheduler.OneCycleLR(step.optimizer, [0.3, 0.2, 0.1], total_steps=8)
    step(*problem(SIZES, 8))
