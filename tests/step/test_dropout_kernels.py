"""TritonStep with dropout against autograd in float64, with the masks that the reference makes of seed and step."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmlp import reference
from fastmlp.reference.dropout import keep_mask
from fastmlp.step.cpu_dropout import StepDropout
from fastmlp.step.optimizers import SGD, AdamW
from fastmlp.step.triton_step import TritonStep
from tests.conftest import UNSIMULATED
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

E, M, SIZES = 2, 7, (6, 20, 18, 4)
SEED, RATES = 1234567, (0.3, 0.5)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(
    lane: torch.device | str, dtype: torch.dtype, activation: str, *, members: int | None = None, frozen: int = 0
) -> list[Any]:
    made: list[Any] = []
    of = () if members is None else (members,)
    for i, (k, n) in enumerate(itertools.pairwise(SIZES)):
        weight, bias = (draw(*of, n, k, seed=i) * 1.5 / k**0.5), draw(*of, n, seed=i + 9)
        weight, bias = (t.to(lane, dtype).requires_grad_(i >= frozen) for t in (weight, bias))
        f = activation if i < len(SIZES) - 2 else "identity"
        made.append(SimpleNamespace(weight=weight, bias=bias, activation=f))
    return made


def batch(loss: str, seed: int) -> tuple[Tensor, Tensor]:
    x = draw(M, SIZES[0], seed=seed)
    if loss == "cross_entropy":
        return x, torch.randint(0, SIZES[-1], (M,), generator=torch.Generator().manual_seed(seed))
    return x, draw(M, SIZES[-1], seed=seed + 1).sigmoid()


def backward(made: list[Any], x: Tensor, y: Tensor, loss: str, step: int, member: int = 0) -> Tensor:
    """The loss of a forward pass with dropout, whose gradients are added to those of the parameters."""
    dtype = made[0].weight.dtype
    a = x.to(dtype)
    for i, layer in enumerate(made):
        z = F.linear(a, layer.weight, layer.bias)
        a = reference.activate(z, layer.activation)
        if i < len(RATES) and RATES[i]:
            keep = keep_mask(SEED, step, i, (member + 1) * len(x), z.shape[1], RATES[i])[member * len(x) :]
            a = a * (keep.to(dtype) / (1 - RATES[i]))
    value = F.cross_entropy(a, y) if loss == "cross_entropy" else F.mse_loss(a, y.to(dtype))
    value.backward()
    return value.detach()


def parameters(made: list[Any]) -> list[Tensor]:
    return [t for layer in made for t in (layer.weight, layer.bias) if t.requires_grad]


def by_autograd(
    made: list[Any], batches: list[tuple[Tensor, Tensor]], loss: str, lr: float, first: int = 0, member: int = 0
) -> list[Tensor]:
    """[loss, parameter, ...] after a step of SGD per batch."""
    value = torch.zeros(())
    for i, (x, y) in enumerate(batches):
        value = backward(made, x, y, loss, first + i, member)
        with torch.no_grad():
            for p in parameters(made):
                p -= lr * p.grad
                p.grad = None
    return [value, *(p.detach() for p in parameters(made))]


def check(actual: list[Tensor], exact: list[Tensor], own: list[Tensor]) -> None:
    for i, (a, e, o) in enumerate(zip(actual, exact, own, strict=True)):
        assert_within_budget(a.detach().cpu(), e, o, reduction=3 * max(SIZES), magnitude=1.0, what=f"result {i}")


def state(lane: torch.device, step: int = 0) -> Tensor:
    return torch.tensor([SEED, step]).to(lane)


@pytest.mark.parametrize(
    ("loss", "activation", "frozen"),
    [("cross_entropy", "sigmoid", 0), ("cross_entropy", "gelu", 1), ("mse", "relu", 0), ("mse", "tanh", 1)],
)
def test_steps_are_those_of_autograd(lane, loss, activation, frozen):
    """Each step has the next number; a frozen layer drops too."""
    made = layers(lane, torch.float32, activation, frozen=frozen)
    engine, given = TritonStep(made, SGD(0.1), loss, torch.float32, cuda_graph=False), state(lane, 5)
    engine.dropout = StepDropout(given, RATES)
    batches = [batch(loss, seed) for seed in range(2)]
    out = torch.zeros((), device=lane)
    for x, y in batches:
        engine.step(x.to(lane), y.to(lane), out)
    assert given.tolist() == [SEED, 7]
    exact, own = (
        by_autograd(layers("cpu", dtype, activation, frozen=frozen), batches, loss, 0.1, 5)
        for dtype in (torch.float64, torch.float32)
    )
    check([out, *parameters(made)], exact, own)


@UNSIMULATED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(unsimulated, dtype):
    """float16 has a loss scale, whose update comes later; what the number counts are forward passes."""
    made = layers(unsimulated, dtype, "tanh")
    engine, given = TritonStep(made, SGD(0.1), "cross_entropy", dtype, cuda_graph=False), state(unsimulated)
    engine.dropout = StepDropout(given, RATES)
    batches, out = [batch("cross_entropy", seed) for seed in range(2)], torch.zeros((), device=unsimulated)
    for x, y in batches:
        engine.step(x.to(unsimulated, dtype), y.to(unsimulated), out)
    if engine.loss_scale is not None:  # a step that is skipped has had its number
        with torch.no_grad():
            before = [p.clone() for p in parameters(made)]
        infinite = torch.full((M, SIZES[0]), float("inf"), dtype=dtype, device=unsimulated)
        engine.step(infinite, batches[0][1].to(unsimulated), torch.zeros((), device=unsimulated))
        assert all(torch.equal(p, b) for p, b in zip(parameters(made), before, strict=True))
    assert given.tolist() == [SEED, 2 + (engine.loss_scale is not None)]
    exact, own = (by_autograd(layers("cpu", d, "tanh"), batches, "cross_entropy", 0.1) for d in (torch.float64, dtype))
    check([out.to(dtype), *parameters(made)], exact, own)


@UNSIMULATED
def test_an_epoch_is_its_steps(unsimulated):
    """The numbers belong to rows of the batch; the last batch is shorter."""
    made = layers(unsimulated, torch.float32, "sigmoid")
    engine, given = TritonStep(made, SGD(0.1), "cross_entropy", torch.float32, cuda_graph=False), state(unsimulated)
    engine.dropout = StepDropout(given, RATES)
    x, y = draw(M, SIZES[0], seed=1), torch.arange(M) % SIZES[-1]
    order, losses = torch.tensor([3, 1, 6, 2, 0]), torch.zeros(2, device=unsimulated)
    rates = torch.full((2,), 0.1, dtype=torch.float64)
    engine.epoch(*(t.to(unsimulated) for t in (x, y)), 3, order.to(unsimulated), rates, losses)
    assert given.tolist() == [SEED, 2]
    batches = [(x[rows], y[rows]) for rows in order.split(3)]
    exact, own = (
        by_autograd(layers("cpu", dtype, "sigmoid"), batches, "cross_entropy", 0.1)
        for dtype in (torch.float64, torch.float32)
    )
    check([losses[-1], *parameters(made)], exact, own)


@UNSIMULATED
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_accumulated_gradients(unsimulated, loss):
    """Each forward pass has a number of its own, and the update has none."""
    made = layers(unsimulated, torch.float32, "relu")
    engine, given = TritonStep(made, AdamW(0.01), loss, torch.float32, cuda_graph=False), state(unsimulated)
    engine.dropout = StepDropout(given, RATES)
    batches, out = [batch(loss, seed) for seed in range(2)], torch.zeros((), device=unsimulated)
    for i, (x, y) in enumerate(batches):
        grads = engine.gradients(x.to(unsimulated), y.to(unsimulated), out, accumulate=i > 0)
        assert given.tolist() == [SEED, i + 1]
    results = []
    for dtype in (torch.float64, torch.float32):
        copied = layers("cpu", dtype, "relu")
        for i, (x, y) in enumerate(batches):
            value = backward(copied, x, y, loss, i)
        results.append([value, *(p.grad for p in parameters(copied))])
    check([out, *grads], *results)
    engine.update()
    assert given.tolist() == [SEED, 2]


@UNSIMULATED
def test_members_drop_different_elements(unsimulated):
    """Also while the first of them pauses."""
    made = layers(unsimulated, torch.float32, "sigmoid", members=E)
    active = torch.ones(E, dtype=torch.bool, device=unsimulated)
    engine = TritonStep(made, SGD(0.1), "cross_entropy", torch.float32, cuda_graph=False, members=E, active=active)
    given, out = state(unsimulated), torch.zeros(E, device=unsimulated)
    engine.dropout = StepDropout(given, RATES)
    batches = [batch("cross_entropy", seed) for seed in range(2)]
    for x, y in batches:
        engine.step(x.to(unsimulated), y.to(unsimulated), out)
        active[0] = False
    assert given.tolist() == [SEED, 2]
    for e in range(E):
        results = []
        for dtype in (torch.float64, torch.float32):
            copied = layers("cpu", dtype, "sigmoid", members=E)
            for layer in copied:
                layer.weight, layer.bias = (t.detach()[e].clone().requires_grad_() for t in (layer.weight, layer.bias))
            results.append(by_autograd(copied, batches[: 1 + e], "cross_entropy", 0.1, member=e)[1:])
        check([p[e] for p in parameters(made)], *results)


@UNSIMULATED
def test_rates_of_0_drop_nothing(unsimulated):
    """Bit for bit, and ``dropout`` may be taken away between two steps."""
    results = []
    for drops in (False, True):
        made, out = layers(unsimulated, torch.float32, "sigmoid"), torch.zeros((), device=unsimulated)
        engine, given = TritonStep(made, SGD(0.1), "mse", torch.float32, cuda_graph=False), state(unsimulated)
        for seed in range(2):
            engine.dropout = StepDropout(given, (0.0, 0.0)) if drops and seed == 0 else None
            engine.step(*(t.to(unsimulated) for t in batch("mse", seed)), out)
        results.append([out, *parameters(made)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
