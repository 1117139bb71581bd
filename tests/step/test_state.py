"""TrainStep's state_dict: a run that stops and resumes equals an uninterrupted run bit by bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load, save

import fastmlp
from tests.support.steps import (
    batches,
    converted,
    flat,
    for_step,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
CASES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, None),
]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adamw, all settings"])
@pytest.mark.parametrize(("parameters", "products"), CASES, ids=str)
def test_goes_on_where_it_stopped(parameters, products, optimizer):
    dtype = products or parameters
    data = [for_step(x, y, dtype) for x, y in batches(*problem(SIZES, 70), 24, 8)]
    model = converted(network(SIZES), parameters)
    step = fastmlp.TrainStep(model, dtype=products, **OPTIMIZERS[optimizer])
    for x, y in data[:5]:
        step(x, y)
    saved = copy.deepcopy(model.state_dict()), load(save(step.state_dict()))
    for x, y in data[5:]:
        step(x, y)

    other = converted(network(SIZES, seed=7), parameters)
    resumed = fastmlp.TrainStep(other, dtype=products, **OPTIMIZERS[optimizer])
    for x, y in data[:2]:
        resumed(x, y)  # makes a state that loading must replace
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for x, y in data[5:]:
        resumed(x, y)
    assert torch.equal(flat(other), flat(model))
    for name, tensor in step.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_a_frozen_parameter_has_its_state_when_it_is_thawed(parameters):
    """The run is stopped and resumed while a layer is frozen, in a process that never trained that layer."""
    data = [for_step(x, y, parameters) for x, y in batches(*problem(SIZES, 70), 24, 8)]

    def freeze(model: fastmlp.MLP, frozen: bool) -> None:
        for parameter in model.layers[1].parameters():
            parameter.requires_grad_(not frozen)

    model = converted(network(SIZES), parameters)
    step = fastmlp.TrainStep(model, **OPTIMIZERS["momentum"])
    step(*data[0])
    step(*data[1])
    freeze(model, True)
    step(*data[2])
    saved = copy.deepcopy(model.state_dict()), load(save(step.state_dict()))

    other = converted(network(SIZES, seed=7), parameters)
    freeze(other, True)
    resumed = fastmlp.TrainStep(other, **OPTIMIZERS["momentum"])
    other.load_state_dict(saved[0])
    with pytest.raises(ValueError, match=r"expected layers\.1\.bias\.momentum_buffer of shape \[11\], got \[3\]"):
        resumed.load_state_dict(saved[1] | {"layers.1.bias.momentum_buffer": torch.zeros(3)})
    resumed.load_state_dict(saved[1])
    assert resumed.state_dict().keys() == saved[1].keys()
    for either, of in ((model, step), (other, resumed)):
        freeze(either, False)
        of(*data[3])
    assert torch.equal(flat(other), flat(model))
    assert step.state_dict()["layers.1.weight.momentum_buffer"].abs().sum() > 0

    without = {name: value for name, value in saved[1].items() if not name.startswith("layers.1")}
    freeze(other, True)
    resumed.load_state_dict(without)  # as if the layer had never been trained
    freeze(other, False)
    assert not resumed.state_dict()["layers.1.weight.momentum_buffer"].any()


def test_names():
    def names(dtype=None, **settings):
        return set(fastmlp.TrainStep(network((4, 3)).float(), dtype=dtype, **settings).state_dict())

    both = ("layers.0.weight", "layers.0.bias")
    assert names() == set()
    assert names(momentum=0.9) == {f"{name}.momentum_buffer" for name in both}
    assert names(optimizer="adamw") == {f"{n}.{kind}" for n in both for kind in ("exp_avg", "exp_avg_sq")} | {"step"}
    assert names(torch.float16) == {"loss_scale", "loss_scale_good_steps"}
    half = fastmlp.TrainStep(converted(network((4, 3)), torch.bfloat16))
    assert set(half.state_dict()) == {f"{name}.master" for name in both}


def test_a_state_is_a_copy():
    model = network(SIZES)
    step = fastmlp.TrainStep(model, **OPTIMIZERS["momentum"])
    x, y = problem(SIZES, 24)
    step(x, y)
    state = step.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    step(x, y)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_what_does_not_fit():
    step = fastmlp.TrainStep(network(SIZES), momentum=0.9)
    state = step.state_dict()
    with pytest.raises(
        ValueError, match=r"does not fit this TrainStep \(adamw, torch.float64\): missing .*exp_avg.*step"
    ):
        fastmlp.TrainStep(network(SIZES), "adamw").load_state_dict(state)
    wrong = {**state, "layers.0.weight.momentum_buffer": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"layers.0.weight.momentum_buffer of shape \[17, 13\], got \[2, 3\]"):
        step.load_state_dict(wrong)
    with pytest.raises(ValueError, match="unexpected more"):
        step.load_state_dict({**state, "more": torch.zeros(())})


def test_what_is_no_state():
    step = fastmlp.TrainStep(fastmlp.MLP((3, 2)), "adamw")
    with pytest.raises(TypeError, match=r"expected the dict that state_dict\(\) returned, got NoneType"):
        step.load_state_dict(None)
    for number in (torch.tensor(math.nan), torch.ones(2)):
        with pytest.raises(ValueError, match="expected step to be one finite number, got"):
            step.load_state_dict({**step.state_dict(), "step": number})
    together = fastmlp.TrainStep(fastmlp.MLPEnsemble((3, 2), 2), "adamw")
    with pytest.raises(ValueError, match=r"the state does not fit this TrainStep .* missing|expected step of shape"):
        together.load_state_dict(step.state_dict())
