"""fastmlp/reference/linear.py against autograd and against torch's own modules, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, LEAKY_SLOPE, saved_for_grad
from tests.support.torchs import TORCH_ACTIVATIONS

DIFFERENTIABLE = [name for name in ACTIVATIONS if name != "step"]
# Both sides of every kink, the kink itself, and far out.
POINTS = torch.tensor([-40.0, -3.0, -1.0, -1e-3, -0.0, 0.0, 1e-3, 0.5, 2.0, 40.0], dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", DIFFERENTIABLE)
def test_activate_is_torchs_module(activation):
    close(reference.activate(POINTS, activation), TORCH_ACTIVATIONS[activation].module()(POINTS))


def test_step_is_one_from_zero_on():
    assert reference.activate(POINTS, "step").tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert not reference.activation_grad(POINTS, "step").any()


@pytest.mark.parametrize("activation", DIFFERENTIABLE)
def test_activation_grad_is_the_derivative(activation):
    """This includes the kinks, where torch's value is the right one."""
    z = POINTS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(TORCH_ACTIVATIONS[activation].module()(z).sum(), z)
    close(reference.activation_grad(POINTS, activation), expected)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if saved_for_grad(name) == "a"])
def test_derivative_from_the_output(activation):
    a = reference.activate(POINTS, activation)
    close(reference.activation_grad_from_output(a, activation), reference.activation_grad(POINTS, activation))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if saved_for_grad(name) != "a"])
def test_no_derivative_from_the_output(activation):
    with pytest.raises(ValueError, match="not a function of its output"):
        reference.activation_grad_from_output(POINTS, activation)


@pytest.mark.parametrize("function", [reference.activate, reference.activation_grad])
def test_unknown_activation(function):
    with pytest.raises(ValueError, match=r"unknown activation 'softmin'; expected one of identity, .*silu"):
        function(POINTS, "softmin")


def test_the_table_of_activations():
    assert {name: saved_for_grad(name) for name in ACTIVATIONS} == {
        name: f.saved for name, f in TORCH_ACTIVATIONS.items()
    }
    assert nn.LeakyReLU().negative_slope == LEAKY_SLOPE


def test_pixels():
    x = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert torch.equal(reference.pixels(x, torch.float64), x.double() / 255)
    floats = torch.randn(2, 3)
    assert reference.pixels(floats, torch.float64) is floats


def problem(sizes: tuple[int, ...], seed: int = 0):
    """(x, weights, biases, da) in float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights = [draw(n_out, n_in) / n_in**0.5 for n_in, n_out in pairwise(sizes)]
    return draw(7, sizes[0]), weights, [draw(n) for n in sizes[1:]], draw(7, sizes[-1])


@pytest.mark.parametrize("activation", DIFFERENTIABLE)
def test_linear_act_backward_is_autograd(activation):
    x, (w,), (b,), da = problem((5, 4))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(TORCH_ACTIVATIONS[activation].module()(nn.functional.linear(x, w, b)), leaves, da)
    for actual, want in zip(reference.linear_act_backward(da, x, w, b, activation), expected, strict=True):
        close(actual, want)


@pytest.mark.parametrize(
    "activations", [("sigmoid", "gelu", "identity"), ("relu", "tanh", "leaky_relu"), ("silu",) * 3]
)
def test_mlp_and_its_backward_are_autograd(activations):
    x, weights, biases, da = problem((6, 5, 4, 3))
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    out = x
    for w, b, activation in zip(weights, biases, activations, strict=True):
        out = TORCH_ACTIVATIONS[activation].module()(nn.functional.linear(out, w, b))
    close(reference.mlp(x, weights, biases, activations), out)
    expected = torch.autograd.grad(out, leaves, da)
    dx, dws, dbs = reference.mlp_backward(da, x, weights, biases, activations)
    for actual, want in zip([dx, *dws, *dbs], expected, strict=True):
        close(actual, want)
