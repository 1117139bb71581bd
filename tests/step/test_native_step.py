"""Training steps as machine code: the same results as autograd and torch.optim, and as the steps on operators."""

from __future__ import annotations

import copy
import pickle
import platform

import pytest
import torch

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.cpu.native import machine_code
from fastmlp.step.cpu_native import NativeStep
from tests.support.steps import (
    LION_IN_SMALL_STEPS,
    batches,
    check_against_torch,
    check_float64,
    converted,
    flat,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
    threads,
)
from tests.support.torchs import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("native_code")

SIZES = (13, 18, 17, 5)
STEPS = 100
DTYPES = (torch.float32, torch.float64)


def by_machine(step: fastmlp.TrainStep, rows: int) -> NativeStep:
    """The planned step of so many rows, which has called no operator."""
    planned = step._engine._planned(rows)
    assert isinstance(planned, NativeStep)
    assert planned._operators is None
    return planned


def made(sizes=SIZES, activation="tanh", dtype=torch.float32, **settings) -> fastmlp.TrainStep:
    return fastmlp.TrainStep(converted(network(sizes, activation), dtype), **{"lr": 0.1, **settings})


def data_of(rows: int, steps: int = 3, sizes=SIZES, dtype=torch.float32, **kwargs):
    return [for_step(x, y, dtype) for x, y in batches(*problem(sizes, 3 * rows + 1, **kwargs), rows, steps)]


@pytest.mark.parametrize(("number", "activation"), list(enumerate(ACTIVATIONS)))
def test_every_activation(number, activation):
    """Below the last layer, with every loss and every kind of update in turn."""
    loss = list(STEP_LOSSES)[number % len(STEP_LOSSES)]
    settings = OPTIMIZERS[["sgd", "momentum", "adamw"][number % 3]]
    check_against_torch(
        network(SIZES, activation), batches(*problem(SIZES, 70, loss=loss), 24, STEPS), settings, loss=loss
    )


@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_every_loss(loss):
    """The last layer has an activation, and M is less than a vector."""
    data = batches(*problem(SIZES, 70, loss=loss), 5, 30)
    check_against_torch(network(SIZES, ["tanh", "identity", "sigmoid"]), data, OPTIMIZERS["sgd"], loss=loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    check_against_torch(network(SIZES), batches(*problem(SIZES, 70), 16, STEPS), OPTIMIZERS[name])


def test_roundings_of_lion_do_not_add_up():
    check_against_torch(*LION_IN_SMALL_STEPS)


def test_the_machine_code_did_it():
    step = made()
    for x, y in data_of(16):
        step(x, y)
    by_machine(step, 16)


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 8, 1), (4, 64, 3), (100, 9, 35, 20)])
def test_shapes(sizes, rows):
    """Every remainder of the tiles."""
    data = batches(*problem(sizes, 2 * rows, loss="mse"), rows, 3)
    check_against_torch(network(sizes, "sigmoid"), data, {"lr": 0.5}, loss="mse")


def test_blocks_of_rows():
    """Weights of several blocks, whose parts of dX are added up."""
    sizes = (33, 90, 300, 70, 7)
    for optimizer in ("sgd", "adam"):
        check_against_torch(network(sizes, "tanh"), batches(*problem(sizes, 40), 12, 3), OPTIMIZERS[optimizer])


def test_delta_of_huber():
    data = batches(*problem(SIZES, 30, loss="huber"), 8, 10)
    check_against_torch(network(SIZES), data, {"lr": 0.3}, loss="huber", delta=0.1)


def test_param_groups():
    groups = [{"params": "*.bias", "weight_decay": 0.0, "lr": 0.02}]
    for native in (True, False):
        step = made(dtype=torch.float64, weight_decay=0.1, param_groups=groups)
        if not native:
            fastmlp.set_cpu_gemm("aten")
        for x, y in data_of(8, dtype=torch.float64):
            step(x, y)
        if native:
            by_machine(step, 8)
            first = flat(step.model)
    torch.testing.assert_close(flat(step.model), first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [{"optimizer": "sgd"}, {"optimizer": "adam", "ema_warmup": True}])
def test_average(settings):
    averages = []
    for mode in ("native", "aten"):
        fastmlp.set_cpu_gemm(mode)
        step = made(dtype=torch.float64, ema_decay=0.95, **settings)
        for x, y in data_of(8, 12, dtype=torch.float64):
            step(x, y)
        averages.append(step.ema_state_dict())
    for name, average in averages[0].items():
        torch.testing.assert_close(average, averages[1][name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("uint8", [False, True])
def test_epoch_is_a_loop_of_steps(dtype, optimizer, uint8):
    x, y = problem(SIZES, 45, uint8=uint8)
    x, y = for_step(x, y, dtype)
    order = torch.randperm(45)[:43]
    factors = [1.0, 0.5, 2.0, 0.1, 1.0]
    epoch, loop = (made(dtype=dtype, optimizer=optimizer) for _ in range(2))
    mean = epoch.epoch(x, y, 10, order=order, lr_factors=factors)
    losses = []
    for rows, factor in zip(order.split(10), factors, strict=True):
        loop.lr = 0.1 * factor
        losses.append(loop(x[rows], y[rows]))
    assert torch.equal(epoch.losses, torch.stack(losses))
    assert torch.equal(flat(epoch.model), flat(loop.model))
    assert mean.item() == pytest.approx(
        sum(a.item() * n for a, n in zip(losses, (10, 10, 10, 10, 3), strict=True)) / 43
    )
    by_machine(epoch, 10)
    assert epoch.lr == 0.1
    epoch(x, y), loop(x, y)  # the rates of the epoch are over
    loop.lr = 0.1


def test_pixels_of_a_step():
    x, y = problem(SIZES, 24, uint8=True)
    ready, pixels = made(), made()
    assert torch.equal(ready(x.float() * torch.tensor(1 / 255), y), pixels(x, y))
    assert torch.equal(flat(ready.model), flat(pixels.model))


def test_inputs_that_are_not_contiguous():
    (x, y), (values, _) = problem(SIZES, 24), problem(SIZES, 24, loss="mse")
    x, values = x.float(), torch.rand(24, 5)
    for loss, target in (("cross_entropy", y), ("mse", values)):
        a, b = made(loss=loss), made(loss=loss)
        for _ in range(2):
            strided = torch.stack((target, target), -1)[..., 0]
            expected = a(x, target)
            assert torch.equal(b(x.t().contiguous().t(), strided), expected)
            expected = a(x, target)
            assert torch.equal(b(torch.cat((x, x), 1)[:, :13], target), expected)
            assert torch.equal(b(x[:1].expand(24, -1), target), a(x[:1].repeat(24, 1), target))
        assert torch.equal(flat(a.model), flat(b.model))


@pytest.mark.parametrize("frozen", [["layers.0.weight"], ["layers.0.weight", "layers.0.bias"], ["layers.1.weight"]])
@pytest.mark.parametrize("name", ["sgd", "clipping", "adamw"])
def test_frozen_parameters(frozen, name):
    model = network(SIZES)
    for parameter in frozen:
        model.get_parameter(parameter).requires_grad_(False)
    before = {parameter: model.get_parameter(parameter).clone() for parameter in frozen}
    check_float64(model, batches(*problem(SIZES, 70), 16, 10), OPTIMIZERS[name])
    assert all(torch.equal(model.get_parameter(parameter), value) for parameter, value in before.items())


def test_settings_change_between_steps():
    data, models = data_of(8, 8, dtype=torch.float64), []
    for mode in ("native", "aten"):
        fastmlp.set_cpu_gemm(mode)
        step = made(dtype=torch.float64, momentum=0.9, max_grad_norm=1.0)
        group = step.optimizer.param_groups[0]
        for i, (x, y) in enumerate(data):
            group["lr"], group["momentum"], group["weight_decay"] = 0.1 / (1 + i), 0.5 + 0.05 * i, 0.01 * i
            group["max_grad_norm"] = 1 / (1 + i)
            step(x, y)
        models.append(flat(step.model))
    torch.testing.assert_close(*models, rtol=1e-12, atol=1e-14)


def test_values_that_are_written_to_parameters_count():
    x, y = data_of(8)[0]
    a, b = made(), made()
    a(x, y), b(x, y)
    with torch.no_grad():
        for model in (a.model, b.model):
            model.layers[1].weight.mul_(2.0)
    b = copy.deepcopy(b)
    assert torch.equal(a(x, y), b(x, y))


def test_every_update_raises_the_versions():
    step = made()
    x, y = data_of(8)[0]
    step(x, y)
    before = [p._version for p in step.model.parameters()]
    step(x, y)
    after = [p._version for p in step.model.parameters()]
    assert all(b > a for a, b in zip(before, after, strict=True))
    step.epoch(x, y, 4)
    assert all(b > a for a, b in zip(after, [p._version for p in step.model.parameters()], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_shows(value, activation):
    """Losses and parameters are NaN or infinite where those of the operators are."""
    x, y = data_of(8)[0]
    x[2, 3] = value
    found = []
    for mode in ("native", "aten"):
        fastmlp.set_cpu_gemm(mode)
        step = made(activation=activation)
        found.append((step(x, y), step(x, y), flat(step.model)))
    for native, operators in zip(*found, strict=True):
        assert torch.equal(native.isnan(), operators.isnan())
        assert torch.equal(native.isinf(), operators.isinf())


def test_a_label_out_of_range_changes_nothing():
    step = made()
    x, y = data_of(8)[0]
    step(x, y)
    before, state = flat(step.model), step.state_dict()
    for wrong in (5, -1, -7):
        with pytest.raises(IndexError):
            step(x, torch.where(torch.arange(8) == 3, wrong, y))
    assert torch.equal(flat(step.model), before)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), step.state_dict().values(), strict=True))


def test_what_the_machine_code_lacks_goes_to_the_operators():
    """Targets of another dtype, in turns with steps of the machine code."""
    x, y = data_of(8, dtype=torch.float64)[0]
    models = []
    for mode in ("native", "aten"):
        fastmlp.set_cpu_gemm(mode)
        step = made(dtype=torch.float64, optimizer="adamw", weight_decay=0.1)
        step(x, y)
        step(x, torch.nn.functional.one_hot(y, 5).float())
        step.epoch(torch.cat((x, x)), torch.nn.functional.one_hot(torch.cat((y, y)), 5).float(), 8)
        step(x, y)
        models.append(flat(step.model))
    torch.testing.assert_close(*models, rtol=1e-12, atol=1e-14)


def test_two_runs_and_any_number_of_threads_agree():
    found = []
    for count in (1, 2, 1):
        with threads(count):
            step = made(sizes=(30, 64, 7), optimizer="adamw")
            for x, y in data_of(33, sizes=(30, 64, 7)):
                step(x, y)
        by_machine(step, 33)
        found.append(flat(step.model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors keep subnormal numbers")
@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 1e-39), (torch.float64, 1e-309)])
def test_momenta_do_not_stay_subnormal(dtype, small):
    """They would slow each step down. Elsewhere in the thread subnormal numbers are numbers, before and after."""
    step = made(dtype=dtype, momentum=0.9)
    data = data_of(8, dtype=dtype)
    step(*data[0])
    state = step.state_dict()
    momenta = [value for name, value in state.items() if "momentum" in name]
    assert len(momenta) == 2 * len(SIZES) - 2
    for momentum in momenta:
        momentum.fill_(small)
        assert momentum.count_nonzero() == momentum.numel()
    step.load_state_dict(state)
    step(torch.zeros_like(data[1][0]), data[1][1])
    by_machine(step, 8)
    first = step.state_dict()[next(name for name in state if "momentum" in name)]
    assert first.count_nonzero() == 0  # the gradient of the first weight is 0
    assert torch.tensor([small], dtype=dtype).mul(0.5).count_nonzero() == 1


def test_copies_go_on():
    step = made(optimizer="adamw", max_grad_norm=1.0)
    data = data_of(8, 4)
    for x, y in data[:2]:
        step(x, y)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        original = copy.deepcopy(step)
        for x, y in data[2:]:
            assert torch.equal(original(x, y), other(x, y))
        assert torch.equal(flat(original.model), flat(other.model))


def test_batches_of_several_sizes():
    a, b = made(optimizer="adam"), made(optimizer="adam")
    for rows in (8, 3, 8, 40, 3):
        x, y = data_of(rows)[0]
        assert torch.equal(a(x, y), b(x, y))
    by_machine(a, 40)
    assert a.state_dict()["step"] == 5


@pytest.mark.parametrize("unit", ["derivatives.tanh", "losses.cross_entropy", "rules.adam"])
def test_what_was_not_written_goes_to_the_operators(unit, monkeypatch):
    x, y = data_of(8)[0]
    settings = {"activation": "tanh", "optimizer": "adam"}
    fastmlp.set_cpu_gemm("aten")
    expected = made(**settings)
    expected(x, y)
    fastmlp.set_cpu_gemm("native")
    monkeypatch.setattr(machine_code, "written", lambda name: name != unit)
    step = made(**settings)
    step(x, y)
    assert torch.equal(flat(step.model), flat(expected.model))
