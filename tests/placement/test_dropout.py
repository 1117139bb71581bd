"""Dropout on GPUs: the state is on the model's device, masks are made there, and the host never waits."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import TrainStep
from fastmlp.reference.dropout import numbers_of
from tests.placement.test_step import SIZES, batch

pytestmark = pytest.mark.placement


@pytest.mark.parametrize(("dtype", "members"), [(torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 2)], ids=str)
def test_modules_and_steps(machine, dtype, members):
    if members:
        model = fastmlp.MLPEnsemble(SIZES, members, "tanh", device="cuda:1", dtype=dtype, dropout=0.25)
    else:
        model = fastmlp.MLP(SIZES, "tanh", device="cuda:1", dtype=dtype, dropout=(0.25, 0.5))
    assert model.dropout_state.device == torch.device("cuda:1")
    x, _ = batch("cuda:1", dtype)
    for _ in range(2):
        with machine.hot("cuda:1", host=True):
            model(x).sum().backward()
    step = TrainStep(model, lr=0.1, optimizer="adamw")
    for _ in range(2):
        with machine.hot("cuda:1", host=True):
            step(*batch("cuda:1", dtype))
            step.gradients(*batch("cuda:1", dtype))
    model.eval()
    step(*batch("cuda:1", dtype))
    launched = {launch.name for launch in machine.launches}
    assert ("_linear_fwd_kernel" in launched) == (dtype != torch.float64)
    assert {launch.device for launch in machine.launches} <= {1}
    assert machine.current == 0


def test_the_formula_of_the_masks_stays_on_the_device(machine):
    state = torch.zeros(2, dtype=torch.int64, device="cuda:1")
    assert numbers_of(state, 1, 3, 20).device == torch.device("cuda:1")


def test_models_move_with_their_state(machine):
    model = fastmlp.MLP(SIZES, dropout=0.5).to("cuda:1")
    assert model.dropout_state.device == torch.device("cuda:1")
    assert fastmlp.MLP.from_torch(model.to_torch()).dropout_state.device == torch.device("cuda:1")
    stacked = fastmlp.MLPEnsemble.stack([model, model])
    assert stacked.dropout_state.device == torch.device("cuda:1")
    assert stacked.unstack()[1].dropout_state.device == torch.device("cuda:1")
