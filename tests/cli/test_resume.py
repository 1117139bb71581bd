"""``fastmlp train --resume``: kills at any moment, equality to the bit, and refusals by the option's name."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmlp import cli
from fastmlp.cli import common
from fastmlp.cli.run_folder import RESULTS
from fastmlp.train.checkpoint import read_checkpoint
from fastmlp.train.logs import COLUMNS, read_csv
from fastmlp.train.state import load_state, save_state
from tests.cli.test_run_folder import small, train  # noqa: F401

OPTIMIZERS = {
    "sgd": ["--momentum", "0", "--no-nesterov"],
    "momentum": ["--weight-decay", "0.001", "--max-grad-norm", "2"],
    "adamw": ["--optimizer", "adamw", "--betas", "0.8", "0.99", "--weight-decay", "0.1"],
    "average": ["--ema-decay", "0.9", "--ema-warmup", "--dropout", "0.3"],
}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """No time for drawing."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, buffer, format: buffer.write(b"a picture"))


def table(folder: Path, rows: int = 120) -> Path:
    """Three classes that overlap, with a test set."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, rows)
    x = (rng.normal(size=(rows, 6)) + y[:, None]).astype(np.float32)
    half = rows // 2
    np.savez(folder / "table.npz", x=x[:half], y=y[:half], x_test=x[half:], y_test=y[half:])
    return folder / "table.npz"


def run(*argv: object) -> int:
    return cli.main([str(arg) for arg in argv])


def untimed(value: object) -> object:
    """A summary, or a part of it, without times and paths."""
    if isinstance(value, dict):
        drop = ("seconds", "images_per_second", "total_seconds", "checkpoint", "curves", "pictures")
        return {key: untimed(item) for key, item in value.items() if key not in drop}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """What a run gives: the weights' bytes, the checkpoint's epoch, the summary and the history without times."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()]
    times = [lines[0].index(name) for name in ("seconds", "images_per_second")]
    history = [[cell for column, cell in enumerate(line) if column not in times] for line in lines]
    assert len(history) == 1 + summary["epochs"]
    weights, epoch = (folder / "model.safetensors").read_bytes(), read_checkpoint(folder).metrics["epoch"]
    return {"weights": weights, "epoch": epoch, "summary": untimed(summary), "history": history}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_runs_are_equal_to_the_bit(tmp_path, small, monkeypatch, name):  # noqa: F811
    """After the death of the process at the end of an epoch, which may be the last one, between any two files."""
    options = [*OPTIMIZERS[name], "--epochs", 3]
    assert train(tmp_path / "whole", *options) == 0
    whole = outcome(tmp_path / "whole")
    for number, (place, call, epoch) in enumerate(PLACES):
        out = tmp_path / f"run{number}"
        with monkeypatch.context() as patch:
            dies_in_call(patch, place, call)
            with pytest.raises(Died):
                train(out, *options)
        assert load_state(out / "last.safetensors").epoch == epoch
        assert run("train", "--resume", out) == 0
        assert outcome(out) == whole
        assert sorted(os.listdir(out)) == sorted(RESULTS)


class Died(BaseException):
    """The process has died, as far as the run folder sees."""


def _dies(*arguments: object) -> None:
    raise Died


#: (what the process dies in, in which call, at which epoch of 3)
PLACES = [
    ("fastmlp.train.checkpoint.save_checkpoint", 1, 1),
    ("fastmlp.train.logs.CsvLog.rewrite", 1, 1),
    ("fastmlp.train.checkpoint.save_checkpoint", 3, 3),
    ("fastmlp.train.logs.CsvLog.__call__", 2, 3),
]


def dies_in_call(patch: pytest.MonkeyPatch, place: str, number: int) -> None:
    """The process dies in the ``number``-th call of ``place``."""
    real, calls = pkgutil.resolve_name(place), itertools.count(1)

    def replaced(*arguments: Any, **more: Any) -> Any:
        if next(calls) == number:
            raise Died
        return real(*arguments, **more)

    patch.setattr(place, replaced)


def test_validation_and_patience(tmp_path):
    """The run ends early, its best epoch before the stop is kept, and the test set is looked at once."""
    data = table(tmp_path)
    options = ["--data", data, "--sizes", "6-32-3", "--validation", 0.3, "--patience", 3, "--batch-size", 4]
    options += ["--lr", 0.05, "--schedule", "constant", "--epochs", 60]
    assert run("train", *options, "--out", tmp_path / "whole") == 0
    whole = outcome(tmp_path / "whole")
    summary = whole["summary"]
    assert summary["epochs"] == summary["best_epoch"] + 3 < 60
    assert [entry["epoch"] for entry in summary["history"] if entry["test_loss"] is not None] == [summary["best_epoch"]]
    assert summary["best_epoch"] > 1
    for epoch in (1, summary["best_epoch"], summary["epochs"]):
        out = tmp_path / f"run{epoch}"
        assert run("train", *options[:-1], epoch, "--out", out) == 0
        assert run("train", "--resume", out, "--epochs", 60) == 0
        assert outcome(out) == whole
    assert run("train", "--resume", tmp_path / "whole", "--patience", 6) == 0
    assert outcome(tmp_path / "whole")["summary"]["epochs"] > summary["epochs"]


def test_a_finished_run_is_finished_again(tmp_path, small, capsys):  # noqa: F811
    out = tmp_path / "run"
    assert train(out) == 0
    before = outcome(out)
    summary = json.loads((out / "summary.json").read_text())
    capsys.readouterr()
    assert run("train", "--resume", out, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert outcome(out) == before
    assert again["history"] == summary["history"]


def test_dropout(tmp_path, small, capsys):  # noqa: F811
    """The seed gives the masks; the checkpoint keeps the probability, and is evaluated without dropout."""
    for name in ("one", "two"):
        assert train(tmp_path / name, "--dropout", 0.5) == 0
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    assert train(tmp_path / "without") == 0
    summary = outcome(tmp_path / "one")["summary"]
    assert summary["config"]["dropout"] == 0.5
    assert summary["train_loss"] != outcome(tmp_path / "without")["summary"]["train_loss"]
    capsys.readouterr()
    assert run("predict", tmp_path / "one", "--help") == 0
    model, config = common.load_model(str(tmp_path / "one"), torch.device("cpu"))
    assert (model.dropout, model.training, config["dropout"]) == (0.5, False, 0.5)
    assert run("train", "--resume", tmp_path / "one", "--dropout", 0.2) == 2
    assert "--dropout 0.2 differs from the run to resume, which has --dropout 0.5" in capsys.readouterr().err


def test_more_epochs(tmp_path, small):  # noqa: F811
    """With a constant learning rate, two and then two more epochs are four."""
    assert train(tmp_path / "whole", "--epochs", 4, "--schedule", "constant") == 0
    assert train(tmp_path / "run", "--schedule", "constant") == 0
    assert run("train", "--resume", tmp_path / "run", "--epochs", 4, "--momentum", "0.9", "--device", "auto") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_the_data_may_have_moved(tmp_path, capsys, monkeypatch):
    data = table(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert run("train", "--data", data.name, "--sizes", "6-4-3", "--epochs", 1, "--out", out) == 0
    monkeypatch.chdir("/")
    assert run("train", "--resume", out) == 0
    data.rename(tmp_path / "moved.npz")
    capsys.readouterr()
    assert run("train", "--resume", out) == 2
    assert f"{data} does not exist" in capsys.readouterr().err
    assert run("train", "--resume", out, "--data", tmp_path / "moved.npz") == 0
    with np.load(tmp_path / "moved.npz") as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "x": arrays["x"][::-1]})
    capsys.readouterr()
    assert run("train", "--resume", out, "--data", tmp_path / "other.npz") == 2
    assert "error: --resume: the training data are not those of the run to resume" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--sizes", "6-4-3", "--epochs", 2, "--validation", 0.2, "--patience", 5]
    assert run("train", "--data", table(folder), *argv, "--out", folder / "run") == 0
    return folder / "run"


def test_a_finished_run_stays_as_it_is(finished):
    """The best epoch is the last one. Its line has the results on the test data, at once and when it is resumed."""
    before = outcome(finished)
    summary, (names, *lines) = before["summary"], before["history"]
    assert summary["best_epoch"] == len(lines) == 2
    assert float(lines[-1][names.index("test_loss")]) == summary["test_loss"]
    assert run("train", "--resume", finished) == 0
    assert outcome(finished) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "0.3"], "--lr 0.3 differs from the run to resume, which has --lr 0.5; leave the option out, or"),
        (["--epochs", "1"], "--epochs 1 differs from the run to resume, which has --epochs 2"),
        (["--patience", "4"], "--patience 4 differs from the run to resume, which has --patience 5"),
        (["--sizes", "6-5-3"], "--sizes 6-5-3 differs from the run to resume, which has --sizes 6-4-3"),
        (["--optimizer", "adamw"], "--optimizer adamw differs from the run to resume, which has --optimizer sgd"),
        (["--no-nesterov"], "--no-nesterov differs from the run to resume, which has --nesterov"),
        (["--betas", "0.9", "0.9"], "--betas 0.9 0.9 differs from the run to resume, which has no --betas"),
        (["--max-grad-norm", "1"], "--max-grad-norm 1 differs from the run to resume, which has no --max-grad-norm"),
        (["--seed", "7"], "--seed 7 differs"),
        (["--dtype", "float64"], "--dtype float64 differs from the run to resume, which has --dtype float32"),
        (["--validation", "0"], "--validation 0 differs from the run to resume, which has --validation 0.2"),
        (["--device", "cuda"], "--device cuda differs from the run to resume, which has --device cpu"),
        (["--engine", "autograd"], "--engine autograd differs"),
        (["--out", "elsewhere"], "--out and --resume exclude each other; a run goes on in its folder"),
        (["--overwrite"], "--overwrite and --resume exclude each other"),
    ],
)
def test_options_of_another_run_are_refused(finished, capsys, argv, words):
    before = outcome(finished)
    capsys.readouterr()
    assert run("train", "--resume", finished, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert outcome(finished) == before


def test_folders_that_have_no_run(tmp_path, finished, capsys):
    def error(folder: Path) -> str:
        capsys.readouterr()
        assert run("train", "--resume", folder) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none is no folder; expected a run folder with last.safetensors" in error(tmp_path / "none")
    assert "has no last.safetensors, which a run has from its first epoch on" in error(tmp_path)
    shutil.copy(finished / "last.safetensors", tmp_path)
    state = load_state(tmp_path / "last.safetensors")
    content = (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors").write_bytes(content[:-3])
    assert "last.safetensors is damaged" in error(tmp_path)
    state.extra = {}
    save_state(tmp_path / "last.safetensors", state)
    assert "was written by fastmlp.fit, not by 'fastmlp train'; resume with fit" in error(tmp_path)
    capsys.readouterr()
    assert run("train", "--out", finished, "--data", "bundled") == 2
    assert f"--overwrite to replace it, or go on with --resume {finished}" in capsys.readouterr().err


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (epoch, value) by the columns of history.csv."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {}
    for tag in shown.Tags()["scalars"]:
        kind, _, split = tag.partition("/")
        name = split if kind == "speed" else f"{split}_{kind}"
        found[name] = [(event.step, event.value) for event in shown.Scalars(tag)]
    return found


def columns(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of its history.csv."""
    history = read_csv(folder / "history.csv").epochs
    found = {name: [(e.epoch, vars(e)[name]) for e in history if vars(e)[name] is not None] for name in COLUMNS[1:]}
    return {name: [(epoch, pytest.approx(value)) for epoch, value in rows] for name, rows in found.items() if rows}


def test_events_for_tensorboard_are_the_history(tmp_path, monkeypatch):
    """Also after the death of the process between an epoch's line and its event, and when another run was there."""
    pytest.importorskip("tensorboard")
    out, argv = tmp_path / "run", ["--sizes", "6-4-3", "--validation", 0.2, "--log", "tensorboard"]
    argv += ["--data", table(tmp_path), "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr("fastmlp.train.logs.TensorBoardLog.__call__", _dies)
        with pytest.raises(Died):
            run("train", *argv, "--epochs", 3)
    assert run("train", "--resume", out) == 0
    assert events(out) == columns(out)
    assert len(columns(out)["train_loss"]) == 3
    assert len(columns(out)["test_loss"]) == 1
    assert run("train", *argv, "--epochs", 2, "--overwrite") == 0
    assert run("train", "--resume", out) == 0
    assert events(out) == columns(out)
    assert len(columns(out)["train_loss"]) == 2


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_kills_at_random_moments(request, tmp_path):
    """SIGKILL, again and again, until the run ends: nothing is lost but unfinished epochs, and the run is the same."""
    kills = 100 if request.config.getoption("full") else 4
    command = [sys.executable, "-m", "tests.cli.killing", str(tmp_path), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["kills"] >= kills
    assert (result["lost"], result["different"]) == (0, []), result
