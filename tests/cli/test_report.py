"""``fastmlp report``: the pictures of a run are drawn anew from its files; and ``--log tensorboard``."""

from __future__ import annotations

import json
import shutil
import sys
import types

import pytest

from fastmlp import cli
from fastmlp.cli.drawing import PICTURES
from tests.cli.test_run_folder import small, train  # noqa: F401
from tests.train.test_logs import Writer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    argv = ["--data", "bundled", "--sizes", "784-8-10", "--epochs", "2", "--optimizer", "adamw", "--batch-size", "256"]
    assert cli.main(["train", *argv, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_every_picture_is_drawn_anew(finished, copy, capsys):
    """From the files alone, and to the same bytes."""
    for name in PICTURES.values():
        (copy / name).unlink()
    capsys.readouterr()
    assert cli.main(["report", str(copy)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: {copy / file}" for name, file in PICTURES.items()]
    for name in PICTURES.values():
        assert (copy / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_without_an_end(copy, capsys):
    for name in ("summary.json", "evaluation.safetensors", *PICTURES.values()):
        (copy / name).unlink()
    capsys.readouterr()
    assert cli.main(["report", str(copy), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["epochs"], result["best_epoch"], set(result["pictures"])) == (2, 2, {"curves", "weights"})
    assert not (copy / "confusion.png").exists()


def test_folders_that_have_no_run(copy, tmp_path, capsys):
    def error(folder: object, code: int = 2) -> str:
        capsys.readouterr()
        assert cli.main(["report", str(folder)]) == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none is no folder; expected a run folder of 'fastmlp train'" in error(tmp_path / "none")
    assert "there is no checkpoint" in error(tmp_path)
    (copy / "evaluation.safetensors").write_bytes(b"short")
    assert "evaluation.safetensors is damaged" in error(copy)
    (copy / "evaluation.safetensors").unlink()
    (copy / "summary.json").write_text("{}")
    assert "summary.json is damaged: KeyError: 'history'" in error(copy)
    (copy / "summary.json").unlink()
    (copy / "history.csv").unlink()
    assert "No such file or directory" in error(copy)


@pytest.mark.usefixtures("small")
def test_tensorboard(tmp_path, monkeypatch, capsys):
    """Resumed, the log hides what an earlier process wrote, and writes all epochs anew."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    out = tmp_path / "run"
    assert train(out, "--log", "tensorboard", "--schedule", "constant") == 0
    assert cli.main(["train", "--resume", str(out), "--epochs", "3"]) == 0
    first, second = Writer.made
    assert (first.folder, first.purge_step, first.open) == (str(out / "tensorboard"), 1, False)
    assert {epoch for _, _, epoch in first.scalars} == {1, 2}
    assert (second.purge_step, {epoch for _, _, epoch in second.scalars}) == (1, {1, 2, 3})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    capsys.readouterr()
    assert train(tmp_path / "none", "--log", "tensorboard") == 2
    assert "install it with: pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_folder_of_a_sweep(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"is the folder of a sweep; 'fastmlp sweep --resume {tmp_path}' writes its tables" in capsys.readouterr().err
