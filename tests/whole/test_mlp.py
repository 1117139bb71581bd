"""The kernels behind fastmlp's functions and modules, from the public API: forward, backward, against float64.

tests/kernels/ tests each operation alone. Here the operations run as the autograd functions chain them, on ragged
sizes. They are compared with float64 within the budget of tests/support/harness.py, where torch's own error is that of
the torch backend. So the two backends agree within three times that error.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import functional, reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.kernels.launch import forget
from tests.support.harness import FLOATS, assert_within_budget, poisoned

SIZES = (33, 17, 40, 10)


def network(sizes=SIZES, activation="sigmoid", dtype=torch.float32, *, bias: bool = True) -> fastmlp.MLP:
    """An MLP of fixed random parameters on the CPU."""
    torch.manual_seed(0)
    return fastmlp.MLP(sizes, activation, bias=bias, dtype=dtype)


def images(rows: int, features: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(1)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (rows, features), generator=g, dtype=dtype)
    return torch.randn(rows, features, generator=g).to(dtype)


def gradients(model: fastmlp.MLP, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, on the CPU."""
    x = x.detach().requires_grad_(x.is_floating_point())
    model.zero_grad()
    out = model(x)
    out.backward(upstream.to(out.device, out.dtype))
    result = {"A": out.detach()}
    if x.grad is not None:
        result["dX"] = x.grad
    result.update({f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: t.cpu() for name, t in result.items()}


def exact_gradients(model: fastmlp.MLP, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The formulas of the reference in float64."""
    weights = [layer.weight.detach().double() for layer in model.layers]
    biases = [None if layer.bias is None else layer.bias.detach().double() for layer in model.layers]
    x = reference.pixels(x, torch.float64).double()
    result = {"A": reference.mlp(x, weights, biases, model.activations)}
    dx, dws, dbs = reference.mlp_backward(upstream.double(), x, weights, biases, model.activations)
    result["dX"] = dx
    for i, (dw, db) in enumerate(zip(dws, dbs, strict=True)):
        result[f"d layers.{i}.weight"] = dw
        result[f"d layers.{i}.bias"] = db
    return result


def check(lane: torch.device, model: fastmlp.MLP, x: Tensor, upstream: Tensor) -> None:
    """Kernels against float64, within the budget of the torch backend's error."""
    with fastmlp.use_backend("torch"):
        own = gradients(model, x, upstream)
    with fastmlp.use_backend("triton"):
        got = gradients(model.to(lane), x.to(lane), upstream)
    exact = exact_gradients(model.to("cpu"), x, upstream)
    assert got.keys() == own.keys()
    reduction = max(x.shape[0], *model.sizes) * len(model.layers)
    for name, actual in got.items():
        assert actual.dtype == own[name].dtype
        assert_within_budget(actual, exact[name], own[name], reduction=reduction, what=name)


def upstream_of(model: fastmlp.MLP, rows: int) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(rows, model.sizes[-1], generator=g)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The launchers that ran, so that a test on kernels cannot pass without them."""
    from fastmlp import kernels

    seen: list[str] = []
    for name in ("linear_fwd", "linear_dgrad", "linear_wgrad", "activation_bwd", "network_fwd", "network_bwd"):
        original = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, _original=original, _name=name, **k: seen.append(_name) or _original(*a, **k)
        )
    return seen


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(lane, activation, dtype, launched):
    model = network(activation=[activation] * 3, dtype=dtype)
    x = images(19, 33, dtype)
    check(lane, model, x, upstream_of(model, 19).to(dtype))
    last = [] if activation == "identity" else ["activation_bwd"]
    assert launched == ["network_fwd", *last, "network_bwd"]


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_layers_of_a_large_batch_are_launched_one_by_one(lane, activation, dtype, launched, monkeypatch):
    monkeypatch.setattr("fastmlp.kernels.network.GROUPED_ROWS", 18)
    forget()
    model = network(activation=activation, dtype=dtype)
    x = images(19, 33, dtype)
    check(lane, model, x, upstream_of(model, 19).to(dtype))
    assert launched == ["network_fwd", "network_bwd", *["linear_wgrad", "linear_dgrad"] * 3]


@pytest.mark.covering
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "sizes"), [(1, (1, 1, 1)), (17, (63, 130, 1)), (130, (5, 17, 63)), (63, (130, 10))])
def test_ragged_shapes(lane, rows, sizes, dtype):
    model = network(sizes, "gelu", dtype)
    check(lane, model, images(rows, sizes[0], dtype), upstream_of(model, rows).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pixels(lane, dtype, launched):
    """A uint8 input, which has no dX since it cannot require grad."""
    model = network((50, 20, 10), "relu", dtype)
    check(lane, model, images(21, 50, torch.uint8), upstream_of(model, 21).to(dtype))
    assert launched == ["network_fwd", "network_bwd"]


def test_without_biases_and_frozen_layers(lane, launched):
    model = network(bias=False)
    model.layers[0].requires_grad_(False)
    check(lane, model, images(19, 33, torch.float32), upstream_of(model, 19))
    launched.clear()
    with fastmlp.use_backend("triton"):
        model.to(lane)(images(19, 33, torch.float32).to(lane)).sum().backward()
    # The gradient of a sum is expanded, so the layers take it one by one.
    assert launched == ["linear_fwd", "network_fwd", "network_bwd", "linear_wgrad", "linear_dgrad", "linear_wgrad"]


def test_only_a_bias_is_trained(lane):
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "layers.0.bias")
    check(lane, model, images(19, 33, torch.float32), upstream_of(model, 19))


@pytest.mark.parametrize("upstream", ["expanded", "transposed", "strided"])
@pytest.mark.parametrize("last", ["identity", "silu"])
def test_upstream_gradients_of_any_strides(lane, upstream, last):
    """The gradient of sum() and mean() is an expanded scalar, that of t() is transposed."""
    model = network(activation=["tanh", "gelu", last])
    g = torch.Generator().manual_seed(3)
    gradient = {
        "expanded": torch.full((), 0.1).expand(19, 10),
        "transposed": torch.randn(10, 19, generator=g).t(),
        "strided": torch.randn(38, 30, generator=g)[::2, ::3],
    }[upstream]
    check(lane, model, images(19, 33, torch.float32), gradient)


@pytest.mark.parametrize("layout", ["rows", "columns", "spread"])
def test_strided_and_poisoned_input(lane, layout):
    """The rows of the input lie inside NaN, and no result has a NaN."""
    model = network()
    x = poisoned(images(19, 33, torch.float32), layout=layout)
    check(lane, model, x, upstream_of(model, 19))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "gelu"])
def test_linear_act(lane, activation, needs_grad):
    """[*, K] inputs; without a gradient the same kernel runs off the tape."""
    g = torch.Generator().manual_seed(4)
    x, w, b = torch.randn(3, 5, 20, generator=g), torch.randn(7, 20, generator=g), torch.randn(7, generator=g)
    results = {}
    for backend, device, dtype in (("triton", lane, None), ("torch", "cpu", None), ("exact", "cpu", torch.float64)):
        leaves = [t.detach().to(device, dtype).requires_grad_(needs_grad) for t in (x, w, b)]
        with fastmlp.use_backend("torch" if backend == "exact" else backend):
            out = functional.linear_act(*leaves, activation)
        assert (out.grad_fn is not None) == needs_grad
        grads = torch.autograd.grad(out.square().sum(), leaves) if needs_grad else ()
        results[backend] = [t.detach().cpu() for t in (out, *grads)]
    for actual, own, exact in zip(results["triton"], results["torch"], results["exact"], strict=True):
        assert_within_budget(actual, exact, own, reduction=20 + 15)


def test_empty_batch(lane):
    model = network().to(lane)
    with fastmlp.use_backend("triton"):
        result = gradients(model, torch.zeros(0, 33, device=lane), torch.zeros(0, 10))
    assert result["A"].shape == (0, 10)
    assert result["dX"].shape == (0, 33)
    for name, p in model.named_parameters():
        assert result[f"d {name}"].shape == p.shape
        assert not result[f"d {name}"].any()


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_second_derivative(lane, activation):
    """create_graph: the first gradients are as without it, those of their norm come from torch operations."""
    results = {}
    for backend, device, dtype in (("triton", lane, None), ("torch", "cpu", None), ("exact", "cpu", torch.float64)):
        model = network((9, 6, 5), activation).to(device, dtype)
        x = images(7, 9, torch.float32).to(device, dtype).requires_grad_()
        leaves = [x, *model.parameters()]
        with fastmlp.use_backend("torch" if backend == "exact" else backend):
            value = model(x).square().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results[backend] = [t.detach().cpu() for t in (*first, *second)]
    for actual, own, exact in zip(results["triton"], results["torch"], results["exact"], strict=True):
        assert_within_budget(actual, exact, own, reduction=200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(lane, dtype):
    """float32 parameters and gradients, 16-bit kernels."""
    model = network((33, 17, 10), "gelu")
    x = images(19, 33, torch.float32)
    results = {}
    for backend, device in (("triton", lane), ("torch", torch.device("cpu"))):
        model.to(device)
        with fastmlp.use_backend(backend), torch.autocast(device.type, dtype=dtype):
            results[backend] = gradients(model, x.to(device), upstream_of(model, 19))
    rounded = network((33, 17, 10), "gelu").to(dtype).float()
    exact = exact_gradients(rounded, x.to(dtype).float(), upstream_of(model, 19).to(dtype).float())
    assert results["triton"]["A"].dtype == dtype
    for name, actual in results["triton"].items():
        own = results["torch"][name]
        assert actual.dtype == own.dtype
        assert_within_budget(actual.to(dtype), exact[name], own, reduction=60, what=name)


def test_two_runs_are_equal_bit_by_bit(lane):
    model = network().to(lane)
    x, upstream = images(130, 33, torch.float32).to(lane), upstream_of(model, 130)
    with fastmlp.use_backend("triton"):
        first, second = (gradients(model, x, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(lane, compiler, launched):
    """torch.compile keeps the kernels, as operators, in one graph with the operations around them."""
    model = network(activation=["gelu", "tanh", "sigmoid"]).to(lane)
    x, upstream = images(19, 33, torch.float32).to(lane), upstream_of(model, 19)
    before = fastmlp.get_backend()
    fastmlp.set_backend("triton")
    try:
        expected = gradients(model, x, upstream)
        launched.clear()
        got = gradients(torch.compile(model, backend=compiler, fullgraph=True), x, upstream)
    finally:
        fastmlp.set_backend(before)
    assert launched == ["linear_fwd"] * 3 + ["activation_bwd"] + ["linear_wgrad", "linear_dgrad"] * 3
    got = {name.replace("_orig_mod.", ""): t for name, t in got.items()}
    assert got.keys() == expected.keys()
    # Operators launch the weight gradients of each layer apart, with tiles of their own.
    exact = exact_gradients(model.to("cpu"), x.cpu(), upstream)
    for name, t in expected.items():
        assert torch.equal(got[name], t) or "layers" in name, name
        assert_within_budget(got[name], exact[name], t, reduction=120, what=name)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="the compiler of torch 2.11 cannot trace what use_backend sets"
)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_again_for_another_backend(lane, launched):
    """A compiled model follows use_backend and set_backend."""
    model = network((9, 6, 5)).to(lane)
    compiled = torch.compile(model, backend="eager")
    x = images(7, 9, torch.float32).to(lane)
    for choose in ("torch", "triton", "torch"):
        launched.clear()
        with fastmlp.use_backend(choose):
            compiled(x)
        assert bool(launched) == (choose == "triton")
    before = fastmlp.get_backend()
    try:
        for choose in ("triton", "torch"):
            launched.clear()
            fastmlp.set_backend(choose)
            compiled(x)
            assert bool(launched) == (choose == "triton")
    finally:
        fastmlp.set_backend(before)
