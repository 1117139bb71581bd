"""The products of a layer by each library: values, updates, and whole steps of few rows."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.cpu import choose, layer_products
from tests.support.steps import (
    allocations,
    batches,
    check_float32,
    float32_step,
    fresh_choices,  # noqa: F401
    needs_onednn,
    network,
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 16, 12, 6)
LIBRARIES = ["aten", pytest.param("onednn", marks=needs_onednn)]


@pytest.fixture(autouse=True)
def automatic(fresh_choices) -> None:  # noqa: F811
    fastmlp.set_cpu_gemm("auto")


def take(monkeypatch, library: str) -> None:
    """Have this library multiply, whatever the shape."""
    monkeypatch.setattr(choose, "choose", lambda *args, **settings: library)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("library", LIBRARIES)
def test_few_rows_train(monkeypatch, library, rows, optimizer, activation, bias):
    """Six steps equal six steps of torch.optim in float64, up to rounding."""
    take(monkeypatch, library)
    # The learning rates of other tests would be unstable on so few rows and would multiply every rounding.
    settings = OPTIMIZERS[optimizer] | ({} if optimizer == "adamw" else {"lr": 0.02})
    check_float32(network(SIZES, activation, bias=bias), batches(*problem(SIZES, 6 * rows), rows, 6), settings)


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "relu", "tanh"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("library", LIBRARIES)
def test_products(monkeypatch, library, rows, bias, activation):
    """Each product against float64; no old content of the buffers is left."""
    take(monkeypatch, library)
    n, k = 16, 13
    weight, b = torch.randn(n, k), torch.randn(n) if bias else None
    x, dz = torch.randn(rows, k), torch.randn(rows, n)
    before = weight.double()
    out, dx, dw = (torch.full(shape, float("nan")) for shape in ((rows, n), (rows, k), (n, k)))
    stored = layer_products(rows, weight, b, activation, out, dx, dw=dw)
    assert stored.update is None
    assert stored.wgrad is not None
    products = layer_products(rows, weight, b, activation, out, dx, update=True)
    assert products.wgrad is None
    assert products.update is not None
    assert products.dgrad is not None
    exact = reference.linear_act(x.double(), before, None if b is None else b.double(), activation)
    torch.testing.assert_close(products.linear(x), exact.float())
    torch.testing.assert_close(products.dgrad(dz), (dz.double() @ before).float())
    exact_dw = dz.double().t() @ x.double()
    torch.testing.assert_close(stored.wgrad(dz, x), exact_dw.float())
    assert torch.equal(weight, before.float())
    products.update(dz, x, 0.25)
    torch.testing.assert_close(weight, (before - 0.25 * exact_dw).float())
    frozen = layer_products(rows, weight, b, activation, out, None)
    assert frozen[1:] == (None, None, None)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_a_step_allocates_nothing(monkeypatch, rows, optimizer):
    take(monkeypatch, "aten")
    assert allocations(float32_step(SIZES, rows, optimizer)) == []
