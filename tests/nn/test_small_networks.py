"""What backend "auto" leaves to torch's own operations on a CPU: layers and networks of few multiplications, losses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import functional
from fastmlp.autograd.elementwise import LossFunction
from fastmlp.autograd.linear import LinearAct, MLPFunction

SIZES = (6, 5, 4, 3)
LOSSES = {
    "mse": (functional.mse_loss, torch.nn.functional.mse_loss),
    "l1": (functional.l1_loss, torch.nn.functional.l1_loss),
    "huber": (functional.huber_loss, torch.nn.functional.huber_loss),
    "bce": (functional.bce_with_logits, torch.nn.functional.binary_cross_entropy_with_logits),
}


def network(activation: str = "tanh", dtype=torch.float32, sizes=SIZES) -> fastmlp.MLP:
    torch.manual_seed(0)
    return fastmlp.MLP(sizes, activation, dtype=dtype)


def is_ours(a: Tensor) -> bool:
    return isinstance(a.grad_fn, tuple(node._backward_cls for node in (MLPFunction, LinearAct, LossFunction)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu", "silu"])
def test_a_small_network_has_the_bits_of_torchs_modules(activation, dtype):
    model, x = network(activation, dtype), torch.rand(7, 6, dtype=dtype)
    torchs = model.to_torch()
    for _ in range(3):  # checked once, then remembered
        for module in (model, torchs):
            module.zero_grad()
        out, want = model(x), torchs(x)
        assert not is_ours(out)
        assert torch.equal(out, want)
        grads, wanted = (torch.autograd.grad(a.sum(), list(model.parameters())) for a in (out, want))
        assert all(map(torch.equal, grads, wanted))


def test_a_layer(monkeypatch):
    layer, x = fastmlp.Linear(6, 4), torch.rand(2, 3, 6)
    for _ in range(3):
        out = layer(x)
        assert not is_ours(out)
        assert torch.equal(out, torch.nn.functional.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr(functional, "_FEW", 0)
    assert torch.equal(layer(x), out)  # is remembered
    assert isinstance(functional.linear_act(x[0], layer.weight, layer.bias).grad_fn, LinearAct._backward_cls)


def test_what_stays_with_our_nodes(monkeypatch):
    """Other dtypes, another backend, oneDNN, and many multiplications."""
    x = torch.rand(9, 6)
    assert is_ours(network(dtype=torch.bfloat16)(x.bfloat16()))
    with fastmlp.use_backend("torch"):
        assert is_ours(network()(x))
    with monkeypatch.context() as patch:
        assert not is_ours(network()(x))
        patch.setattr(functional, "get_cpu_gemm", lambda: "onednn")
        assert is_ours(network()(x))
    monkeypatch.setattr(functional, "_FEW", 11 * sum(m * n for m, n in pairwise(SIZES)))
    assert not is_ours(network()(torch.rand(11, 6)))
    assert is_ours(network()(torch.rand(12, 6)))


def test_pixels_and_more_dimensions():
    model, pixels = network(), torch.randint(0, 256, (5, 2, 3), dtype=torch.uint8)
    want = model.to_torch()(pixels.flatten(1) / 255)
    for _ in range(2):
        torch.testing.assert_close(model(pixels), want)


def test_a_call_that_was_right_makes_no_other_call_right():
    model, x = network(), torch.rand(5, 6)
    for _ in range(3):
        model(x)
    with pytest.raises(RuntimeError, match="expected an input with 6 features"):
        model(torch.rand(5, 7))
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x.double())
    model.layers[1].bias = torch.nn.Parameter(torch.zeros(1))  # which torch would broadcast
    with pytest.raises(RuntimeError, match=r"expected layers?.*bias.*shape \[4\]|bias.*\[4\]"):
        model(x)
    model.layers[1].bias.data = torch.zeros(4)
    model(x)
    model.layers[1].weight.data = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=r"\[4, 6\]"):
        model(x)


@pytest.mark.parametrize("target", [None, [0.0, 1.0], 1.0], ids=str)
def test_a_target_that_is_no_tensor(target):
    with pytest.raises(TypeError, match=r"target to be a torch\.Tensor"):
        functional.mse_loss(torch.ones(2), target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, reduction):
    ours, torchs = LOSSES[name]
    a, y = torch.randn(5, 3, requires_grad=True), torch.rand(5, 3)
    out, want = ours(a, y, reduction=reduction), torchs(a, y, reduction=reduction)
    assert not is_ours(out)
    assert torch.equal(out, want)
    (grad,), (wanted,) = (torch.autograd.grad(loss.sum(), a) for loss in (out, want))
    assert torch.equal(grad, wanted)
    assert is_ours(ours(a.bfloat16(), y.bfloat16(), reduction=reduction))
