"""784-512-512-10 at batch 64, forward, loss and backward, executed instruction by instruction on a simulated sm_80."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import reference
from fastmlp.backend import Backend
from tests.ptxsim import SimulatedGPU
from tests.support.harness import assert_within_budget

pytestmark = [pytest.mark.execute, pytest.mark.slow]

SIZES, BATCH = (784, 512, 512, 10), 64


def problem(activation: str, dtype: torch.dtype, *, pixels: bool) -> tuple[fastmlp.MLP, Tensor, Tensor]:
    """A network, images and labels, the same in every call."""
    torch.manual_seed(0)
    model = fastmlp.MLP(SIZES, activation, dtype=dtype)
    images = torch.randint(0, 256, (BATCH, SIZES[0]), dtype=torch.uint8)
    return model, images if pixels else (images / 255).to(dtype), torch.randint(0, SIZES[-1], (BATCH,))


def results(model: fastmlp.MLP, images: Tensor, labels: Tensor, backend: Backend) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter."""
    model.zero_grad()
    with fastmlp.use_backend(backend):
        logits = model(images)
        loss = fastmlp.CrossEntropyLoss()(logits, labels)
        loss.backward()
    gradients = {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def exact_results(model: fastmlp.MLP, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The reference's formulas in float64, at the present parameters."""
    weights = [layer.weight.detach().double() for layer in model.layers]
    biases = [layer.bias.detach().double() for layer in model.layers]
    x = reference.pixels(images, torch.float64).double()
    logits = reference.mlp(x, weights, biases, model.activations)
    loss = reference.cross_entropy(logits, labels)
    upstream, _ = reference.cross_entropy_backward(torch.ones((), dtype=torch.float64), logits, labels)
    _, dws, dbs = reference.mlp_backward(upstream, x, weights, biases, model.activations)
    found = {"logits": logits, "loss": loss}
    for i, (dw, db) in enumerate(zip(dws, dbs, strict=True)):
        found[f"d layers.{i}.weight"], found[f"d layers.{i}.bias"] = dw, db
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "pixels"), [("sigmoid", True), ("gelu", False)], ids=["sigmoid-pixels", "gelu"])
def test_training_pass(activation: str, pixels: bool, dtype: torch.dtype) -> None:
    model, images, labels = problem(activation, dtype, pixels=pixels)
    with SimulatedGPU(80) as gpu:
        actual = results(model, images, labels, "triton")
    assert len(gpu.launches) == 8
    own, expected = results(model, images, labels, "torch"), exact_results(model, images, labels)
    assert actual.keys() == expected.keys()
    # The longest sum in every result is over the inputs of the first layer.
    for name, value in actual.items():
        assert_within_budget(value, expected[name], own[name], reduction=SIZES[0], what=name)
