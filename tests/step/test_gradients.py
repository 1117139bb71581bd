"""TrainStep.gradients and update: gradients without a step, accumulation over batches, clipping."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from tests.support.steps import (
    Reference,
    batches,
    converted,
    either_way,  # noqa: F401
    flat,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)


def autograd(model: fastmlp.MLP, data, loss: str = "cross_entropy") -> dict[str, torch.Tensor]:
    """The sum of the gradients of the batches, float64."""
    reference = Reference(model, {"lr": 0.0}, loss)
    for x, y in data:
        reference.backward(x, y)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in reference.params.items()
        if p.requires_grad
    }


def assert_gradients(actual, expected, rtol: float = 1e-10) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        assert (actual[name] - value).norm() <= rtol * max(1e-3, value.norm()), name


@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_autograd(activation, loss):
    model = network(SIZES, activation)
    before = flat(model)
    data = problem(SIZES, 24, loss=loss)
    step = fastmlp.TrainStep(model, lr=0.3, loss=loss)
    assert_gradients(step.gradients(*data), autograd(model, [data], loss))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_and_update_are_a_step(name):
    model, twin = network(SIZES), network(SIZES)
    one, two = fastmlp.TrainStep(model, **OPTIMIZERS[name]), fastmlp.TrainStep(twin, **OPTIMIZERS[name])
    for batch in batches(*problem(SIZES, 70), 24, 5):
        one(*batch)
        two.gradients(*batch)
        two.update()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd", "nesterov", "clipping", "adamw"])
def test_accumulated_batches_are_one_large_batch(name, dtype):
    """The gradient of the mean loss of 3 batches of 20 is a third of the sum of their gradients."""
    x, y = problem(SIZES, 60)
    model, twin = converted(network(SIZES), dtype), network(SIZES)
    settings = {**OPTIMIZERS[name], "lr": 0.05}
    step = fastmlp.TrainStep(model, **settings)
    for _ in range(3):
        for i in range(3):
            grads = step.gradients(x[20 * i : 20 * i + 20].to(dtype), y[20 * i : 20 * i + 20], accumulate=i > 0)
        for grad in grads.values():
            grad /= 3
        step.update()
    expected = Reference(twin, settings).train([(x, y)] * 3).flat()
    tolerance = 1e-10 if dtype == torch.float64 else 3 * torch.finfo(dtype).eps
    assert (flat(model) - expected).norm() <= tolerance * expected.norm()


def test_accumulate_starts_anew_after_an_update_or_a_step():
    """A loop may therefore always accumulate."""
    data = batches(*problem(SIZES, 70), 24, 4)
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.3)
    assert_gradients(step.gradients(*data[0], accumulate=True), autograd(model, data[:1]))
    assert_gradients(step.gradients(*data[1], accumulate=True), autograd(model, data[:2]))
    step.update()
    assert_gradients(step.gradients(*data[2], accumulate=True), autograd(model, data[2:3]))
    step(*data[0])
    assert_gradients(step.gradients(*data[3], accumulate=True), autograd(model, data[3:4]))
    step.epoch(*data[0], 24)
    assert_gradients(step.gradients(*data[3], accumulate=True), autograd(model, data[3:4]))


def test_without_accumulate_the_gradients_are_of_the_last_call():
    data = batches(*problem(SIZES, 70), 24, 2)
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.3, momentum=0.9)
    step.gradients(*data[0])
    assert_gradients(step.gradients(*data[1]), autograd(model, data[1:]))


def test_batches_of_several_sizes():
    model = network(SIZES)
    data = [problem(SIZES, m, seed=m) for m in (24, 3, 1)]
    step = fastmlp.TrainStep(model, lr=0.3, momentum=0.9)
    for i, batch in enumerate(data):
        grads = step.gradients(*batch, accumulate=i > 0)
    assert_gradients(grads, autograd(model, data))


@pytest.mark.parametrize("frozen", ["layers.0.weight", "layers.1.bias", "layers.2.weight"])
def test_frozen_parameters_have_no_gradient(frozen):
    model = network(SIZES)
    model.get_parameter(frozen).requires_grad_(False)
    batch = problem(SIZES, 24)
    grads = fastmlp.TrainStep(model, lr=0.3).gradients(*batch)
    assert frozen not in grads
    assert_gradients(grads, autograd(model, [batch]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_float32_at_least(dtype):
    model = converted(network(SIZES), dtype)
    x, y = problem(SIZES, 24)
    grads = fastmlp.TrainStep(model, lr=0.3).gradients(x.to(dtype), y)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    expected = autograd(network(SIZES), [(x, y)])
    for name, grad in grads.items():  # float16 gradients are divided by the loss scale again
        assert (grad - expected[name]).norm() <= 20 * torch.finfo(dtype).eps * expected[name].norm(), name


def test_clipping_scales_all_gradients_alike():
    """The update of plain SGD with lr 1 is the clipped gradient."""
    model = network(SIZES)
    before = flat(model)
    batch = problem(SIZES, 24)
    norm = torch.cat([g.flatten() for g in autograd(model, [batch]).values()]).norm()
    for factor in (0.5, 2.0):
        model.load_state_dict(network(SIZES).state_dict())
        step = fastmlp.TrainStep(model, lr=1.0, max_grad_norm=factor * norm.item())
        step(*batch)
        torch.testing.assert_close((flat(model) - before).norm(), min(factor, 1.0) * norm, rtol=1e-5, atol=0)


def test_gradients_may_be_changed_before_the_update():
    model = network(SIZES)
    before = flat(model)
    step = fastmlp.TrainStep(model, lr=0.5)
    for grad in step.gradients(*problem(SIZES, 24)).values():
        grad.fill_(1.0)
    step.update()
    torch.testing.assert_close(flat(model), before - 0.5)


def test_float32_gradients_do_not_depend_on_the_batches_before():
    x, y = for_step(*problem(SIZES, 24), torch.float32)
    model = converted(network(SIZES), torch.float32)
    step = fastmlp.TrainStep(model, lr=0.3, momentum=0.9)
    first = {name: g.clone() for name, g in step.gradients(x, y).items()}
    step.gradients(x * float("nan"), y)
    again = step.gradients(x, y)
    assert all(torch.equal(first[name], again[name]) for name in first)
