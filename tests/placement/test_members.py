"""Ensembles on GPUs: all tensors are on the model's device, and the host never waits, with or without counts."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import TrainStep
from tests.placement.test_step import ROWS, SIZES, batch, check_launches

pytestmark = pytest.mark.placement

MEMBERS = 3
SETTINGS = {
    "rates": {"lr": [0.1, 0.2, 0.3]},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": [0.1, 0.0, 0.2]},
    "adamw float16 clipped": {"optimizer": "adamw", "lr": 0.01, "max_grad_norm": 0.05, "dtype": torch.float16},
    "mse": {"lr": 0.1, "momentum": 0.9, "loss": "mse"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step(machine, settings):
    """Steps, epochs and gradients on the second GPU while the first is current; flags come from the GPU."""
    device = "cuda:1"
    step = TrainStep(fastmlp.MLPEnsemble(SIZES, MEMBERS, device=device), **settings)
    assert step.backend == "triton"
    x, y = batch(device, torch.float32, loss=settings.get("loss", "cross_entropy"))
    images, labels = batch(device, torch.float32, 2 * ROWS + 5, settings.get("loss", "cross_entropy"))
    order = torch.stack([torch.randperm(len(images), device=device) for _ in range(MEMBERS)])
    flags = torch.ones(MEMBERS, dtype=torch.bool, device=device)
    for i in range(4):
        with machine.hot(device, host=True):  # rates come from the host where they change
            step.lr = 0.1 / (i + 1)
            step.active = flags
            losses = [step(x, y), step(x.expand(MEMBERS, -1, -1), y), step.epoch(images, labels, ROWS)]
            losses.append(step.epoch(images, labels, ROWS, order, [1.0, 0.5, 0.25]))
            step.gradients(x, y)
            grads = step.gradients(x, y, accumulate=True)
            step.update()
        assert {t.device for t in (*losses, *grads.values(), step.losses)} == {torch.device(device)}
        step.load_state_dict(step.state_dict())
    assert machine.current == 0
    check_launches(machine, device)
