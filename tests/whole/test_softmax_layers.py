"""Softmax as the activation of hidden and last layers of an MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fastmlp
from fastmlp.functional import linear_act, mlp
from fastmlp.train.initial import initialize_

PLACES = [("softmax", "identity"), ("sigmoid", "softmax"), ("softmax", "softmax")]


def model_of(activations, dtype=torch.float64) -> fastmlp.MLP:
    torch.manual_seed(0)
    return fastmlp.MLP((6, 5, 4), activations, dtype=dtype)


@pytest.mark.parametrize("activations", PLACES, ids="-".join)
def test_values_and_gradients_as_torchs_modules(activations):
    model = model_of(activations)
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain = model.to_torch()
    assert isinstance(plain[-1], nn.Softmax) == (activations[-1] == "softmax")
    torch.testing.assert_close(model(x), plain(x))
    inputs = [x, *model.parameters()]
    ours = torch.autograd.grad(model(x).pow(2).sum(), inputs)
    theirs = torch.autograd.grad(plain(x).pow(2).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activations", PLACES, ids="-".join)
def test_first_and_second_derivatives(activations):
    model = model_of(activations)
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = [layer.weight.detach().requires_grad_() for layer in model.layers]

    def run(x, *weights):
        return mlp(x, weights, [None, None], activations)

    assert gradcheck(run, (x, *weights))
    assert gradgradcheck(run, (x, *weights))


def test_one_layer_and_leading_dimensions():
    w, b = torch.randn(4, 6), torch.randn(4)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(linear_act(x, w, b, "softmax"), torch.softmax(x @ w.t() + b, -1))
    assert fastmlp.Linear(6, 4, activation="softmax")(x).sum(-1).allclose(torch.ones(2, 3))


def test_a_single_name_leaves_the_last_layer_without():
    assert fastmlp.MLP((6, 5, 4), "softmax").activations == ("softmax", "identity")


def test_from_torch():
    plain = nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 4), nn.Softmax(-1))
    model = fastmlp.MLP.from_torch(plain)
    assert model.activations == ("softmax", "softmax")
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), plain(x))


def test_starting_values_and_unknown_names():
    initialize_(model_of(("softmax", "identity")), 0)
    with pytest.raises(ValueError, match=r"'softmin'.*silu, softmax"):
        fastmlp.MLP((6, 5, 4), ["softmin"])


def test_a_train_step_says_that_it_has_none():
    with pytest.raises(ValueError, match=r"layers\.0 has softmax.*train with autograd"):
        fastmlp.TrainStep(model_of(("softmax", "identity")), lr=0.1)
