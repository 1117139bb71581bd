"""history.csv, the logs for TensorBoard, and the pictures."""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

import fastmlp
from fastmlp.train import EpochResult, History
from fastmlp.train.checkpoint import CheckpointError
from fastmlp.train.judged import MOST, judge, load_judged, save_judged
from fastmlp.train.logs import COLUMNS, CsvLog, TensorBoardLog, read_csv
from fastmlp.train.pictures import plot_confusion, plot_mistakes, plot_weights
from tests.support.faults import KINDS, every_kill, every_point

RESULTS = [EpochResult(n, 1 / n, None, None, 0.5, 1e3, validation_loss=2 / n, validation_r2=0.1 * n) for n in (1, 2, 3)]


def test_csv(tmp_path):
    path = tmp_path / "history.csv"
    log = CsvLog(path)
    for result in RESULTS[:2]:
        log(result)
    lines = path.read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS) == [field.name for field in dataclasses.fields(EpochResult)]
    assert lines[2] == "2,0.5,,,0.5,1000.0,,1.0,,0.2"
    assert read_csv(path, "mse") == History(RESULTS[:2], "mse")
    log.rewrite(RESULTS[:1])
    log(RESULTS[1])
    assert read_csv(path).epochs == RESULTS[:2]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no line of an epoch"):
        read_csv(path)


@pytest.mark.skipif(os.name != "posix", reason="kills of POSIX")
@pytest.mark.parametrize("kind", [*KINDS, "kill"])
def test_whole_lines_whatever_happens(tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    log = CsvLog(folder / "history.csv")

    def before() -> None:
        log.rewrite(RESULTS[:1])

    def work() -> None:
        try:
            log(RESULTS[1])
            log(RESULTS[2])
        except (OSError, KeyboardInterrupt):
            pass

    points = 0
    for _ in every_kill(folder, before, work) if kind == "kill" else every_point(folder, kind, before, work):
        points += 1
        assert read_csv(folder / "history.csv").epochs in (RESULTS[:1], RESULTS[:2], RESULTS)
    assert points >= (2 if kind == "half" else 6)


class Writer:
    """torch's SummaryWriter, as far as the log uses it."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.scalars, self.open = folder, purge_step, [], True
        Writer.made.append(self)

    def add_scalar(self, *scalar: object) -> None:
        self.scalars.append(scalar)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.open = False


def test_tensorboard(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TensorBoardLog(tmp_path)
    log(RESULTS[1])
    log.close()
    writer = Writer.made.pop()
    assert (writer.folder, writer.purge_step, writer.open) == (str(tmp_path), 1, False)
    assert writer.scalars == [
        ("loss/train", 0.5, 2), ("speed/seconds", 0.5, 2), ("speed/images_per_second", 1e3, 2),
        ("loss/validation", 1.0, 2), ("r2/validation", 0.2, 2),
    ]  # fmt: skip


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="install it with: pip install tensorboard"):
        TensorBoardLog(tmp_path)


# What a model gets wrong


def one_hot_model(classes: int) -> fastmlp.MLP:
    """A model whose class is the largest input."""
    model = fastmlp.MLP((classes, classes), bias=False)
    model.layers[0].weight.data = torch.eye(classes)
    return model


def test_judged(tmp_path):
    x = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [5, 0, 0], [0, 1, 0]])
    y = torch.tensor([0, 1, 1, 2, 0])
    judged = judge(one_hot_model(3), (x, y), "test", "cross_entropy", batch_size=2)
    assert judged.confusion.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert judged.labels.tolist() == [2, 1, 0], "the worst first"
    assert judged.predicted.tolist() == [0, 2, 1]
    assert torch.equal(judged.inputs, x[[3, 2, 4]])
    assert torch.allclose(judged.probability, x.softmax(1)[[3, 2, 4], [0, 2, 1]])
    save_judged(tmp_path / "file", judged)
    again = load_judged(tmp_path / "file")
    assert again.split == "test"
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(judged).items() if name != "split")
    assert judge(one_hot_model(3), (x, x), "test", "mse") is None
    many = torch.arange(4).repeat(50)
    assert len(judge(one_hot_model(4), (torch.rand(200, 4), many), "test", "cross_entropy").labels) == MOST
    with pytest.raises(CheckpointError):
        load_judged(Path(__file__))


def image_of(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


@pytest.mark.parametrize("classes", [3, 80], ids=["with counts", "without names"])
def test_confusion(tmp_path, classes):
    x = torch.eye(classes).repeat(3, 1)
    judged = judge(one_hot_model(classes), (x, torch.randint(0, classes, (3 * classes,))), "test", "cross_entropy")
    plot_confusion(judged, [f"class {n}" for n in range(classes)], tmp_path / "x.png", "title")
    assert len(image_of(tmp_path / "x.png").getcolors(1 << 24)) > 10


def test_mistakes_and_weights(tmp_path):
    """Gray images and colours."""
    torch.manual_seed(0)
    model, x = one_hot_model(6), torch.randint(0, 256, (40, 6), dtype=torch.uint8)
    judged = judge(model, (x, torch.randint(0, 6, (40,))), "validation", "cross_entropy")
    judged = dataclasses.replace(judged, labels=judged.labels[:7], inputs=judged.inputs[:7])
    plot_mistakes(judged, "abcdef", (1, 2, 3), tmp_path / "mistakes.png", "title")
    plot_weights(model.layers[0].weight, (2, 3), tmp_path / "gray.png", "title")
    plot_weights(model.layers[0].weight, (1, 2, 3), tmp_path / "colour.png")
    for name in ("mistakes", "gray", "colour"):
        assert len(image_of(tmp_path / f"{name}.png").getcolors(1 << 24)) > 10
    few = dataclasses.replace(judged, labels=judged.labels[:0])
    with pytest.raises(ValueError, match="the model made no mistake"):
        plot_mistakes(few, "abcdef", (1, 2, 3), tmp_path / "none.png")
