"""A step like the last one: it calls few functions of Python, and still looks at everything that may have changed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

import fastmlp
from fastmlp.step.optimizers import OPTIMIZERS

#: Functions of Python that a warm step may call, whatever the number of layers.
MOST_CALLS = 20


def python_calls(function: Callable[[], object]) -> list[str]:
    """The Python functions that the function calls, by name."""
    names: list[str] = []

    def profile(frame, event, argument):
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]


def warm(sizes=(4, 8, 3), **settings):
    torch.manual_seed(0)
    step = fastmlp.TrainStep(fastmlp.MLP(sizes, "tanh"), **{"lr": 0.1, **settings})
    x, y = torch.linspace(-1, 1, 5 * sizes[0]).view(5, sizes[0]), torch.arange(5) % sizes[-1]
    for _ in range(3):
        step(x, y)
    return step, x, y


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_calls_of_a_warm_step(optimizer):
    for sizes in ((4, 8, 3), (4, 5, 6, 7, 8, 3)):
        step, x, y = warm(sizes, optimizer=optimizer)
        step._next_loss()  # so that none of these steps allocates losses
        names = min((python_calls(lambda: step(x, y)) for _ in range(2)), key=len)  # noqa: B023
        assert len(names) <= MOST_CALLS, names
        assert not python_calls(step._binding.holds)
        assert not python_calls(lambda: step.optimizer.changed(step._rules))[1:]  # noqa: B023


def test_the_first_setting_is_the_learning_rate():
    """The look at the settings takes it for granted."""
    for rule in OPTIMIZERS.values():
        assert rule(lr=0.1).settings[0] == "lr"
        assert next(iter(vars(rule(lr=0.1)))) == "lr"


BATCHES = {
    "features": (lambda x, y: (x[:, :3], y), RuntimeError, "4 features"),
    "input dtype": (lambda x, y: (x.long(), y), RuntimeError, "dtype"),
    "input layout": (lambda x, y: (x.to_sparse(), y), RuntimeError, "dense"),
    "rows": (lambda x, y: (x, y[:4]), ValueError, "as many targets"),
    "target dtype": (lambda x, y: (x, y.int()), RuntimeError, "int64"),
    "target shape": (lambda x, y: (x, y[:, None]), RuntimeError, "shape"),
    "class": (lambda x, y: (x, y + 1), IndexError, "out of range"),
    "no tensor": (lambda x, y: (x, y.tolist()), TypeError, "Tensor"),
    "no tensors": (lambda x, y: (x.tolist(), y), TypeError, "Tensor"),
}


@pytest.mark.parametrize("change", BATCHES, ids=str)
def test_a_batch_unlike_the_last_one(change):
    step, x, y = warm()
    before = [p.detach().clone() for p in step.model.parameters()]
    wrong, error, text = BATCHES[change]
    for _ in range(2):
        with pytest.raises(error, match=text):
            step(*wrong(x, y))
        assert all(map(torch.equal, step.model.parameters(), before))
    step(x, y)


def test_inference_mode_after_a_step_outside():
    step, x, y = warm()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        step(x, y)


def test_a_batch_on_the_tape_stays_without_a_gradient():
    step, x, y = warm()
    loss = step(x.requires_grad_(), y)
    assert not loss.requires_grad
    assert x.grad is None


def test_a_setting_that_was_refused_and_taken_back():
    """The rules then are those of the step before, also where the groups had other values meanwhile."""
    (step, x, y), (twin, *_) = warm(momentum=0.9), warm(momentum=0.9)
    group = step.optimizer.param_groups[0]
    for name, value in (("lr", 0.5), ("momentum", 0.1)):
        before, group[name] = group[name], value
        handle = step.model.register_forward_hook(lambda *a: None)
        with pytest.raises(ValueError, match="hook"):
            step(x, y)
        handle.remove()
        group[name] = before
        assert step(x, y) == twin(x, y)


def test_a_setting_taken_and_taken_back():
    (step, x, y), (twin, *_) = warm(momentum=0.9), warm(momentum=0.9)
    for name, value in (("lr", 0.5), ("momentum", 0.1)):
        before = step.optimizer.param_groups[0][name]
        for now in (value, before, value, before):
            step.optimizer.param_groups[0][name] = now
            twin.optimizer.param_groups[0].update({name: now, "note": now})  # never like the last one
            assert step(x, y) == twin(x, y)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_taken_away(name):
    step, x, y = warm()
    del step.model.layers[1]._parameters[name]
    with pytest.raises(RuntimeError, match="make a new TrainStep"):
        step(x, y)
