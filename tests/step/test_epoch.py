"""TrainStep.epoch: one pass over data on the device equals the single steps, and leaves their losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp.base.arguments import readable_rows
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.step import cpu_step
from tests.support.steps import (
    Reference,
    converted,
    flat,
    network,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
ROWS = 70


def data(dtype: torch.dtype | None = torch.float64, loss: str = "cross_entropy") -> tuple[Tensor, Tensor]:
    """(images, labels); uint8 pixels where dtype is None."""
    x, y = problem(SIZES, ROWS, uint8=dtype is None, loss=loss)
    return (x if dtype is None else x.to(dtype)), y


def steps_of(order: Tensor, batch_size: int, images: Tensor, labels: Tensor):
    return [(images[rows], labels[rows]) for rows in order.split(batch_size)]


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "clipping"])
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("batch_size", [1, 2, 16, 35, 70, 100])
def test_an_epoch_is_its_steps(batch_size, uint8, name):
    """Batch sizes that divide the data, that leave a smaller last batch, and one larger than the data."""
    images, labels = data(None if uint8 else torch.float64)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    expected = Reference(network(SIZES), OPTIMIZERS[name]).train(steps_of(order, batch_size, images, labels))
    model = network(SIZES)
    step = fastmlp.TrainStep(model, **OPTIMIZERS[name])
    mean = step.epoch(images, labels, batch_size, order)
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()
    losses = torch.tensor(expected.losses, dtype=torch.float64)
    torch.testing.assert_close(step.losses, losses, rtol=1e-9, atol=1e-12)
    sizes = torch.tensor([len(rows) for rows in order.split(batch_size)])
    wanted = (losses * sizes).sum() / ROWS
    assert mean.dtype == torch.float32
    assert mean.shape == ()
    assert mean.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("loss", list(STEP_LOSSES)[1:])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_every_loss(batch_size, loss):
    images, labels = data(loss=loss)
    order = torch.arange(ROWS).flip(0)
    expected = Reference(network(SIZES), OPTIMIZERS["sgd"], loss).train(steps_of(order, batch_size, images, labels))
    model = network(SIZES)
    fastmlp.TrainStep(model, loss=loss, **OPTIMIZERS["sgd"]).epoch(images, labels, batch_size, order)
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", ["uint8", "float32", "compute"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_every_dtype_bitwise(batch_size, source, dtype):
    """An epoch equals single steps over the same rows; in float32 batches of 1 take another order of sums."""
    images, labels = data({"uint8": None, "float32": torch.float32, "compute": dtype}[source])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    models = [converted(network(SIZES), torch.float32) for _ in range(2)]
    whole, single = (fastmlp.TrainStep(m, lr=0.2, momentum=0.5, dtype=dtype) for m in models)
    whole.epoch(images, labels, batch_size, order)
    losses = [single(x, y).clone() for x, y in steps_of(order, batch_size, images, labels)]
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert torch.equal(whole.losses, torch.stack(losses))


class TestBatchesOfOne:
    """Plain SGD with cross-entropy on single rows takes the blocked recurrence; all other cases go step by step."""

    @staticmethod
    def run(monkeypatch, model, **settings):
        """(times the recurrence ran, parameters after an epoch)."""
        calls = []
        real = cpu_step.online_epoch
        monkeypatch.setattr(cpu_step, "online_epoch", lambda *a, **k: (calls.append(1), real(*a, **k)))
        images, labels = data(settings.pop("images", torch.float64), settings.get("loss", "cross_entropy"))
        fastmlp.TrainStep(model, **settings).epoch(images, labels, 1)
        return len(calls), flat(model)

    @pytest.mark.parametrize("images", [None, torch.float64], ids=["uint8", "float"])
    @pytest.mark.parametrize("bias", [True, False])
    def test_taken(self, monkeypatch, bias, images):
        model = network(SIZES, "tanh", bias=bias)
        rows = [(x[None], y[None]) for x, y in zip(*data(images), strict=True)]
        expected = Reference(model, {"lr": 0.1}).train(rows)
        count, result = self.run(monkeypatch, model, lr=0.1, images=images)
        assert count == 1
        assert (result - expected.flat()).norm() <= 1e-10 * expected.flat().norm()

    @pytest.mark.parametrize(
        "settings",
        [
            {"momentum": 0.9},
            {"weight_decay": 0.1},
            {"max_grad_norm": 1.0},
            {"optimizer": "adamw"},
            {"loss": "softmax_squared_error"},
            {"loss": "mse"},
            {"dtype": torch.float32},
            {"dtype": torch.bfloat16},
        ],
        ids=str,
    )
    def test_not_taken(self, monkeypatch, settings):
        count, result = self.run(monkeypatch, network(SIZES), lr=0.01, **settings)
        assert count == 0
        assert result.isfinite().all()

    def test_not_taken_with_frozen_parameters(self, monkeypatch):
        model = network(SIZES)
        model.layers[1].weight.requires_grad_(False)
        before = model.layers[1].weight.clone()
        assert self.run(monkeypatch, model, lr=0.1)[0] == 0
        assert torch.equal(model.layers[1].weight, before)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_order_may_leave_out_and_repeat_rows(batch_size):
    images, labels = data()
    order = torch.tensor([3, 69, 3, 3, 0, 12, 69, 1, 2] * 3)
    expected = Reference(network(SIZES), {"lr": 0.1}).train(steps_of(order, batch_size, images, labels))
    model = network(SIZES)
    fastmlp.TrainStep(model, lr=0.1).epoch(images, labels, batch_size, order)
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()


def test_without_an_order_the_rows_come_in_turn():
    models = [network(SIZES), network(SIZES)]
    fastmlp.TrainStep(models[0], lr=0.1).epoch(*data(), 16)
    fastmlp.TrainStep(models[1], lr=0.1).epoch(*data(), 16, torch.arange(ROWS))
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_one_factor_of_the_learning_rate_for_each_step(batch_size, name):
    images, labels = data()
    order = torch.arange(ROWS)
    parts = steps_of(order, batch_size, images, labels)
    factors = [1 / (1 + i) for i in range(len(parts))]
    reference = Reference(network(SIZES), OPTIMIZERS[name])
    lr = OPTIMIZERS[name]["lr"]
    for batch, factor in zip(parts, factors, strict=True):
        reference.optimizer.param_groups[0]["lr"] = lr * factor
        reference.train([batch])
    model = network(SIZES)
    step = fastmlp.TrainStep(model, **OPTIMIZERS[name])
    step.epoch(images, labels, batch_size, order, factors)
    assert (flat(model) - reference.flat()).norm() <= 1e-10 * reference.flat().norm()
    assert step.lr == lr


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_epochs_follow_each_other(name):
    """The optimizer's state goes on from epoch to epoch and to single steps."""
    images, labels = data()
    orders = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    parts = [batch for order in orders for batch in steps_of(order, 16, images, labels)]
    expected = Reference(network(SIZES), OPTIMIZERS[name]).train([*parts, (images, labels)])
    model = network(SIZES)
    step = fastmlp.TrainStep(model, **OPTIMIZERS[name])
    for order in orders:
        step.epoch(images, labels, 16, order)
    step(images, labels)
    assert (flat(model) - expected.flat()).norm() <= 1e-10 * expected.flat().norm()


def test_two_epochs_are_bitwise_equal():
    images, labels = data(None)
    for batch_size in (1, 16):
        models = [converted(network(SIZES), torch.float32) for _ in range(2)]
        means = [fastmlp.TrainStep(m, lr=0.1).epoch(images, labels, batch_size) for m in models]
        assert torch.equal(flat(models[0]), flat(models[1]))
        assert torch.equal(*means)


def test_images_of_several_dimensions():
    images, labels = problem((12, 3), 40, uint8=True)
    models = [network((12, 7, 3)) for _ in range(2)]
    fastmlp.TrainStep(models[0], lr=0.1).epoch(images, labels, 16)
    fastmlp.TrainStep(models[1], lr=0.1).epoch(images.view(40, 1, 4, 3), labels, 16)
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_the_data_stays_as_it_is():
    images, labels = data()
    before = images.clone(), labels.clone()
    fastmlp.TrainStep(network(SIZES, "relu"), lr=0.1).epoch(images, labels, 16)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize("batch_size", [1, 16])
def test_no_rows(batch_size):
    images, labels = data()
    model = network(SIZES)
    step = fastmlp.TrainStep(model, lr=0.1)
    assert step.epoch(images, labels, batch_size, torch.empty(0, dtype=torch.int64)).isnan()
    assert step.epoch(images[:0], labels[:0], batch_size).isnan()
    assert step.losses.shape == (0,)
    assert torch.equal(flat(model), flat(network(SIZES)))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_step_whose_loss_is_nan_can_be_named(batch_size):
    """With a NaN pixel, the first NaN of ``losses`` is at the step that read the pixel, and the mean is NaN."""
    images, labels = data()
    images[37, 4] = math.nan
    step = fastmlp.TrainStep(network(SIZES), lr=0.1)
    assert step.epoch(images, labels, batch_size).isnan()
    assert step.losses.isnan().nonzero()[0].item() == 37 // batch_size


def test_the_learning_rate_survives_an_epoch_that_fails(monkeypatch):
    images, labels = data()
    step = fastmlp.TrainStep(network(SIZES), lr=0.1)
    monkeypatch.setattr(step._engine, "step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.epoch(images, labels, 16, lr_factors=[0.5] * 5)
    assert step.lr == 0.1


@pytest.mark.parametrize(
    ("order", "readable", "outside"),
    [
        ([0, 1, 2, 3, 9], [0, 1, 2, 3, 9], [False, False, False]),
        ([0, -1, 2, 3, 10], [0, 0, 2, 3, 9], [True, False, True]),
        ([2**62, 1], [9, 1], [True]),
    ],
)
def test_rows_out_of_range_where_nothing_may_wait(order, readable, outside):
    """A GPU gets rows that it can read, and a mark on each step that had other rows."""
    rows, bad = readable_rows(torch.tensor(order), 10, 2)
    assert rows.tolist() == readable
    assert bad.tolist() == outside
