"""What each of four processes of ``test_data_parallel`` checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastmlp
from fastmlp import TrainStep, reference, use_backend
from tests.support.harness import assert_within_budget

SIZES = (7, 9, 5)
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.01, "optimizer": "adamw", "max_grad_norm": 0.5},
)


def problem(rows: int, dtype: torch.dtype = torch.float32) -> tuple[fastmlp.MLP, Tensor, Tensor]:
    """The same model and batch in every process."""
    torch.manual_seed(0)
    model = fastmlp.MLP(SIZES, "tanh", dtype=dtype)
    return model, torch.randn(rows, SIZES[0], dtype=dtype), torch.randint(0, SIZES[-1], (rows,))


def oracle(model: fastmlp.MLP, **settings: Any) -> TrainStep:
    """The step of a model in float64, which the kernels do not compute in."""
    with use_backend("torch"):
        return TrainStep(model, **settings)


def compare(model: fastmlp.MLP, alone: fastmlp.MLP, exact: fastmlp.MLP, rows: int) -> None:
    """The parameters within the error budget of one process's; and bit by bit the same in all processes."""
    for p, own, truth in zip(model.parameters(), alone.parameters(), exact.parameters(), strict=True):
        assert_within_budget(p.detach(), truth.detach(), own.detach(), reduction=rows)
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p)


def train(part: Callable[[int], slice], rows: int, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    """Three steps of all processes, each with its part of the batch, and of one process with the whole batch."""
    model, x, y = problem(rows, dtype)
    alone, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    rank, own = dist.get_rank(), part(dist.get_rank())
    if rank:  # the first process's parameters count
        with torch.no_grad():
            model.layers[0].weight.zero_()
    step = TrainStep(model, **settings, process_group=dist.group.WORLD)
    whole, truth = TrainStep(alone, **settings), oracle(exact, **settings)
    for _ in range(3):
        losses = step(x[own], y[own]), truth(x.double(), y), whole(x, y)
    assert_within_budget(*losses, reduction=rows)
    compare(model, alone, exact, rows)


def steps(rank: int, pair: Any) -> None:
    for settings in OPTIMIZERS:
        train(lambda rank: slice(rank * 4, rank * 4 + 4), 16, **settings)


def unequal_parts(rank: int, pair: Any) -> None:
    ends = (0, 1, 6, 8, 13)
    for settings in OPTIMIZERS[1:]:
        train(lambda rank: slice(ends[rank], ends[rank + 1]), 13, **settings)
    model, x, y = problem(6)  # a group of two
    if rank < 2:
        alone = copy.deepcopy(model)
        step, whole = TrainStep(model, lr=0.1, process_group=pair), TrainStep(alone, lr=0.1)
        for _ in range(3):
            loss, expected = step(x[rank::2], y[rank::2]), whole(x, y)
        torch.testing.assert_close(loss, expected)
        for p, own in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, own)


def weights(rank: int, pair: Any) -> None:
    """Class weights, sample weights and ignored labels, by whose sum the mean over all processes divides."""
    model, x, y = problem(16)
    y[[0, 1, 2, 3, 9]] = -100  # all rows of the first process
    options: dict[str, Any] = {"lr": 0.1, "class_weight": torch.arange(1.0, SIZES[-1] + 1), "label_smoothing": 0.1}
    weight, own = torch.rand(16) + 0.1, slice(rank * 4, rank * 4 + 4)
    for given, settings in ((weight, {"lr": 0.1}), (weight, options), (None, options), (None, {"lr": 0.1})):
        settings |= {"ignore_index": -100}
        several, alone, exact = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model).double()
        step, whole = TrainStep(several, process_group=dist.group.WORLD, **settings), TrainStep(alone, **settings)
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in settings.items()}
        truth = oracle(exact, **wide)
        for _ in range(2):
            loss = step(x[own], y[own], None if given is None else given[own])
            expected = truth(x.double(), y, given), whole(x, y, given)
        assert_within_budget(loss, *expected, reduction=16)
        compare(several, alone, exact, 16)


def epochs(rank: int, pair: Any) -> None:
    """Process p takes every fourth row; the last step is a smaller one."""
    model, x, y = problem(40)
    alone, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    step = TrainStep(model, lr=0.2, process_group=dist.group.WORLD)
    found = step.epoch(x, y, 3, order=torch.arange(rank, 40, 4), lr_factors=[1.0, 0.5, 1.0, 2.0])
    whole, truth = TrainStep(alone, lr=0.2), oracle(exact, lr=0.2)
    order = torch.cat([part.T.flatten() for part in torch.arange(40).view(10, 4).T.split(3, 1)])
    expected = [s.epoch(t, y, 12, order, [1.0, 0.5, 1.0, 2.0]) for s, t in ((truth, x.double()), (whole, x))]
    assert_within_budget(found, expected[0].double(), expected[1], reduction=40)
    assert_within_budget(step.losses, truth.losses, whole.losses, reduction=12)
    compare(model, alone, exact, 40)
    with pytest.raises(RuntimeError, match=r"differ in their number of steps.* rows in steps of 2"):
        step.epoch(x, y, 2, order=torch.arange(3 + 2 * (rank == 1)))


def gradients(rank: int, pair: Any) -> None:
    model, x, y = problem(24)
    alone, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    step = TrainStep(model, **OPTIMIZERS[2], process_group=dist.group.WORLD)
    whole, truth = TrainStep(alone, **OPTIMIZERS[2]), oracle(exact, **OPTIMIZERS[2])
    for half in (slice(0, 12), slice(12, 24)):
        own = slice(half.start + 3 * rank, half.start + 3 * rank + 3)
        found = step.gradients(x[own], y[own], accumulate=half.start > 0)
        expected = whole.gradients(x[half], y[half], accumulate=half.start > 0)
        exactly = truth.gradients(x[half].double(), y[half], accumulate=half.start > 0)
    for name, grad in found.items():
        assert_within_budget(grad, exactly[name], expected[name], reduction=24)
    for each in (step, whole, truth):
        each.update()
    compare(model, alone, exact, 24)


def overflow(rank: int, pair: Any) -> None:
    """A gradient that overflows in one process skips the step of all."""
    model, x, y = problem(16)
    step = TrainStep(model, lr=0.1, dtype=torch.float16, process_group=dist.group.WORLD)
    before, own = [p.clone() for p in model.parameters()], slice(rank * 4, rank * 4 + 4)
    step(x[own] * (6e4 if rank == 2 else 1.0), y[own])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert step.state_dict()["loss_scale"] == 2.0**14
    step(x[own], y[own])
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def dtypes(rank: int, pair: Any) -> None:
    part = lambda rank: slice(rank * 4, rank * 4 + 4)  # noqa: E731
    train(part, 16, torch.float64, lr=0.1)
    train(part, 16, lr=0.1, loss="softmax_squared_error")


def frozen(rank: int, pair: Any) -> None:
    """Frozen parameters are the first process's too."""
    torch.manual_seed(rank)
    model = fastmlp.MLP(SIZES)
    model.layers[0].requires_grad_(False)
    TrainStep(model, process_group=dist.group.WORLD)
    for p in model.parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p)


def dropout(rank: int, pair: Any) -> None:
    """The seed is the first process's, and each process has masks of its own."""
    model, x, y = problem(16)
    torch.manual_seed(rank)
    model.dropout = 0.5
    step = TrainStep(model, lr=0.1, process_group=dist.group.WORLD)
    state = model.dropout_state.tolist()
    truth, one = copy.deepcopy(model).double(), slice(rank * 4, rank * 4 + 4)
    for passes in range(2):
        expected = []
        for process in range(4):
            own = slice(process * 4, process * 4 + 4)
            keep = reference.keep_mask(state[0], passes, 0, 4, SIZES[1], 0.5, process)
            (w, b, w2, b2), linear = truth.parameters(), torch.nn.functional.linear
            hidden = torch.tanh(linear(x[own].double(), w, b)) * keep * 2
            expected.append(torch.nn.functional.cross_entropy(linear(hidden, w2, b2), y[own]))
        loss = torch.stack(expected).mean()
        grads = torch.autograd.grad(loss, list(truth.parameters()))
        with torch.no_grad():
            for p, grad in zip(truth.parameters(), grads, strict=True):
                p -= 0.1 * grad
        torch.testing.assert_close(step(x[one], y[one]).double(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert model.dropout_state.tolist() == [state[0], 2]
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)
    model.dropout = 0.1 * (1 + rank)
    with pytest.raises(RuntimeError, match="differ in their model and settings"):
        TrainStep(model, process_group=dist.group.WORLD)


def train_members(count: int, rows: int = 8, **settings: Any) -> None:
    """Weighted steps, an accumulated gradient and an epoch of ensembles; a member pauses in all processes."""
    torch.manual_seed(0)
    model = fastmlp.MLPEnsemble(SIZES, count, "tanh")
    x, y = torch.randn(rows, SIZES[0]), torch.randint(0, SIZES[-1], (count, rows))
    weight = torch.rand(count, rows) + 0.1
    alone, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    rank = dist.get_rank()
    own = slice(rank * rows // 4, (rank + 1) * rows // 4)
    step, whole = TrainStep(model, **settings, process_group=dist.group.WORLD), TrainStep(alone, **settings)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in settings.items()}
    truth = oracle(exact, **wide)
    steps = (step, x[own], y[:, own], weight[:, own]), (truth, x.double(), y, weight), (whole, x, y, weight)
    for one, xs, ys, _ in steps:
        one(xs, ys)
        one.active[-1] = count == 1
    losses = [one(xs, ys, ws)[: max(1, count - 1)] for one, xs, ys, ws in steps]
    assert_within_budget(*losses, reduction=rows)
    for one, xs, ys, ws in steps:
        one.gradients(xs, ys)
        grads = one.gradients(xs, ys, accumulate=True, sample_weight=ws)
        assert count == 1 or not any(grad[-1].any() for grad in grads.values())
        one.update()
        one.active = [True] * count
        one.epoch(xs, ys, len(xs), sample_weight=ws)
    compare(model, alone, exact, rows)


def ensembles(rank: int, pair: Any) -> None:
    options: dict[str, Any] = {"class_weight": torch.arange(1.0, SIZES[-1] + 1), "label_smoothing": 0.1}
    train_members(3, lr=[0.1, 0.05, 0.2], **options)
    train_members(2, optimizer="adamw", lr=0.01, max_grad_norm=0.5)
    train_members(1, lr=0.1, momentum=0.9, ignore_index=-100)


def small_ensembles(rank: int, pair: Any) -> None:
    train_members(2, 4, lr=[0.1, 0.05], momentum=0.9, label_smoothing=0.1)


def differences(rank: int, pair: Any) -> None:
    model, _, _ = problem(1)
    with pytest.raises(RuntimeError, match="differ in their model and settings"):
        TrainStep(model, lr=0.1 * (1 + rank), process_group=dist.group.WORLD)


def nothing_counts(rank: int, pair: dist.ProcessGroup) -> None:
    """Labels that are all ignored: the loss is NaN and nothing changes, as in one process."""
    model, x, _ = problem(8)
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainStep(model, lr=0.1, process_group=dist.group.WORLD, ignore_index=-100)
    assert step(x[2 * rank : 2 * rank + 2], torch.full((2,), -100)).isnan()
    for p, was in zip(model.parameters(), before, strict=True):
        assert_within_budget(p.detach(), was.double(), was, reduction=1)


_ALL = (
    differences,
    nothing_counts,
    steps,
    unequal_parts,
    weights,
    epochs,
    gradients,
    overflow,
    dtypes,
    frozen,
    dropout,
    ensembles,
    small_ensembles,
)
CHECKS = {f.__name__: f for f in _ALL}
