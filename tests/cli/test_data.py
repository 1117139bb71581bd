"""``--data``, ``--validation`` and ``--loss``: one command for each kind of data, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmlp
from fastmlp import cli
from fastmlp.base import atomic
from fastmlp.cli.inputs import FASHION_MNIST, Format
from fastmlp.data import Standardization, dataset, load_fashion_mnist
from fastmlp.data.fashion_mnist import CLASSES
from fastmlp.train import evaluate, loop
from fastmlp.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from tests.support.small_data import bars, idx_folder, image_folder, table

#: A run of a moment, whose default learning rate is too high for so few rows.
QUICK = ["--epochs", "2", "--batch-size", "16", "--lr", "0.1", "--activation", "relu", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch, request):
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, buffer, format: buffer.write(b"a picture"))


@pytest.fixture
def with_pictures() -> None:
    """Curves are drawn."""


def run(capsys, *argv: object, code: int = 0) -> str:
    """What a command prints: its output, or its one line of an error."""
    assert cli.main([str(arg) for arg in argv]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    if code:
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("fastmlp: error: ")
    return captured.err if code else captured.out


def trained(capsys, data: object, out: Path, *more: object) -> dict:
    return json.loads(run(capsys, "train", "--data", data, *QUICK, "--out", out, *more, "--json"))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Small data of every kind."""
    folder = tmp_path / "sets"
    idx_folder(folder / "torchvision/MNIST/raw")
    idx_folder(folder / "idx", size=4)
    image_folder(folder / "pictures/train", 32)
    image_folder(folder / "pictures/test", 8, seed=1)
    x, y = table()
    np.savez(folder / "values.npz", x=x, y=y, x_test=x[:20], y_test=y[:20])
    np.savez(folder / "classes.npz", x=x, y=np.digitize(y, [-0.5, 0.5]), classes=["low", "mean", "high"])
    np.savez(folder / "pixels.npz", x=bars(64)[0], y=bars(64)[1])
    np.savez(folder / "yes.npz", x=x.astype("f4"), y=y > 0)
    return folder


@pytest.mark.parametrize(
    ("data", "sizes", "rows"),
    [
        ("torchvision:MNIST@{}/torchvision", [64, 512, 512, 10], (64, 0, 16)),
        ("{}/idx", [16, 512, 512, 4], (64, 0, 16)),
        ("{}/pictures", [64, 512, 512, 4], (32, 0, 8)),
        ("{}/classes.npz", [5, 512, 512, 3], (77, 19, 0)),
        ("{}/pixels.npz", [64, 512, 512, 4], (51, 13, 0)),
    ],
)
def test_one_command_for_each_kind_of_data(capsys, sets, tmp_path, data, sizes, rows):
    data = data.format(sets)
    summary = trained(capsys, data, tmp_path / "run", "--epochs", 1)
    assert summary["config"]["sizes"] == sizes
    found = [summary.get(name) for name in ("dataset", "validation_dataset", "test_dataset")]
    assert [int(text.split()[1]) if text else 0 for text in found] == list(rows)
    assert str(tmp_path) not in (tmp_path / "run/summary.json").read_text()
    assert str(tmp_path) not in (tmp_path / "run/model.json").read_text()
    config = load_checkpoint(tmp_path / "run")[1]
    assert len(config["classes"]) == sizes[-1]
    assert ("standardization" in config) == data.endswith("classes.npz")
    output = json.loads(run(capsys, "eval", tmp_path / "run", "--data", data, "--device", "cpu", "--json"))
    if rows[2]:
        assert output["test_accuracy"] == summary["test_accuracy"]
        assert output["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    else:
        assert output["images"] == rows[0] + rows[1]


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "bce"])
def test_values(capsys, sets, tmp_path, loss):
    data, metric = (sets / "yes.npz", "accuracy") if loss == "bce" else (sets / "values.npz", "r2")
    out = tmp_path / "run"
    summary = trained(capsys, data, out, "--loss", loss, "--sizes", "5-8-1", "--validation", 0.25, "--epochs", 9)
    assert summary["config"]["loss"] == loss
    assert summary["config"]["engine"] == "step"
    assert {f"test_{metric}", f"validation_{metric}", "test_loss", "validation_loss"} <= summary.keys()
    assert ("test_accuracy" in summary) == (metric == "accuracy")
    assert summary[f"validation_{metric}"] > 0.1
    assert "classes" not in load_checkpoint(out)[1]
    text = run(capsys, "eval", out, "--data", data)
    assert f"test {'accuracy' if metric == 'accuracy' else 'R2'} " in text
    lines = run(capsys, "predict", out, data).splitlines()
    assert len(lines) == 96
    assert lines[3].startswith(f"{data}[3]: ")
    (value,) = json.loads(run(capsys, "predict", out, data, "--json"))["images"][3]["values"]
    assert float(lines[3].partition(": ")[2]) == pytest.approx(value, rel=1e-5)
    assert 0 < value < 1 or loss != "bce"


def test_lines_of_a_run_with_validation(capsys, sets, tmp_path):
    lines = run(
        capsys, "train", "--data", sets / "pictures", *QUICK, "--validation", "0.25", "--out", tmp_path / "run"
    ).splitlines()
    assert lines[1] == (
        f"data: pictures 24 train ({sets}/pictures), pictures 8 validation ({sets}/pictures), pictures 8 test "
        f"({sets}/pictures)"
    )
    epochs = [line for line in lines if line.startswith("epoch")]
    assert all("validation accuracy" in line and "test" not in line for line in epochs)
    assert lines[-3].startswith("best epoch ")
    assert ", test accuracy " in lines[-3]


def test_validation_chooses_the_checkpoint(capsys, sets, tmp_path, monkeypatch):
    """The second of three epochs is the best; the checkpoint has its parameters and its results on the test data."""
    script, models = iter([2.0, 1.0, 3.0, 0.5]), []

    def scored(model: torch.nn.Module, *rest: object, **options: object) -> tuple[float, float]:
        models.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(script), 0.5

    monkeypatch.setattr(loop, "evaluate", scored)
    out = tmp_path / "run"
    summary = trained(capsys, sets / "pictures", out, "--sizes", "64-4-4", "--validation", 0.5, "--epochs", 3)
    assert (summary["best_epoch"], summary["validation_loss"], summary["test_loss"]) == (2, 1.0, 0.5)
    assert [entry["test_loss"] for entry in summary["history"]] == [None, 0.5, None]
    state = load_checkpoint(out)[0]
    assert all(torch.equal(value, models[1][name]) for name, value in state.items())
    metrics = read_checkpoint(out).metrics
    assert (metrics["epoch"], metrics["validation_loss"], metrics["test_loss"]) == (2, 1.0, 0.5)


def test_standardization_is_of_the_training_part(capsys, sets, tmp_path):
    out = tmp_path / "run"
    trained(capsys, sets / "values.npz", out, "--loss", "mse", "--sizes", "5-4-1", "--validation", 0.5)
    state, config = load_checkpoint(out)
    with np.load(sets / "values.npz") as arrays:
        x, y = (torch.from_numpy(arrays[name]) for name in ("x", "y"))
        test = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    kept = fastmlp.train.held_out(y[:, None], 0.5, 0)[0]
    scale = Standardization.of(x[kept])
    assert config["standardization"] == scale.as_dict()
    model = fastmlp.MLP([5, 4, 1], "relu")
    model.load_state_dict(state)
    expected, r2 = evaluate(model, (scale(test[0], torch.float32), test[1].float()), loss="mse")
    result = json.loads(run(capsys, "eval", out, "--data", sets / "values.npz", "--json"))
    assert (result["test_loss"], result["test_r2"]) == (expected, r2)
    with torch.no_grad():
        rows = model(scale(x, torch.float32)).flatten().tolist()
    found = json.loads(run(capsys, "predict", out, sets / "values.npz", "--json"))["images"]
    assert [entry["values"][0] for entry in found] == pytest.approx(rows)


def test_predict_of_images(capsys, sets, tmp_path):
    out, image = tmp_path / "run", sets / "pictures/test/bar2/2.png"
    trained(capsys, sets / "pictures", out, "--sizes", "64-16-4", "--epochs", 20)
    (entry,) = json.loads(run(capsys, "predict", out, image, "--json"))["images"]
    assert (entry["predictions"][0]["class"], entry["inverted"]) == ("bar2", False)
    Image.fromarray(255 - bars(8, seed=1)[0][2]).convert("RGB").resize((16, 16), 0).save(tmp_path / "large.png")
    text = run(capsys, "predict", out, tmp_path / "large.png", "--invert")
    assert text.startswith(f"{tmp_path / 'large.png'}: bar2 ")
    np.savez(tmp_path / "rows.npz", x=bars(2)[0])
    text = run(capsys, "predict", out, tmp_path / "rows.npz", image)
    assert [line.partition(": ")[2].split()[0] for line in text.splitlines()] == ["bar0", "bar1", "bar2"]
    text = run(capsys, "predict", out, sets / "values.npz", code=2)
    assert "values.npz has 5 features, but the model takes 64" in text
    trained(capsys, sets / "classes.npz", tmp_path / "rows", "--sizes", "5-4-3", "--epochs", 1)
    assert "takes rows of 5 features, not images" in run(capsys, "predict", tmp_path / "rows", image, code=2)
    np.savez(tmp_path / "pixels.npz", x=np.zeros((2, 5), np.uint8))
    text = run(capsys, "predict", tmp_path / "rows", tmp_path / "pixels.npz", code=2)
    assert "has uint8 pixels, but the model was trained on floating-point numbers" in text
    assert "No such file" in run(capsys, "predict", tmp_path / "rows", "none.npz", code=2)


def test_ignored_rows_count_in_no_score(capsys, sets, tmp_path):
    x, y = bars(64)
    np.savez(sets / "ignored.npz", x=x, y=y, x_test=x[:40], y_test=np.where(np.arange(40) < 30, 3, y[:40]))
    out = tmp_path / "run"
    summary = trained(capsys, sets / "ignored.npz", out, "--sizes", "64-16-4", "--epochs", 9, "--ignore-index", 3)
    found = json.loads(run(capsys, "eval", out, "--data", sets / "ignored.npz", "--json"))
    assert found["test_accuracy"] == summary["test_accuracy"] > 0.5
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)


def test_eval_follows_the_names_of_the_classes(capsys, sets, tmp_path):
    out = tmp_path / "run"
    trained(capsys, sets / "pictures", out, "--sizes", "64-16-4", "--epochs", 20)
    assert "name its data with --data" in run(capsys, "eval", out, code=2)
    for name in ("bar0", "bar2"):
        shutil.rmtree(sets / "pictures/train" / name)
        shutil.rmtree(sets / "pictures/test" / name)
    text = run(capsys, "eval", out, "--data", sets / "pictures")
    assert f"data: pictures 4 test ({sets / 'pictures'})\ntest accuracy 100.00 %" in text
    (sets / "pictures/train/bar1").rename(sets / "pictures/train/new")
    (sets / "pictures/test/bar1").rename(sets / "pictures/test/new")
    text = run(capsys, "eval", out, "--data", sets / "pictures", code=2)
    assert "has the 2 classes bar3, new, but the model has the 4 classes bar0, bar1, bar2, bar3" in text
    text = run(capsys, "eval", out, "--data", sets / "classes.npz", code=2)
    assert "has 5 features, but the model takes 64" in text
    assert cli.main(["eval", str(out), "--data", str(sets / "pixels.npz")]) == 0
    assert "has no test set; all its rows are evaluated" in capsys.readouterr().err


def test_eval_finds_torchvisions_data_again(capsys, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (sets / "torchvision").rename(tmp_path / "data")
    summary = trained(capsys, "torchvision:MNIST", "run", "--sizes", "64-4-10")
    assert json.loads(run(capsys, "eval", "run", "--json"))["test_accuracy"] == summary["test_accuracy"]


MISTAKES = [
    (
        ["--data", "no/folder"],
        "no/folder does not exist; expected fashion-mnist, bundled, torchvision:NAME, a folder or",
    ),
    (["--data", "mnist"], "Did you mean 'torchvision:MNIST'?"),
    (["--data", "torchvision:MNITS"], "Did you mean 'MNIST'?"),
    (["--data", "{}/empty"], "empty is empty; expected the idx files"),
    (["--data", "{}/empty"], "Leave --data out for FashionMNIST"),
    (["--data", "{}/one"], "have only one class, 'bar0'; expected two or more"),
    (["--data", "{}/same.npz"], "have only one class, '2'; expected two or more"),
    (
        ["--data", "{}/values.npz"],
        "y is floats; expected class numbers; convert them with y.astype('int64'), or use --loss",
    ),
    (["--data", "{}/nothing.npz"], "has no x: it has the arrays z; expected x and y"),
    (["--data", "{}/objects.npz"], "x has Python objects, which are not read"),
    (
        ["--data", "{}/nan.npz", "--loss", "mse"],
        "x has 1 values that are NaN or infinite, the first in row 0, column 0",
    ),
    (
        ["--data", "bundled", "--loss", "mse"],
        "bundled has classes, but the loss is one of values; expected an .npz file",
    ),
    (["--data", "{}/values.npz", "--loss", "bce"], "expected targets from 0 to 1 for bce, got -"),
    (["--data", "{}/values.npz", "--loss", "msee"], "Did you mean 'mse'?"),
    (["--data", "{}/values.npz", "--loss", "mse", "--sizes", "5-2"], "5-2 must start with 5 (features) and end with 1"),
    (["--data", "{}/pictures", "--sizes", "784-10"], "--sizes 784-10 must start with 64 (8 x 8 pixels) and end with 4"),
    (
        ["--data", "bundled", "--sizes", "9-10"],
        "must start with 784 (28 x 28 pixels) and end with 10 classes, such as 784-",
    ),
    (
        ["--data", "{}/values.npz", "--loss", "mse", "--validation", "1"],
        "'1' is not a finite number of at least 0 and below",
    ),
    (["--data", "{}/values.npz", "--loss", "mse", "--validation", "0.001"], "--validation: 96 training rows cannot be"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES)
def test_mistakes(capsys, sets, argv, words):
    (sets / "empty").mkdir()
    shutil.copytree(sets / "pictures/train/bar0", sets / "one/bar0")
    x, y = table()
    np.savez(sets / "same.npz", x=x, y=np.full(len(x), 2))
    np.savez(sets / "nothing.npz", z=x)
    np.savez(sets / "objects.npz", x=x.astype(object), y=y)
    np.savez(sets / "nan.npz", x=np.where(x == x[0, 0], np.nan, x), y=y)
    assert words in run(capsys, "train", *(arg.format(sets) for arg in argv), "--out", sets / "run", code=2)
    assert not (sets / "run").exists()


def test_missing_torchvision_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert "needs the package torchvision" in run(capsys, "train", "--data", "torchvision:MNIST", code=2)


# Checkpoints


def test_checkpoints_of_an_older_fastmlp(capsys, tmp_path):
    """They do not say loss and shape, and are of FashionMNIST."""
    config = {"sizes": [784, 4, 10], "activation": "relu"}
    for more in ({}, {"classes": list(CLASSES)}):
        save_checkpoint(tmp_path, fastmlp.MLP((784, 4, 10)), {**config, **more})
        assert Format.of_checkpoint({**config, **more}, (784, 4, 10), "x") == FASHION_MNIST
        assert "test accuracy" in run(capsys, "eval", tmp_path, "--data", "bundled")
    pixels = load_fashion_mnist(source="bundled")[1].images[0].view(28, 28)
    Image.fromarray(255 - pixels.numpy()).save(tmp_path / "image.png")
    assert "(inverted)" in run(capsys, "predict", tmp_path, tmp_path / "image.png")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"loss": "swoosh"}, "its loss is 'swoosh'; expected one of cross_entropy, mse"),
        ({"loss": ["mse"]}, "its loss is ['mse']"),
        ({"classes": ["a"]}, "it has 1 names of classes and 10 outputs"),
        ({"classes": "abcdefghij"}, "expected classes to be a list of names"),
        ({"classes": list(range(10))}, "expected classes to be a list of names"),
        ({"shape": [28, 29]}, "its rows have the shape [28, 29], and the model takes 784 inputs"),
        ({"shape": [-28, -28]}, "its rows have the shape [-28, -28]"),
        ({"shape": "28"}, "its rows have the shape 28"),
        ({"standardization": {"mean": [0.0], "std": [1.0]}}, "standardization: expected mean and std as 784 finite"),
    ],
)
def test_damaged_configurations(capsys, tmp_path, config, words):
    save_checkpoint(tmp_path, fastmlp.MLP((784, 10)), {"sizes": [784, 10], "activation": "relu", **config})
    for argv in (["eval", tmp_path, "--data", "bundled"], ["predict", tmp_path, "x.png"]):
        assert words in run(capsys, *argv, code=2)


def test_the_default_is_fashion_mnist_without_a_held_out_part(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SOURCES", ("bundled",))
    with pytest.warns(dataset.SubsetWarning):
        train, test = fastmlp.load_data()
    monkeypatch.setattr("fastmlp.data.load_data", lambda *args, **options: (train, test))
    summary = json.loads(
        run(capsys, "train", "--sizes", "784-4-10", "--epochs", 1, "--out", tmp_path / "run", "--json")
    )
    assert summary["dataset"] == "FashionMNIST subset 6000 train (bundled with fastmlp)"
    assert summary["history"][0]["test_accuracy"] == summary["test_accuracy"]
    assert not {"best_epoch", "validation_loss", "validation_dataset"} & summary.keys()


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_curves(capsys, sets, tmp_path, with_pictures, loss):
    data = sets / ("values.npz" if loss == "mse" else "pictures")
    sizes = "5-8-1" if loss == "mse" else "64-8-4"
    trained(capsys, data, tmp_path / "run", "--loss", loss, "--validation", 0.25, "--sizes", sizes)
    with Image.open(tmp_path / "run/curves.png") as image:
        assert image.width > 1000
