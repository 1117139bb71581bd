"""Data and training on GPUs: fit, evaluate, both engines, the data set's way to the device, checkpoints."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastmlp
from fastmlp import data, use_backend
from fastmlp.train import evaluate, fit
from fastmlp.train.engines import ENGINES
from tests.placement.test_step import ROWS, SIZES, batch

pytestmark = pytest.mark.placement


def dataset(device, rows=3 * ROWS + 5):
    images, labels = batch(device, torch.uint8, rows)
    return data.ImageDataset(images, labels, "drawn", "train", "nowhere", tuple("abcde"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_fit(machine, name, engine, dtype):
    model = fastmlp.MLP(SIZES, device="cuda:1", dtype=dtype)
    with use_backend(name):
        history = fit(
            model, dataset("cuda:1"), dataset("cuda:1"), epochs=2, batch_size=ROWS, lr=0.1, momentum=0.9, engine=engine
        )
        loss, accuracy = evaluate(model, dataset("cuda:1"), batch_size=ROWS)
    assert len(history.epochs) == 2
    assert isinstance(loss, float)
    assert isinstance(accuracy, float)
    names = {launch.name for launch in machine.launches}
    assert ("_linear_fwd_kernel" in names) == (name == "auto" and dtype != torch.float64)
    assert name == "auto" or not names
    assert {launch.device for launch in machine.launches} <= {1}
    assert machine.current == 0


@pytest.mark.parametrize("loss", ["cross_entropy", "huber"])
def test_fit_of_a_table_with_a_held_out_share(machine, loss):
    x, y = torch.randn(3 * ROWS, SIZES[0], device="cuda:1"), torch.rand(3 * ROWS, SIZES[-1], device="cuda:1")
    scale = data.Standardization.of(x)
    table = data.Table(scale(x, torch.float32), dataset("cuda:1", 3 * ROWS).labels, "drawn", "train", "nowhere")
    if loss != "cross_entropy":
        table = dataclasses.replace(table, y=y)
    model = fastmlp.MLP(SIZES, device="cuda:1")
    rows = torch.arange(ROWS)
    for validation in (0.25, table.rows(rows, "validation")):
        history = fit(model, table, table, validation=validation, loss=loss, epochs=2, batch_size=ROWS, lr=0.1)
        assert history.best.test_loss is not None
    assert {launch.device for launch in machine.launches} == {1}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_does_not_wait(machine, engine):
    model = fastmlp.MLP(SIZES, device="cuda:1")
    runner = ENGINES[engine](model, lr=0.1, momentum=0.9, nesterov=True)
    drawn = dataset("cuda:1")
    order = torch.randperm(len(drawn), device="cuda:1")
    for _ in range(3):
        with machine.hot("cuda:1", host=True):
            runner.epoch(drawn.images, drawn.labels, ROWS, order, [1.0, 0.9, 0.8, 0.7])


def test_other_modules_train_by_autograd(machine):
    model = torch.nn.Sequential(fastmlp.Linear(20, 17, activation="relu", device="cuda:1"), torch.nn.ReLU())
    model.append(fastmlp.Linear(17, 5, device="cuda:1"))
    fit(model, dataset("cuda:1"), epochs=1, batch_size=ROWS, lr=0.1)
    assert {launch.device for launch in machine.launches} == {1}


def test_data_and_model_on_two_devices_are_an_error(machine):
    model = fastmlp.MLP(SIZES, device="cuda:1")
    for device in ("cuda:0", "cpu"):
        with pytest.raises(RuntimeError, match="same device"):
            fit(model, dataset(device), epochs=1, lr=0.1)
    with pytest.raises(ValueError, match="one device"):
        data.ImageDataset(*batch("cuda:0", torch.uint8)[:1], torch.zeros(ROWS, dtype=torch.int64), "a", "b", "c", ())


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)], ids=str)
def test_the_data_set_goes_to_the_device(machine, device):
    train, test = fastmlp.load_fashion_mnist(device=device, source="bundled")
    expected = torch.device("cuda", torch.device(device).index or 0)
    for part in (train, test):
        assert (part.images.device, part.labels.device) == (expected, expected)
        assert part.to(device).images is part.images
    model = fastmlp.MLP((784, 32, 10), device=device)
    assert fit(model, test, epochs=1, batch_size=256, lr=0.1).epochs


def test_checkpoints_of_models_on_a_gpu(machine, tmp_path):
    model = fastmlp.MLP(SIZES, device="cuda:1")
    fastmlp.save_checkpoint(tmp_path / "model", model, {})
    state, _ = fastmlp.load_checkpoint(tmp_path / "model", device="cuda:1")
    assert {t.device for t in state.values()} == {torch.device("cuda:1")}
    model.load_state_dict(state)
