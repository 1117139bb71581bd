"""kernels/activation_bwd.py against autograd through reference.activate in float64."""

from __future__ import annotations

import pytest
import torch

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import activation_bwd
from tests.support.harness import FLOATS, assert_within_budget, nan_like, poisoned


def gradient(da, z, activation):
    """DA * f'(z) by autograd; zero for step, which autograd cannot differentiate."""
    if activation in ("identity", "step"):
        return da * reference.activation_grad(z, activation)
    z = z.detach().requires_grad_()
    return torch.autograd.grad(reference.activate(z, activation), z, da)[0]


@pytest.mark.covering
@pytest.mark.parametrize("layout", ["dense", "rows", "columns", "expanded"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_bwd(lane, activation, dtype, layout):
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(17, 63, generator=g)).to(dtype)
    da = torch.randn(17, 63, generator=g).to(dtype)
    da = da[0].expand(17, 63) if layout == "expanded" else poisoned(da, layout=layout)
    kept = {"z": z, "a": reference.activate(z, activation), None: None}[saved_for_grad(activation)]
    saved = None if kept is None else poisoned(kept, layout="dense").to(lane)
    dz = activation_bwd(da.to(lane), saved, activation, dz=nan_like((17, 63), dtype).to(lane))
    truth = gradient(da.double(), z.double(), activation)
    assert_within_budget(dz.cpu(), truth, gradient(da, z, activation), reduction=1)


def test_kinks_and_non_finite_values_as_in_torch(lane):
    z = torch.tensor([[0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-30]])
    for activation in ("relu", "leaky_relu", "sigmoid", "tanh"):
        dz = activation_bwd(torch.ones_like(z).to(lane), reference.activate(z, activation).to(lane), activation)
        torch.testing.assert_close(dz.cpu(), gradient(torch.ones_like(z), z, activation), equal_nan=True)


def test_empty(lane):
    assert activation_bwd(torch.ones(0, 3, device=lane), torch.ones(0, 3, device=lane), "relu").shape == (0, 3)
