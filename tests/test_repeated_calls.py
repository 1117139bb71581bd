"""A call of a small network on a CPU that is like one before: few functions of Python, and the same as the first call.

``fastmlp.functional`` then checks the tensors by one comparison of torch's. So each test makes at least two calls, and
most change something between them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

import fastmlp
from fastmlp import functional, reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.functional import linear_act, mlp
from tests.support.calls import python_calls

#: Functions of Python that a repeated call of a model may go through, whatever the number of layers.
MOST_CALLS = 13


def network(sizes=(4, 6, 3), bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    pairs = list(pairwise(sizes))
    weights = [torch.randn(n, k, generator=generator).to(dtype).requires_grad_() for k, n in pairs]
    biases = [torch.randn(n, generator=generator).to(dtype).requires_grad_() if bias else None for _, n in pairs]
    return torch.randn(5, sizes[0], generator=generator).to(dtype), weights, biases


def repeats() -> int:
    return len(functional._repeated)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(functional, "_repeated", {})


def test_functions_of_a_repeated_call():
    for sizes in ((4, 8, 3), (4, 5, 6, 7, 8, 3)):
        model, x = fastmlp.MLP(sizes, "tanh"), torch.randn(5, 4)
        model(x)
        names = python_calls(lambda: model(x))  # noqa: B023
        assert len(names) <= MOST_CALLS, names


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["rows", "images", "pixels", "no rows"])
def test_the_second_call_is_the_first(activation, bias, kind):
    x, weights, biases = network(bias=bias)
    x = {
        "rows": x,
        "images": x.view(5, 2, 1, 2),
        "pixels": x.mul(50).to(torch.uint8).view(5, 2, 2),
        "no rows": x[:0],
    }[kind]
    if kind == "rows":
        x[0, 0] = math.nan
    activations, params = [activation, "identity"], [p for p in (*weights, *biases) if p is not None]
    results = []
    for _ in range(3):
        a = mlp(x, weights, biases, activations)
        grads = torch.autograd.grad(a.nan_to_num().square().sum(), params, allow_unused=True)
        results.append([a, *[g if g is not None else torch.zeros(()) for g in grads]])
    assert repeats() == 1
    expected = reference.mlp(x.flatten(1), weights, biases, activations)
    torch.testing.assert_close(results[0][0], expected, rtol=0, atol=0, equal_nan=True)
    for again in results[1:]:
        for got, first in zip(again, results[0], strict=True):
            torch.testing.assert_close(got, first, rtol=0, atol=0, equal_nan=True)


def test_layers_and_networks_of_one_layer_are_two_calls():
    w, b, x = torch.randn(3, 4), torch.randn(3), torch.randn(5, 1, 4)
    for _ in range(2):
        assert linear_act(x, w, b, "tanh").shape == (5, 1, 3)
        assert mlp(x, [w], [b], ["tanh"]).shape == (5, 3)
    assert repeats() == 2


def test_a_bias_that_comes_and_goes():
    x, weights, biases = network()
    for _ in range(2):
        for given in (biases, [None, biases[1]], [biases[0], None], [None, None]):
            for _ in range(2):
                got = mlp(x, weights, given, ["tanh", "relu"])
                torch.testing.assert_close(got, reference.mlp(x, weights, given, ["tanh", "relu"]))


WRONG = {
    "input": lambda x, w, b, a: (x[:, :3], w, b, a),
    "dtype": lambda x, w, b, a: (x.double(), w, b, a),
    "weight": lambda x, w, b, a: (x, [w[0], w[1][:, :5]], b, a),
    "bias": lambda x, w, b, a: (x, w, [b[0][:1], b[1]], a),
    "biases": lambda x, w, b, a: (x, w, b[:1], a),
    "activations": lambda x, w, b, a: (x, w, b, [*a, "relu"]),
    "name": lambda x, w, b, a: (x, w, b, ["tanh", "swish"]),
    "no hash": lambda x, w, b, a: (x, w, b, ["tanh", ["relu"]]),
    "no tensor": lambda x, w, b, a: (x.tolist(), w, b, a),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_after_a_call_that_was_right(wrong):
    x, weights, biases = network()
    right = x, weights, biases, ["tanh", "relu"]
    mlp(*right)
    mlp(*right)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as second:
        mlp(*WRONG[wrong](*right))
    functional._repeated.clear()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as first:
        mlp(*WRONG[wrong](*right))
    assert (second.type, str(second.value)) == (first.type, str(first.value))


def test_an_activation_without_a_hash_where_kernels_run(monkeypatch):
    x, weights, biases = network()
    monkeypatch.setattr(functional, "_alone", lambda *tensors: "triton")
    with pytest.raises(ValueError, match="unknown activation"):
        mlp(x, weights, biases, ["tanh", ["relu"]])


def test_backends_and_modes_between_calls():
    x, weights, biases = network()
    call = x, weights, biases, ["tanh", "relu"]
    mlp(*call)
    plain = mlp(*call)
    assert "MLPFunction" not in plain.grad_fn.name()
    with fastmlp.use_backend("torch"):
        assert "MLPFunction" in mlp(*call).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(*call).dtype == torch.bfloat16
    assert torch.equal(mlp(*call), plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_transforms_of_a_call_that_was_repeated():
    x, weights, biases = network(dtype=torch.float64)
    w, b = [t.detach() for t in weights], [t.detach() for t in biases]

    def call(x: Tensor) -> Tensor:
        return mlp(x, w, b, ["tanh", "gelu"])

    call(x)
    plain = call(x)
    rows = vmap(lambda row: call(row.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(rows, plain)
    tangent = torch.randn(5, 4, dtype=torch.float64)
    _, got = jvp(call, (x,), (tangent,))
    _, expected = jvp(lambda x: reference.mlp(x, w, b, ["tanh", "gelu"]), (x,), (tangent,))
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(call, (x.clone().requires_grad_(),))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_parameters():
    """torch's guards would end the process."""
    x, weights, biases = network()
    nested = torch.nested.nested_tensor([torch.randn(3)])
    for _ in range(2):
        mlp(x, weights, biases, ["tanh", "relu"])
        for params in ((weights, [biases[0], nested]), ([weights[0], nested], biases), ([nested, weights[1]], biases)):
            with pytest.raises(RuntimeError):
                mlp(x, *params, ["tanh", "relu"])


def test_tangents_in_inference_mode_after_calls_in_it():
    x, weights, biases = network()
    layer = fastmlp.Linear(4, 3)
    calls = layer, lambda x: mlp(x, weights, biases, ["tanh", "relu"])
    for call in calls:
        with torch.inference_mode():
            call(x)
            call(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with torch.inference_mode(), pytest.raises(RuntimeError, match="drops forward-mode derivatives"):
                call(dual)


def test_other_parameters_of_a_model():
    model, x = fastmlp.MLP((4, 6, 3), "relu"), torch.randn(5, 4)
    model(x)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    got = functional_call(model, other, (x,))
    torch.testing.assert_close(got, functional_call(model.to_torch(), _in_torchs_order(other), (x,)))
    for p in model.parameters():
        p.requires_grad_(False)
    assert not model(x).requires_grad
    model.layers[0].weight = nn.Parameter(torch.zeros(6, 4))
    torch.testing.assert_close(model(x), model.to_torch()(x))


def _in_torchs_order(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by the names that they have in ``MLP((4, 6, 3)).to_torch()``."""
    names = [name for name, _ in fastmlp.MLP((4, 6, 3), "relu").to_torch().named_parameters()]
    return dict(zip(names, parameters.values(), strict=True))
