"""TrainStep on GPUs: all tensors are on the model's device, the host never waits, and the current device is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastmlp
from fastmlp import TrainStep, use_backend
from fastmlp.base.losses import STEP_LOSSES, takes_classes
from tests.support.covering import in_turns

pytestmark = pytest.mark.placement

SIZES, ROWS = (20, 18, 17, 5), 12
#: The second GPU while the first is current, and the usual case.
DEVICES = ["cuda:1", "cuda:0"]
OPTIMIZERS = {
    "sgd": {"lr": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "clipped": {"lr": 0.1, "max_grad_norm": 0.05},
}
#: Rules and options that share what they do on a device with those above.
OTHERS = {
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.01, "momentum": 0.5, "maximize": True},
    "adam, groups": {"optimizer": "adam", "lr": 0.01, "param_groups": [{"params": "*.bias", "weight_decay": 0.1}]},
    "average": {"lr": 0.1, "ema_decay": 0.9, "ema_warmup": True},
}
#: dtypes of parameters and products.
PRECISIONS = {
    "float32": (torch.float32, None),
    "mixed float16": (torch.float32, torch.float16),
    "float16": (torch.float16, None),
    "mixed bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}


def batch(device, dtype, rows=ROWS, loss="cross_entropy"):
    """Images and targets on the device."""
    if dtype == torch.uint8:
        x = torch.randint(0, 256, (rows, SIZES[0]), dtype=torch.uint8, device=device)
    else:
        x = torch.randn(rows, SIZES[0], device=device, dtype=dtype)
    if takes_classes(STEP_LOSSES[loss]):
        return x, torch.randint(0, SIZES[-1], (rows,), device=device)
    return x, torch.rand(rows, SIZES[-1], device=device)


def every_call(machine, step, device, dtype, loss="cross_entropy"):
    """Call each method of a step, often enough for launches, capture and replay; calls that must not wait do not."""
    x, y = batch(device, dtype, loss=loss)
    images, labels = batch(device, dtype, 2 * ROWS + 5, loss)
    order = torch.randperm(len(images), device=device)
    for i in range(3 if step.backend == "triton" else 2):
        with machine.hot(device, host=True):  # rates come from the host where they change
            step.lr = 0.1 / (i + 1)
            losses = [step(x, y), step.epoch(images, labels, ROWS)]
            losses.append(step.epoch(images, labels, ROWS, order, [1.0, 0.5, 0.25]))
            step.gradients(x, y)
            grads = step.gradients(x, y, accumulate=True)
            step.update()
        assert {t.device for t in (*losses, *grads.values(), step.losses)} == {torch.device(device)}
        state = step.state_dict()
        step.load_state_dict(state)
    assert machine.current == 0


def check_launches(machine, device):
    assert machine.launches, "no kernel was launched"
    assert {launch.device for launch in machine.launches} == {torch.device(device).index}
    assert any(launch.captured for launch in machine.launches), "no graph was replayed"
    assert machine.replays


#: Every optimizer in every precision; inputs and devices take turns.
STEPS = [
    pytest.param(optimizer, precision, pixels, device, id=f"{optimizer}-{precision}-{pixels}-{device}")
    for optimizer, precision, (pixels, device) in in_turns(
        itertools.product(OPTIMIZERS, PRECISIONS), itertools.product(["pixels", "float"], DEVICES)
    )
]


@pytest.mark.parametrize(("optimizer", "precision", "pixels", "device"), STEPS)
def test_step(machine, optimizer, precision, pixels, device):
    parameters, products = PRECISIONS[precision]
    model = fastmlp.MLP(SIZES, device=device, dtype=parameters)
    step = TrainStep(model, dtype=products, **OPTIMIZERS[optimizer])
    assert step.backend == "triton"
    every_call(machine, step, device, torch.uint8 if pixels == "pixels" else torch.float32)
    check_launches(machine, device)


@pytest.mark.parametrize("precision", ["float32", "mixed float16"])
@pytest.mark.parametrize("optimizer", OTHERS)
def test_other_rules(machine, optimizer, precision):
    parameters, products = PRECISIONS[precision]
    step = TrainStep(fastmlp.MLP(SIZES, device="cuda:1", dtype=parameters), dtype=products, **OTHERS[optimizer])
    every_call(machine, step, "cuda:1", torch.uint8)
    check_launches(machine, "cuda:1")


@pytest.mark.parametrize("precision", ["float32", "mixed float16"])
@pytest.mark.parametrize("loss", list(STEP_LOSSES)[1:])
def test_losses(machine, loss, precision):
    parameters, products = PRECISIONS[precision]
    step = TrainStep(fastmlp.MLP(SIZES, device="cuda:1", dtype=parameters), lr=0.1, loss=loss, dtype=products)
    every_call(machine, step, "cuda:1", torch.float32, loss)
    check_launches(machine, "cuda:1")


@pytest.mark.parametrize(
    "variant",
    [
        lambda: fastmlp.MLP((20, 5), device="cuda:1"),
        lambda: fastmlp.MLP((20, 17, 5), ["gelu", "tanh"], device="cuda:1"),
        lambda: fastmlp.MLP((20, 17, 5), bias=False, device="cuda:1"),
        lambda: fastmlp.MLP((20, 17, 5)).to("cuda:1"),
    ],
    ids=["one layer", "activation behind the last layer", "no bias", "moved there"],
)
def test_other_networks(machine, variant):
    every_call(machine, TrainStep(variant(), lr=0.1), "cuda:1", torch.uint8)
    check_launches(machine, "cuda:1")


def test_more_classes_than_the_head_takes(machine):
    step = TrainStep(fastmlp.MLP((20, 17, 150), device="cuda:1"), lr=0.1)
    every_call(machine, step, "cuda:1", torch.uint8)
    check_launches(machine, "cuda:1")


@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_layers(machine, frozen):
    model = fastmlp.MLP(SIZES, device="cuda:1")
    model.layers[frozen].requires_grad_(False)
    every_call(machine, TrainStep(model, lr=0.1), "cuda:1", torch.uint8)
    check_launches(machine, "cuda:1")


def test_without_graphs(machine):
    step = TrainStep(fastmlp.MLP(SIZES, device="cuda:1"), lr=0.1, cuda_graph=False)
    every_call(machine, step, "cuda:1", torch.uint8)
    assert {launch.device for launch in machine.launches} == {1}
    assert machine.replays == 0


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "clipped"])
def test_a_step_at_an_unchanged_rate_makes_no_tensor_on_the_host(machine, optimizer, precision):
    model = fastmlp.MLP(SIZES, device="cuda:1", dtype=precision[0])
    step = TrainStep(model, dtype=precision[1], **OPTIMIZERS[optimizer])
    x, y = batch("cuda:1", torch.uint8)
    step(x, y)
    for _ in range(3):
        with machine.hot("cuda:1"):
            step(x, y)
            step.gradients(x, y)
            step.update()


@pytest.mark.covering
@pytest.mark.parametrize("precision", [(torch.float64, None), (torch.float32, torch.float64)], ids=["float64", "mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device", DEVICES)
def test_float64_runs_on_torch(machine, device, optimizer, precision):
    step = TrainStep(fastmlp.MLP(SIZES, device=device, dtype=precision[0]), dtype=precision[1], **OPTIMIZERS[optimizer])
    assert step.backend == "torch"
    every_call(machine, step, device, torch.uint8)
    assert machine.launches == []


@pytest.mark.covering
@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_backend_torch(machine, precision, loss):
    with use_backend("torch"):
        model = fastmlp.MLP(SIZES, device="cuda:1", dtype=precision[0])
        step = TrainStep(model, lr=0.1, loss=loss, dtype=precision[1])
        every_call(machine, step, "cuda:1", torch.float32, loss)
    assert machine.launches == []


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_data_on_another_device_is_an_error(machine, backend):
    with use_backend(backend):
        step = TrainStep(fastmlp.MLP(SIZES, device="cuda:1"), lr=0.1)
        for x_device, y_device in (("cuda:0", "cuda:0"), ("cuda:1", "cuda:0"), ("cpu", "cuda:1"), ("cpu", "cpu")):
            x, y = batch(x_device, torch.uint8)[0], batch(y_device, torch.uint8)[1]
            for call in (step, step.gradients, lambda x, y: step.epoch(x, y, ROWS)):
                with pytest.raises(RuntimeError, match="same device"):
                    call(x, y)
        images, labels = batch("cuda:1", torch.uint8)
        with pytest.raises(RuntimeError, match="same device"):
            step.epoch(images, labels, ROWS, torch.arange(ROWS))
    assert machine.launches == []


def test_parameters_that_change_are_followed(machine):
    """16-bit copies of parameters that other code wrote to are made anew on their device, without a wait."""
    model = fastmlp.MLP(SIZES, device="cuda:1")
    step = TrainStep(model, dtype=torch.bfloat16, lr=0.1)
    x, y = batch("cuda:1", torch.uint8)
    for _ in range(4):
        with machine.hot("cuda:1", host=True), torch.no_grad():
            step(x, y)
            model.layers[1].weight.mul_(0.5)
    model.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    with machine.hot("cuda:1"):
        step(x, y)


def test_two_models_on_two_devices(machine):
    """Graphs, streams and memory pools of one device never meet the other."""
    steps = {device: TrainStep(fastmlp.MLP(SIZES, device=device), lr=0.1) for device in DEVICES}
    data = {device: batch(device, torch.uint8) for device in DEVICES}
    for i in range(4):
        machine.set_device(i % 2)
        for device, step in steps.items():
            step(*data[device])
            step.epoch(*data[device], ROWS)
            assert machine.current == i % 2
    assert {launch.device for launch in machine.launches if launch.captured} == {0, 1}


def test_captures_let_other_threads_allocate(machine):
    step = TrainStep(fastmlp.MLP(SIZES, device="cuda"), lr=0.1)
    for _ in range(4):
        step(*batch("cuda", torch.uint8))
    assert set(machine.capture_modes) == {"thread_local"}


def test_labels_are_not_looked_at(machine):
    """A class number out of range makes NaN on a GPU, because a search for it would make the host wait."""
    step = TrainStep(fastmlp.MLP(SIZES, device="cuda:0"), lr=0.1)
    x, y = batch("cuda:0", torch.uint8)
    with machine.hot("cuda:0", host=True):
        step(x, y - 1)
        step(x, y + 1)
