"""``TrainStep.optimizer``: schedulers and settings act at the next step as they act on torch.optim."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

import fastmlp
from fastmlp.step.optimizers import OPTIMIZERS
from tests.support.steps import one_thread  # noqa: F401
from tests.support.torchs import TORCH_OPTIMIZERS

MOMENTUM = {"momentum": 0.9, "nesterov": True}
#: How each scheduler of torch is made, and the settings of the optimizer for it.
SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], 0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2, 1.0, 3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=8),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.02, anneal_epochs=3),
}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def pair(**settings: object) -> tuple[fastmlp.MLP, fastmlp.TrainStep, nn.Module, torch.optim.Optimizer]:
    """A step, and the same model with torch.optim."""
    torch.manual_seed(0)
    model = fastmlp.MLP([4, 8, 3], "tanh")
    twin = copy.deepcopy(model).to_torch()
    rule = TORCH_OPTIMIZERS[str(settings.get("optimizer", "sgd"))]
    of_torch = {k: v for k, v in settings.items() if k not in ("optimizer", "max_grad_norm")}
    if rule is torch.optim.AdamW:
        of_torch.setdefault("weight_decay", 0.0)
    return model, fastmlp.TrainStep(model, lr=0.1, **settings), twin, rule(twin.parameters(), lr=0.1, **of_torch)


def train(twin: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> float:
    x, y = data()
    optimizer.zero_grad()
    loss = F.cross_entropy(twin(x), y)
    loss.backward()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
    optimizer.step()
    return loss.item()


def agree(model: nn.Module, twin: nn.Module) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_every_scheduler_is_tested():
    known = {
        name
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("settings", [MOMENTUM, {"optimizer": "adamw"}], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, settings):
    model, step, twin, optimizer = pair(**settings)
    with warnings.catch_warnings():
        # SequentialLR itself calls its schedulers in a way that torch deprecates.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*epoch parameter.*")
        ours, theirs = SCHEDULERS[name](step.optimizer), SCHEDULERS[name](optimizer)
        for _ in range(6):
            loss, expected = step(*data()).item(), train(twin, optimizer)
            assert loss == pytest.approx(expected, rel=1e-5)
            if name == "ReduceLROnPlateau":
                ours.step(1.0)
                theirs.step(1.0)
            else:
                ours.step()
                theirs.step()
            group, other = step.optimizer.param_groups[0], optimizer.param_groups[0]
            assert step.lr == group["lr"] == other["lr"]
            assert all(group[key] == other[key] for key in ("momentum", "betas") if key in group)
    agree(model, twin)


CHANGES = [
    ({}, {"weight_decay": 0.5}),
    ({}, {"momentum": 0.9}),
    (MOMENTUM, {"momentum": 0.5}),
    (MOMENTUM, {"nesterov": False}),
    ({"momentum": 0.9}, {"momentum": 0.0}),
    ({"max_grad_norm": 1.0}, {"max_grad_norm": 0.01}),
    ({"max_grad_norm": 0.01}, {"max_grad_norm": None}),
    ({}, {"max_grad_norm": 0.01}),
    ({"optimizer": "adamw"}, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2}),
    ({"optimizer": "adam", "amsgrad": True}, {"betas": (0.5, 0.7), "weight_decay": 0.2}),
    # With a tiny eps a gradient near 0 moves its parameter as far as any other, and so do its rounding errors.
    (
        {"optimizer": "rmsprop", "momentum": 0.9, "centered": True, "eps": 0.01},
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5},
    ),
    ({"optimizer": "lion"}, {"betas": (0.5, 0.8), "maximize": True}),
    ({}, {"maximize": True}),
]


@pytest.mark.parametrize(("settings", "change"), CHANGES, ids=str)
def test_settings_changed_between_steps(settings, change):
    """In the third phase they are what they were in the first."""
    model, step, twin, optimizer = pair(**settings)
    start = {key: step.optimizer.param_groups[0][key] for key in change}
    for values in ({}, change, start):
        step.optimizer.param_groups[0].update(values)
        optimizer.param_groups[0].update({k: v for k, v in values.items() if k != "max_grad_norm"})
        for _ in range(2):
            clip = step.optimizer.param_groups[0]["max_grad_norm"]
            step(*data())
            train(twin, optimizer, clip)
    agree(model, twin)
    x, y = data()
    step.optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.01
    step.epoch(x, y, 16)
    train(twin, optimizer, step.optimizer.param_groups[0]["max_grad_norm"])
    agree(model, twin)


NONSENSE = [
    ("lr", "a", TypeError),
    ("lr", None, TypeError),
    ("lr", True, TypeError),
    ("lr", math.inf, ValueError),
    ("lr", math.nan, ValueError),
    ("lr", -1.0, ValueError),
    ("lr", torch.tensor([0.1, 0.2]), ValueError),
    ("lr", torch.tensor(1j), ValueError),
    ("momentum", 1.0, ValueError),
    ("momentum", "0.9", TypeError),
    ("weight_decay", math.inf, ValueError),
    ("max_grad_norm", 0, ValueError),
    ("nesterov", "yes", TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), NONSENSE, ids=str)
def test_nonsense_is_refused_by_name(name, value, error):
    model, step, *_ = pair(momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    called = "learning rate|lr" if name == "lr" else name
    with pytest.raises(error, match=called):
        fastmlp.TrainStep(model, **{name: value})
    if name == "lr":
        with pytest.raises(error, match=called):
            step.lr = value
        assert step.lr == 0.1
    step.optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(error, match=called):
            step(*data())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_setting_waits_for_a_call_that_is_not_refused():
    model, step, twin, optimizer = pair(momentum=0.9)
    handle = model.register_forward_hook(lambda *a: None)
    step.optimizer.param_groups[0].update(lr=0.01, momentum=0.5)
    optimizer.param_groups[0].update(lr=0.01, momentum=0.5)
    with pytest.raises(ValueError, match="hook"):
        step(*data())
    handle.remove()
    for _ in range(2):
        step(*data())
        train(twin, optimizer)
    agree(model, twin)


def test_a_tensor_as_the_learning_rate_is_read_at_every_step():
    model, step, twin, optimizer = pair()
    rate = torch.tensor(0.1)
    step.optimizer.param_groups[0]["lr"] = rate
    for value in (0.1, 0.05, 0.01):
        rate.fill_(value)
        optimizer.param_groups[0]["lr"] = value
        step(*data())
        train(twin, optimizer)
    agree(model, twin)
    assert step.lr == pytest.approx(0.01)
    step.lr = torch.tensor(0.5)
    assert step.lr == 0.5
    assert fastmlp.TrainStep(model, lr=torch.tensor(0.25)).lr == 0.25


def test_the_optimizer_updates_from_gradients():
    model, step, twin, optimizer = pair(momentum=0.9)
    for _ in range(2):
        step.gradients(*data())
        step.optimizer.step()
        train(twin, optimizer)
    agree(model, twin)
    with pytest.raises(RuntimeError, match="no gradients to apply"):
        step.optimizer.step()
    with pytest.raises(TypeError, match="closure"):
        step.optimizer.step(lambda: None)


def test_what_the_optimizer_does_not_do():
    _, step, *_ = pair()
    for call in (step.optimizer.state_dict, lambda: step.optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"step\.(load_)?state_dict\("):
            call()
    with pytest.raises(NotImplementedError, match="keeps its param groups"):
        step.optimizer.add_param_group({"params": [torch.zeros(1)]})
    step.optimizer.param_groups.append(step.optimizer.param_groups[0])
    with pytest.raises(RuntimeError, match="another param group"):
        step(*data())


def test_what_a_step_would_not_follow_cannot_be_set():
    model, step, *_ = pair()
    for name in ("momentum", "weight_decay", "max_grad_norm"):
        with pytest.raises(AttributeError, match=rf"set {name} in step\.optimizer\.param_groups"):
            setattr(step, name, 0.5)
    for name, value in (("model", model), ("loss", "mse"), ("dtype", torch.float16)):
        with pytest.raises(AttributeError, match=f"keeps its {name}"):
            setattr(step, name, value)
    every = {name for kind in TORCH_OPTIMIZERS.values() for name in list(inspect.signature(kind).parameters)[1:]}
    assert "decoupled_weight_decay" in every
    for name in every - {field.name for rule in OPTIMIZERS.values() for field in dataclasses.fields(rule)}:
        step.optimizer.param_groups[0][name] = 0.5
        with pytest.raises(RuntimeError, match="a setting that a TrainStep does not have"):
            step(*data())
        del step.optimizer.param_groups[0][name]
    del step.optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="other parameters than the model"):
        step(*data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.SGD}, "got SGD; pass optimizer='sgd'"),
        ({"optimizer": torch.optim.AdamW([torch.zeros(1)])}, "got AdamW; pass optimizer='adamw'"),
        ({"optimizer": torch.optim.RMSprop}, "got RMSprop; pass optimizer='rmsprop' with its settings"),
        (
            {"optimizer": torch.optim.Adagrad},
            "one of sgd, adam, adamw, rmsprop, lion, got Adagrad; train with autograd",
        ),
        ({"loss": nn.CrossEntropyLoss()}, "got CrossEntropyLoss; pass loss='cross_entropy'"),
        ({"loss": fastmlp.CrossEntropyLoss()}, "got CrossEntropyLoss; pass loss='cross_entropy'"),
        ({"loss": nn.MSELoss()}, "got MSELoss; pass loss='mse'"),
        ({"loss": nn.BCEWithLogitsLoss()}, "got BCEWithLogitsLoss; pass loss='bce'"),
        ({"loss": F.l1_loss}, "got l1_loss; pass loss='l1'"),
        ({"loss": nn.KLDivLoss()}, "got KLDivLoss; train with autograd"),
        ({"loss": lambda a, y: a}, "train with autograd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchs_objects_in_place_of_names(settings, message):
    with pytest.raises(TypeError, match=message):
        fastmlp.TrainStep(fastmlp.MLP([4, 3]), **settings)


@pytest.mark.parametrize("factors", [[-1.0] * 4, [math.nan] * 4, [math.inf] * 4, "1111", [[1.0] * 4], ["a"] * 4, 1.0])
def test_factors(factors):
    _, step, *_ = pair()
    with pytest.raises((ValueError, TypeError), match="lr_factors"):
        step.epoch(*data(), 4, lr_factors=factors)


def test_labels_and_batch_sizes_as_elsewhere():
    numpy = pytest.importorskip("numpy")
    x, y = data()
    (a, first, *_), (b, second, *_) = pair(), pair()
    first(x, y)
    first.epoch(x, y, 4)
    second(x, y.to(torch.uint8))
    second.epoch(x, y.to(torch.uint8), numpy.int64(4))
    agree(a, b)
    for size in (0, -1, 2.0, True, None, "4"):
        with pytest.raises(ValueError, match="batch_size of at least 1"):
            first.epoch(x, y, size)
