"""Every optimizer in a TrainStep of an ensemble on plain torch: each member as the same MLP alone."""

from __future__ import annotations

import pickle

import pytest
import torch

import fastmlp
from tests.support.steps import (
    flat,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
RATES = (0.01, 0.02, 0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_are_mlps(name):
    """With rates of their own, and a member that pauses."""
    alone = [network(SIZES, seed=seed) for seed in range(3)]
    together = fastmlp.MLPEnsemble.stack(alone)
    settings = {**OPTIMIZERS[name], "lr": RATES}
    step = fastmlp.TrainStep(together, **settings)
    singles = [fastmlp.TrainStep(m, **{**settings, "lr": lr}) for m, lr in zip(alone, RATES, strict=True)]
    for i in range(3):
        x, y = problem(SIZES, 8, seed=i)
        step.active = torch.tensor([True, i != 1, True])
        losses = step(x, y)
        for e, single in enumerate(singles):
            if step.active[e]:
                torch.testing.assert_close(losses[e], single(x, y), rtol=1e-12, atol=0)
    for member, model in zip(together.unstack(), alone, strict=True):
        torch.testing.assert_close(flat(member), flat(model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("own", [True, False], ids=["own", "the same"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}], ids=["", "smoothing"])
def test_probabilities(options, own):
    """As targets of a step, of a step with sample weights and of an epoch."""
    alone = [network(SIZES, seed=seed) for seed in range(3)]
    together = fastmlp.MLPEnsemble.stack(alone)
    step = fastmlp.TrainStep(together, lr=0.1, **options)
    singles = [fastmlp.TrainStep(model, lr=0.1, **options) for model in alone]
    x = torch.stack([problem(SIZES, 8, seed=e)[0] for e in range(3)])
    y = torch.rand(3, 8, SIZES[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(2)
    y = y if own else y[0]
    of = list(y) if own else [y] * 3
    weight = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    for losses, expected in (
        (step(x, y), [single(*batch) for single, *batch in zip(singles, x, of, strict=True)]),
        (step(x, y, weight), [single(*batch, weight) for single, *batch in zip(singles, x, of, strict=True)]),
        (step.epoch(x, y, 3, order), [s.epoch(*batch, 3, order) for s, *batch in zip(singles, x, of, strict=True)]),
    ):
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)
    for member, model in zip(together.unstack(), alone, strict=True):
        torch.testing.assert_close(flat(member), flat(model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_averages_are_those_of_mlps(name, warmup):
    """Steps, an epoch, a state taken up by another step, and a member that pauses."""
    alone = [network(SIZES, seed=seed) for seed in range(3)]
    together = fastmlp.MLPEnsemble.stack(alone)
    settings = {**OPTIMIZERS[name], "ema_decay": 0.8, "ema_warmup": warmup}
    step = fastmlp.TrainStep(together, **{**settings, "lr": RATES})
    singles = [fastmlp.TrainStep(m, **{**settings, "lr": lr}) for m, lr in zip(alone, RATES, strict=True)]
    for i in range(4):
        x, y = problem(SIZES, 8, seed=i)
        step.active = torch.tensor([True, i != 1, True])
        take = [s for s, active in zip(singles, step.active, strict=True) if active]
        if i < 3:
            [of(x, y) for of in (step, *take)]
        else:
            other = fastmlp.TrainStep(together, **{**settings, "lr": RATES})
            other.load_state_dict(step.state_dict())
            step = other
            [of.epoch(x, y, 3, torch.arange(8)) for of in (step, *take)]
    average = step.ema_state_dict()
    copy = fastmlp.MLPEnsemble(SIZES, 3, dtype=average["layers.0.weight"].dtype)
    copy.load_state_dict(average)
    for member, single in zip(copy.unstack(), singles, strict=True):
        for own, expected in zip(member.state_dict().values(), single.ema_state_dict().values(), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-13)
        assert not torch.allclose(flat(member), flat(single.model), rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_members_that_stop_between_gradients_and_update(name):
    alone = [network(SIZES, seed=seed) for seed in range(3)]
    together = fastmlp.MLPEnsemble.stack(alone)
    step = fastmlp.TrainStep(together, **OPTIMIZERS[name])
    x, y = problem(SIZES, 8)
    step.gradients(x, y)
    step.active[1] = False
    step.update()
    for e, (member, model) in enumerate(zip(together.unstack(), alone, strict=True)):
        if e != 1:
            fastmlp.TrainStep(model, **OPTIMIZERS[name])(x, y)
        torch.testing.assert_close(flat(member), flat(model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("average", [False, True], ids=["", "average"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_param_groups_are_those_of_mlps(name, average):
    """Groups with rates per member, a changed rate, a scheduler, an epoch, and a member that pauses."""
    alone = [network(SIZES, seed=seed) for seed in range(3)]
    together = fastmlp.MLPEnsemble.stack(alone)
    settings = {**OPTIMIZERS[name], "lr": 0.02} | ({"ema_decay": 0.5} if average else {})
    groups = [{"params": "*.bias", "weight_decay": 0.0, "lr": RATES}, {"params": "layers.2.weight", "lr": 0.03}]
    step = fastmlp.TrainStep(together, **settings, param_groups=groups)
    each = [[{**group, "lr": lr} if group is groups[0] else group for group in groups] for lr in RATES]
    singles = [fastmlp.TrainStep(m, **settings, param_groups=own) for m, own in zip(alone, each, strict=True)]
    every = [step, *singles]
    schedulers = [torch.optim.lr_scheduler.StepLR(of.optimizer, 1, 0.5) for of in every]
    for i in range(4):
        x, y = problem(SIZES, 8, seed=i)
        step.active = torch.tensor([True, i != 1, True])
        for of in every:
            if of is step or step.active[singles.index(of)]:
                of.epoch(x, y, 3, lr_factors=[1.0, 0.5, 2.0]) if i == 3 else of(x, y)
            if i == 0:
                of.optimizer.param_groups[2]["lr"] = 0.01
        if i == 2:
            for scheduler in schedulers:
                scheduler.step()
    step = pickle.loads(pickle.dumps(step))
    x, y = problem(SIZES, 8, seed=9)
    for of in (step, *singles):
        of.gradients(x, y)
        of.update()
    for e, (member, single) in enumerate(zip(step.model.unstack(), singles, strict=True)):
        torch.testing.assert_close(flat(member), flat(single.model), rtol=1e-11, atol=1e-13)
        if average:
            for key, value in single.ema_state_dict().items():
                torch.testing.assert_close(step.ema_state_dict()[key][e], value, rtol=1e-11, atol=1e-13)
