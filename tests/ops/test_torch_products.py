"""Modules and functions on a CPU: the measured library, 16 bits by way of float32, and products left to aten."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.cpu import cache, choose, onednn
from fastmlp.ops import torch_products
from tests.support.steps import fresh_choices, have_16_bit_products, needs_onednn  # noqa: F401

pytestmark = pytest.mark.usefixtures("fresh_choices", "own_nodes")

#: The products of the first two layers are large enough for a choice, the products of the last layer are not.
M, SIZES = 96, (257, 256, 200, 10)


@pytest.fixture
def onednn_calls(monkeypatch) -> list[str]:
    """The names of the products that oneDNN makes, in a mode in which oneDNN makes every product that it can."""
    calls: list[str] = []
    for name in ("linear", "wgrad"):
        original = getattr(onednn, name)
        # onednn.wgrad calls ``linear`` by name, so a product of wgrad counts once more as linear.
        monkeypatch.setattr(onednn, name, lambda *a, f=original, n=name: (calls.append(f"onednn_{n}"), f(*a))[1])
    fastmlp.set_cpu_gemm("onednn")
    return calls


def model_and_batch(
    dtype: torch.dtype = torch.float32, activation: str = "sigmoid", m: int = M
) -> tuple[fastmlp.MLP, Tensor, Tensor]:
    torch.manual_seed(3)
    model = fastmlp.MLP(SIZES, activation, dtype=dtype)
    return model, torch.randn(m, SIZES[0]).to(dtype), torch.randint(0, SIZES[-1], (m,))


def results(model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Logits and every gradient, in float64."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    torch.nn.functional.cross_entropy(logits.float() if logits.dtype.itemsize == 2 else logits, y).backward()
    assert x.grad is not None
    found = {"logits": logits.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.double() for name, t in found.items()}


def assert_within_budget(model: fastmlp.MLP, x: Tensor, y: Tensor) -> None:
    """The error against float64 is at most twice that of torch's own modules in the same dtype, plus a floor."""
    torchs = model.to_torch()
    wide = {n: t.double() for n, t in model.state_dict().items()}
    exact = fastmlp.MLP(SIZES, model.layers[0].activation, dtype=torch.float64)
    exact.load_state_dict(wide)
    ours, theirs, right = results(model, x, y), results(torchs, x, y), results(exact, x.double(), y)
    eps = torch.finfo(x.dtype).eps
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        c = right[name]
        assert (a - c).norm() <= 2 * (b - c).norm() + 4 * eps * c.norm(), name


@needs_onednn
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onednn_within_the_budget(onednn_calls, activation):
    model, x, y = model_and_batch(activation=activation)
    if activation == "step":  # to_torch does not convert it
        results(model, x, y)
    else:
        assert_within_budget(model, x, y)
    assert set(onednn_calls) == {"onednn_linear", "onednn_wgrad"}


@needs_onednn
def test_what_was_measured():
    """Each product that is large enough is measured once, and the choice is kept for later processes."""
    fastmlp.set_cpu_gemm("auto")
    model, x, y = model_and_batch()
    results(model, x, y)
    kinds = {(key[0], *key[2:4]) for key in choose.choices()}
    assert kinds == {(kind, k, n) for k, n in ((257, 256), (256, 200)) for kind in ("linear sigmoid", "dgrad", "wgrad")}
    assert cache.choices_path().is_file()
    known = choose.choices()
    results(model, x, y)
    assert choose.choices() == known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [3, M])
def test_16_bits_by_way_of_float32(monkeypatch, m, dtype):
    have_16_bit_products(monkeypatch, native=False)
    model, x, y = model_and_batch(dtype, m=m)
    assert model(x).dtype == dtype
    assert_within_budget(model, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_single_samples(dtype):
    """Outer products take one multiplication per element, and their gradients are contiguous like any others."""
    model, x, y = model_and_batch(dtype, m=1)
    assert_within_budget(model, x, y)
    spread = torch.randn(SIZES[0], 3).to(dtype)[:, :1].t()
    for row in (x, spread, x[:, :1].expand(1, SIZES[0])):
        dz = torch.randn(1, 5).to(dtype)
        dw = torch_products.wgrad(dz, row)
        assert dw.is_contiguous()
        assert torch.equal(dw, dz[0].unsqueeze(1) * row)


def test_autocast_by_way_of_float32(monkeypatch):
    have_16_bit_products(monkeypatch, native=False)
    model, x, _y = model_and_batch()
    with torch.autocast("cpu"):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def flops(model: fastmlp.MLP, x: Tensor) -> None:
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == sum(2 * M * k * n for k, n in itertools.pairwise(SIZES))


def fake(model: fastmlp.MLP, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (M, SIZES[-1])


def vmapped(model: fastmlp.MLP, x: Tensor) -> None:
    torch.testing.assert_close(torch.vmap(model)(x.unsqueeze(1)).squeeze(1), model.double()(x.double()).float())


def transposed(model: fastmlp.MLP, x: Tensor) -> None:
    fastmlp.functional.linear_act(x.t().contiguous().t(), model.layers[0].weight)


class Subclass(Tensor):
    """A tensor class of other code."""


def subclass(model: fastmlp.MLP, x: Tensor) -> None:
    fastmlp.functional.linear_act(x.as_subclass(Subclass), model.layers[0].weight)


def small(model: fastmlp.MLP, x: Tensor) -> None:
    model(x[:8])


@needs_onednn
@pytest.mark.parametrize("watch", [flops, fake, vmapped, transposed, subclass, small])
def test_left_to_aten(onednn_calls, watch: Callable[[fastmlp.MLP, Tensor], None]):
    model, x, _ = model_and_batch()
    with torch.no_grad():
        watch(model, x)
    assert onednn_calls == []


@needs_onednn
def test_expanded_gradients(onednn_calls):
    """The gradient of a sum is one number with strides of 0."""
    layer = fastmlp.Linear(256, 256)
    x = torch.randn(M, 256)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(256, 256))
    assert onednn_calls == ["onednn_linear"]


@needs_onednn
def test_inference_mode(onednn_calls):
    model, x, _ = model_and_batch()
    expected = model(x).detach()
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert onednn_calls


def test_threshold():
    """The reference network's hidden layers at 64 rows are above the threshold, its last layer is below."""
    assert 64 * 512 * 512 >= torch_products._LARGE > 64 * 512 * 10
