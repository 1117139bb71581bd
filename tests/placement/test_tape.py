"""Forward, loss and backward on GPUs: every tensor is on the input's device, and the host never waits."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import backend, functional, use_backend

pytestmark = pytest.mark.placement

SIZES, ROWS = (20, 18, 17, 5), 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
VALUES = ["mse_loss", "l1_loss", "huber_loss", "bce_loss", "bce_with_logits", "multiclass_nll"]
REDUCTIONS = ["mean", "sum", "none"]


def labels(device, rows=ROWS):
    return torch.randint(0, SIZES[-1], (rows,), device=device)


def loss_and_backward(machine, device, dtype, *, pixels=False, autocast=None):
    """A training pass by autograd, and its launches."""
    before = len(machine.launches)
    model = fastmlp.MLP(SIZES, ["relu", "gelu", "identity"], device=device, dtype=dtype)
    loss_of = fastmlp.CrossEntropyLoss(label_smoothing=0.1)
    x = torch.randn(ROWS, SIZES[0], device=device, dtype=dtype)
    x = x.to(torch.uint8) if pixels else x.requires_grad_()
    y = labels(device)
    with machine.hot(device):
        with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
            a = model(x)
            loss = loss_of(a, y)
        loss.backward()
    assert a.dtype == (autocast or dtype)
    for t in (a, loss, *(p.grad for p in model.parameters()), *(() if pixels else (x.grad,))):
        assert t.device == torch.device(device)
    assert all(p.grad.dtype == dtype for p in model.parameters())
    assert machine.current == 0
    return machine.launches[before:]


@pytest.mark.covering
@pytest.mark.parametrize("device", ["cuda:1", "cuda:0"])
@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_a_training_pass(machine, backend_name, dtype, pixels, device):
    with use_backend(backend_name):
        launches = loss_and_backward(machine, device, dtype, pixels=pixels)
    assert bool(launches) == (backend_name == "auto" and dtype != torch.float64)
    assert {launch.device for launch in launches} <= {torch.device(device).index}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "float"])
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_autocast(machine, backend_name, pixels, dtype):
    with use_backend(backend_name):
        launches = loss_and_backward(machine, "cuda:1", torch.float32, pixels=pixels, autocast=dtype)
    assert bool(launches) == (backend_name == "auto")
    assert backend_name == "torch" or dtype in launches[0].dtypes


def test_inference(machine):
    model = fastmlp.MLP(SIZES, device="cuda:1")
    x = torch.randn(ROWS, SIZES[0], device="cuda:1")
    for context in (torch.no_grad(), torch.inference_mode()):
        with machine.hot("cuda:1"), context:
            assert model(x).device == torch.device("cuda:1")
    assert [launch.name for launch in machine.launches] == 6 * ["_linear_fwd_kernel"]


@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_second_derivatives(machine, backend_name):
    model = fastmlp.MLP(SIZES, "tanh", device="cuda:1")
    x = torch.randn(ROWS, SIZES[0], device="cuda:1", requires_grad=True)
    with machine.hot("cuda:1"), use_backend(backend_name):
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert all(p.grad.device == x.device for p in list(model.parameters())[:-1])


@pytest.mark.covering
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", VALUES)
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_losses_of_values(machine, backend_name, loss, dtype, reduction):
    a = torch.rand(ROWS, 5, device="cuda:1", dtype=dtype, requires_grad=True)
    y = torch.rand(ROWS, 5, device="cuda:1", dtype=dtype, requires_grad=True)
    with machine.hot("cuda:1"), use_backend(backend_name):
        value = getattr(functional, loss)(a, y, reduction)
        value.sum().backward()
    assert (value.device, a.grad.device, y.grad.device) == (a.device,) * 3
    assert bool(machine.launches) == (backend_name == "auto" and dtype != torch.float64)


@pytest.mark.covering
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["int64", "uint8", "values"])
@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_squared_error"])
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_losses_of_logits(machine, backend_name, loss, target, dtype, reduction):
    z = torch.randn(ROWS, 5, device="cuda:1", dtype=dtype, requires_grad=True)
    y = torch.rand(ROWS, 5, device="cuda:1", dtype=dtype) if target == "values" else labels("cuda:1")
    y = y.to(torch.uint8) if target == "uint8" else y
    with machine.hot("cuda:1"), use_backend(backend_name):
        value = getattr(functional, loss)(z, y, reduction=reduction)
        value.sum().backward()
    assert (value.device, z.grad.device) == (z.device,) * 2


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(5,), (ROWS, 5), (3, 5, 4), (3, 5, 4, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=str)
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_options_of_cross_entropy(machine, backend_name, options, shape):
    z = torch.randn(shape, device="cuda:1", requires_grad=True)
    y = torch.randint(0, 5, shape[:1] + shape[2:] if len(shape) > 1 else (), device="cuda:1")
    options = {**options, "weight": torch.rand(5, device="cuda:1")} if "weight" in options else options
    with machine.hot("cuda:1"), use_backend(backend_name):
        functional.cross_entropy(z, y, **options).backward()
    assert z.grad.device == z.device


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "step", "leaky_relu", "silu", "softmax"])
@pytest.mark.parametrize("backend_name", ["auto", "torch"])
def test_linear_act(machine, backend_name, activation):
    layer = fastmlp.Linear(20, 5, activation=activation, device="cuda:1")
    x = torch.randn(2, 3, 20, device="cuda:1", requires_grad=True)
    with machine.hot("cuda:1"), use_backend(backend_name):
        layer(x).sum().backward()
    assert (x.grad.device, layer.weight.grad.device) == (x.device,) * 2


def test_two_devices_are_an_error(machine):
    model = fastmlp.MLP(SIZES, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        model(torch.randn(ROWS, SIZES[0], device="cuda:0"))
    with pytest.raises(RuntimeError, match="same device"):
        functional.cross_entropy(torch.randn(ROWS, 5, device="cuda:1"), labels("cuda:0"))
    with pytest.raises(RuntimeError, match="same device"):
        functional.mse_loss(torch.randn(ROWS, 5, device="cuda:1"), torch.randn(ROWS, 5))
    assert machine.launches == []


def test_resolve(machine):
    x = torch.randn(3, 4, device="cuda:1")
    assert backend.resolve(x) == "triton"
    assert backend.resolve(x, torch.float64) == "torch"
    assert backend.resolve(x.double()) == "torch"
    assert backend.resolve(torch.randn(3, 4)) == "torch"
    with use_backend("torch"):
        assert backend.resolve(x) == "torch"
    with use_backend("triton"):
        assert backend.resolve(x) == "triton"
        with pytest.raises(TypeError, match="float64"):
            backend.resolve(x.double())
