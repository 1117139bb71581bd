"""Dropout on the kernels through the public API: the masks of plain torch, under autograd and in a TrainStep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastmlp
from fastmlp import TrainStep, use_backend
from tests.conftest import UNSIMULATED
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SIZES, RATES, MEMBERS, ROWS = (6, 18, 17, 3), (0.3, 0.5), 2, 5


def made(activation: Any, members: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A float64 model with values that float32 has, X and class numbers."""
    torch.manual_seed(0)
    if members:
        model: Any = fastmlp.MLPEnsemble(SIZES, members, activation, dropout=RATES)
    else:
        model = fastmlp.MLP(SIZES, activation, dropout=RATES)
    return model.double(), torch.randn(ROWS, SIZES[0]).double(), torch.randint(0, SIZES[-1], (ROWS,))


def losses(model: Any, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out, y) if out.dim() == 2 else torch.stack([F.cross_entropy(each, y) for each in out])


def gradients(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """The losses of two passes, and the gradients of their sum."""
    x = x.detach().requires_grad_()
    first, second = losses(model, x, y), losses(model, x, y)
    grads = torch.autograd.grad((first + 2 * second).sum(), [x, *model.parameters()])
    return [first.detach(), second.detach(), *grads]


def stepped(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    step = TrainStep(model, lr=0.1, momentum=0.9, cuda_graph=False)
    return [step(x, y), step(x, y), *(p.detach() for p in model.parameters())]


def by_torch(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """As ``stepped``, with autograd and torch.optim."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = losses(model, x, y)
        loss.sum().backward()
        optimizer.step()
        found.append(loss.detach())
    return [*found, *(p.detach() for p in model.parameters())]


def check(device: torch.device, function: Any, oracle: Any, activation: Any, members: int = 0) -> None:
    """The kernels in float32 against plain torch in float64, from the same seed."""
    exact, x, y = made(activation, members)
    own, narrow = copy.deepcopy(exact).float(), copy.deepcopy(exact).float().to(device)
    with use_backend("torch"):
        truth, torchs = oracle(exact, x, y), oracle(own, x.float(), y)
    with use_backend("triton"):
        found = function(narrow, x.float().to(device), y.to(device))
    for i, (a, e, o) in enumerate(zip(found, truth, torchs, strict=True)):
        assert_within_budget(a.cpu(), e, o, reduction=3 * max(SIZES), magnitude=1.0, what=f"result {i}")
    assert narrow.dropout_state.tolist() == exact.dropout_state.tolist()
    assert narrow.dropout_state[1] == 2


def test_gradients_of_modules(lane, monkeypatch):
    """A pass is the launches of a network without dropout."""
    from fastmlp import kernels

    launched: list[str] = []
    for name in ("linear_fwd", "linear_dgrad", "linear_wgrad", "network_fwd", "network_bwd"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _f=original, _n=name, **k: launched.append(_n) or _f(*a, **k))
    check(lane, gradients, gradients, ("gelu", "sigmoid"))
    assert launched == ["network_fwd"] * 2 + ["network_bwd"] * 2


@UNSIMULATED
@pytest.mark.parametrize("activation", ["tanh", ("relu", "silu")], ids=str)
def test_steps(unsimulated, activation):
    """``tests/step/test_dropout_kernels.py`` has steps on the simulated GPU."""
    check(unsimulated, stepped, by_torch, activation)


@UNSIMULATED
def test_gradients_of_ensembles(unsimulated):
    check(unsimulated, gradients, gradients, "tanh", MEMBERS)


@UNSIMULATED
def test_steps_of_ensembles(unsimulated):
    check(unsimulated, stepped, by_torch, "tanh", MEMBERS)


@UNSIMULATED
def test_other_activations(unsimulated):
    """A softmax in a hidden layer ends a node of the tape; its dropout is an operation of torch."""
    check(unsimulated, gradients, gradients, ("leaky_relu", "softmax"))


@UNSIMULATED
def test_second_derivatives(unsimulated):
    """The backward pass in plain torch has the masks of the kernels."""

    def second(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        loss = losses(model, x, y) + losses(model, x, y)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return [loss.detach(), *torch.autograd.grad(first.square().sum(), [x, *model.parameters()], allow_unused=True)]

    def without_none(*arguments: Any) -> list[Tensor]:
        return [t for t in second(*arguments) if t is not None]

    check(unsimulated, without_none, without_none, "tanh")


@UNSIMULATED
def test_a_frozen_layer_below_drops(unsimulated):
    def frozen(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        model.layers[0].requires_grad_(False)
        loss = losses(model, x, y) + losses(model, x, y)
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    check(unsimulated, frozen, frozen, "tanh")


@UNSIMULATED
@pytest.mark.parametrize("members", [0, MEMBERS])
def test_compiled_and_exported(unsimulated, members):
    """As operators of torch, with the same masks."""

    def compiled(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
        first, second = losses(call, x, y), losses(call, x, y)
        grads = torch.autograd.grad((first + 2 * second).sum(), list(model.parameters()))
        return [first.detach(), second.detach(), *grads]

    def eager(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        first, second, _, *grads = gradients(model, x, y)
        return [first, second, *grads]

    check(unsimulated, compiled, eager, "tanh", members)

    def exported(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        program = torch.export.export(model, (x,)).module()
        outputs = [program(x).detach(), program(x).detach()]
        model.dropout_state.copy_(program.dropout_state)
        return outputs

    check(unsimulated, exported, lambda model, x, y: [model(x).detach(), model(x).detach()], "tanh", members)


@UNSIMULATED
def test_evaluation_mode_is_a_model_without_dropout(unsimulated):
    model, x, y = made("tanh")
    model = model.float().to(unsimulated)
    plain = copy.deepcopy(model)
    plain.dropout = 0.0
    x, y = x.float().to(unsimulated), y.to(unsimulated)
    with use_backend("triton"):
        assert torch.equal(model.eval()(x), plain(x))
        for ours, theirs in zip(stepped(model, x, y), stepped(plain, x, y), strict=True):
            assert torch.equal(ours, theirs)
    assert model.dropout_state[1] == 0
