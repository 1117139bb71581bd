"""fastmlp/autograd/linear.py: gradients of the first, second and third order, from any upstream gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.functional import linear_act, mlp

pytestmark = pytest.mark.usefixtures("own_nodes")

SIZES = (4, 5, 2, 3)
NAMES = ("x", "w0", "b0", "w1", "b1", "w2", "b2")


def tensors(sizes=SIZES, batch: int = 3, dtype=torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """The tensors x, w0, b0, ... of one network; all of them require grad."""
    g = torch.Generator().manual_seed(seed)
    out = {"x": torch.randn(batch, sizes[0], generator=g, dtype=torch.float64)}
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        out[f"w{layer}"] = torch.randn(n_out, n_in, generator=g, dtype=torch.float64) / n_in**0.5
        out[f"b{layer}"] = torch.randn(n_out, generator=g, dtype=torch.float64)
    return {name: t.to(dtype).requires_grad_() for name, t in out.items()}


def run(network, t: dict[str, Tensor], activations) -> Tensor:
    """``network`` is fastmlp's mlp or the reference's."""
    layers = len(activations)
    weights, biases = [t[f"w{i}"] for i in range(layers)], [t.get(f"b{i}") for i in range(layers)]
    return network(t["x"], weights, biases, activations)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


class TestGradcheck:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_linear_act(self, activation, bias):
        t = tensors((4, 3))
        inputs = (t["x"], t["w0"], t["b0"] if bias else None)
        assert gradcheck(lambda *a: linear_act(*a, activation), inputs)
        assert gradgradcheck(lambda *a: linear_act(*a, activation), inputs)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_mlp(self, activation):
        t = tensors()
        function = lambda *values: run(mlp, dict(zip(NAMES, values, strict=True)), [activation] * 3)  # noqa: E731
        assert gradcheck(function, tuple(t.values()))
        assert gradgradcheck(function, tuple(t.values()))

    def test_mlp_of_mixed_layers(self):
        t = tensors()
        del t["b1"]

        def function(x, w0, b0, w1, w2, b2):
            return mlp(x, (w0, w1, w2), (b0, None, b2), ("gelu", "tanh", "silu"))

        assert gradcheck(function, tuple(t.values()))
        assert gradgradcheck(function, tuple(t.values()))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_pixels(self, activation):
        t = tensors()
        x = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
        function = lambda *params: run(mlp, dict(zip(NAMES, (x, *params), strict=True)), [activation] * 3)  # noqa: E731
        params = [t[name] for name in NAMES[1:]]
        assert gradcheck(function, params)
        assert gradgradcheck(function, params)


@pytest.mark.parametrize("wanted", [c for r in (1, 2, 6) for c in itertools.combinations(NAMES, r)], ids="-".join)
@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "identity"])
def test_any_subset_of_gradients(activation, wanted):
    """First derivatives, and the derivatives of their squared norm, when only some tensors require grad."""
    results = []
    for network in (mlp, reference.mlp):
        t = tensors()
        for name in NAMES:
            t[name].requires_grad_(name in wanted)
        leaves = [t[name] for name in wanted]
        out = run(network, t, [activation] * 3)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((out, *first, *again))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "sigmoid"])
def test_third_derivative(activation):
    results = []
    for network in (mlp, reference.mlp):
        t = tensors()
        value = run(network, t, [activation] * 3).square().sum()
        for order in range(3):
            grads = torch.autograd.grad(value, list(t.values()), create_graph=order < 2)
            value = sum(g.square().sum() for g in grads)
        results.append(grads)
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_tied_weights(activation):
    """A weight in two layers of one node gets both contributions, in the second derivative too."""
    results = []
    for network in (mlp, reference.mlp):
        t = tensors((4, 4, 4))
        args = (t["x"], (t["w0"], t["w0"]), (t["b0"], t["b0"]), (activation, "identity"))
        leaves = [t["x"], t["w0"], t["b0"]]
        first = torch.autograd.grad(network(*args).square().sum(), leaves, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_gradient_penalty_trains():
    """After backward() through gradients, the parameters' .grad holds both parts of the loss."""
    grads = []
    for network in (mlp, reference.mlp):
        t = tensors()
        out = run(network, t, ["tanh", "gelu", "identity"])
        (dx,) = torch.autograd.grad(out.sum(), t["x"], create_graph=True)
        (out.square().mean() + (dx.norm(dim=1) - 1).square().mean()).backward()
        grads.append([p.grad for p in t.values()])
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected)


UPSTREAM = {
    "sum": lambda out: out.sum(),
    "mean": lambda out: out.mean(),
    "transposed": lambda out: (out.t() * torch.arange(3.0 * 3, dtype=out.dtype).view(3, 3)).sum(),
    "one column": lambda out: out[:, 1].square().sum(),
    "every other row": lambda out: out[::2].square().sum(),
    "expanded": lambda out: out.sum(0).square().sum(),
    "diagonal": lambda out: out.diagonal().square().sum(),
    "flipped": lambda out: out.flip(1).cumsum(0).square().sum(),
}


@pytest.mark.parametrize("activation", ["identity", "relu", "step", "silu"])
@pytest.mark.parametrize("consumer", UPSTREAM)
def test_upstream_gradients_of_any_strides(consumer, activation):
    """Expanded, transposed and sliced gradients reach the node with strides of all kinds."""
    results = []
    for network in (mlp, reference.mlp):
        t = tensors()
        activations = ["tanh", "gelu", activation]
        out = run(network, t, activations)
        if activation == "step" and network is reference.mlp:
            results.append([torch.zeros_like(p) for p in t.values()])  # the derivative is zero, and torch has none
        else:
            results.append(torch.autograd.grad(UPSTREAM[consumer](out), list(t.values())))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "step", "gelu"])
def test_upstream_gradients_of_linear_act(activation):
    for grad in (torch.ones(()).expand(3, 3), torch.randn(6, 6)[::2, 1::2], torch.randn(3, 3).t()):
        t = tensors((4, 3))
        upstream = grad.double()
        actual = torch.autograd.grad(linear_act(*t.values(), activation), list(t.values()), upstream)
        expected = reference.linear_act_backward(upstream, *t.values(), activation)
        for got, want in zip(actual, expected, strict=True):
            close(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_empty_batch(activation, create_graph):
    """As in torch, the output is empty and the gradients are zeros of full size."""
    t = tensors(batch=0)
    out = run(mlp, t, [activation] * 3)
    assert out.shape == (0, 3)
    grads = torch.autograd.grad(out.sum(), list(t.values()), create_graph=create_graph)
    for p, g in zip(t.values(), grads, strict=True):
        assert g.shape == p.shape
        assert not g.any()


@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast(activation, create_graph):
    """The gradients keep the dtype and the accuracy of their forward pass, which ran outside."""
    t = tensors(dtype=torch.float32)
    double = tensors()
    out = run(mlp, t, [activation] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, list(t.values()), torch.ones_like(out), create_graph=create_graph)
    expected = torch.autograd.grad(run(reference.mlp, double, [activation] * 3).sum(), list(double.values()))
    for actual, want in zip(grads, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), want, rtol=1e-4, atol=1e-5)
    x, w = t["x"], t["w0"]
    out = linear_act(x, w, None, activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=create_graph)
    assert dx.dtype == torch.float32
    want = reference.linear_act_backward(
        torch.ones(3, 5, dtype=torch.float64), x.double(), w.double(), None, activation
    )
    torch.testing.assert_close(dx.double(), want[0], rtol=1e-4, atol=1e-5)


def test_non_finite_values_pass_through():
    """NaN in the input, and infinities in the upstream gradient, spread as in torch."""
    t = tensors()
    with torch.no_grad():
        t["x"][1, 2] = float("nan")
    results = []
    for network in (mlp, reference.mlp):
        out = run(network, t, ["sigmoid", "tanh", "identity"])
        results.append((out, *torch.autograd.grad(out, list(t.values()), torch.full_like(out, float("inf")))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
