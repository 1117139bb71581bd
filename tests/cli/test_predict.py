"""``fastmlp predict`` among images that cannot be read, empty ones, and many."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

import fastmlp
from fastmlp import cli
from fastmlp.cli import predict
from fastmlp.data import load_fashion_mnist
from fastmlp.train.checkpoint import save_checkpoint


@pytest.fixture
def run(tmp_path):
    """A checkpoint."""
    save_checkpoint(tmp_path / "run", fastmlp.MLP((784, 8, 10)), {"sizes": [784, 8, 10], "activation": "sigmoid"})
    return str(tmp_path / "run")


@pytest.fixture
def good(tmp_path):
    """Five images of the data."""
    names = [str(tmp_path / f"{number}.png") for number in range(5)]
    for name, image in zip(names, load_fashion_mnist(source="bundled")[1].images, strict=False):
        Image.fromarray(image.reshape(28, 28).numpy()).save(name)
    return names


@pytest.fixture
def bad(tmp_path):
    """Files that are no images, each for another reason."""
    names = [str(tmp_path / name) for name in ("text.png", "none.png", "fifo", "large.ppm")]
    (tmp_path / "text.png").write_text("hello\nworld")
    (tmp_path / "large.ppm").write_bytes(b"P5 13300 13300 255\n")
    if os.name == "posix":
        os.mkfifo(names[2])
    return names


def test_a_bad_image_stops_nothing(capsys, run, good, bad):
    names = [good[0], *bad, *good[1:]]
    assert cli.main(["predict", run, *names]) == 2
    captured = capsys.readouterr()
    assert [line.partition(":")[0] for line in captured.out.splitlines()] == good
    errors = captured.err.splitlines()
    assert len(errors) == len(bad)
    assert all(line.startswith("fastmlp: error: ") and name in line for line, name in zip(errors, bad, strict=True))


def test_json_has_the_errors(capsys, run, good, bad):
    assert cli.main(["predict", run, bad[0], good[0], "--json"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [entry["file"] for entry in found["images"]] == [good[0]]
    assert [entry["file"] for entry in found["errors"]] == [bad[0]]
    assert "is not an image" in found["errors"][0]["error"]


def test_only_bad_images(capsys, run, bad):
    assert cli.main(["predict", run, *bad, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["images"] == []


def test_many_images_take_the_memory_of_few(capsys, run, good, monkeypatch):
    assert cli.main(["predict", run, *good]) == 0
    together = capsys.readouterr().out
    monkeypatch.setattr(predict, "BATCH", 2)
    assert cli.main(["predict", run, *good]) == 0
    assert capsys.readouterr().out == together


def test_an_empty_picture(capsys, run, good, tmp_path):
    empty = str(tmp_path / "empty.tif")
    Image.fromarray(np.full((40, 30), 2_000_000_000, np.int32)).save(empty)
    assert cli.main(["predict", run, empty, good[0]]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"fastmlp: warning: {empty} shows nothing but background; its classes mean nothing\n"
    assert cli.main(["predict", run, empty, good[0], "--json"]) == 0
    assert [entry["empty"] for entry in json.loads(capsys.readouterr().out)["images"]] == [True, False]


def test_the_help_says_that_backgrounds_matter(capsys):
    assert cli.main(["predict", "--help"]) == 0
    assert "The background matters" in capsys.readouterr().out
