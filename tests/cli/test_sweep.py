"""``fastmlp sweep``: members are runs of ``fastmlp train``, files, resuming, several processes, and mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastmlp
from fastmlp import cli
from fastmlp.cli.sweep_folder import CLAIM, group_file
from fastmlp.train.checkpoint import read_checkpoint
from fastmlp.train.sweep import group as group_module
from fastmlp.train.tensor_file import read_tensors, write_tensors
from tests.cli.processes import ended, started
from tests.support.small_data import idx_folder, table

FILES = ["groups", "model.json", "model.safetensors", "results.csv", "results.json", "results.png", "sweep.json"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch, request):
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, buffer, format: buffer.write(b"a picture"))
    yield
    fastmlp.set_backend("auto")


@pytest.fixture
def with_pictures() -> None:
    """The scores are drawn."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Classes of floating-point features with a test set, values, and images."""
    folder = tmp_path_factory.mktemp("sets")
    x, y = table(60, 4)
    labels = (y > 0).astype(np.int64) + (x[:, 1] > 105)
    np.savez(folder / "classes.npz", x=x, y=labels, x_test=x[:15] + 0.1, y_test=labels[:15])
    np.savez(folder / "values.npz", x=x, y=y)
    np.savez(folder / "others.npz", x=x[::-1], y=labels)
    idx_folder(folder / "idx", size=4)
    return folder


def run(capsys, *argv: object, code: int = 0) -> str:
    """What a command prints: its output, or its one line of an error."""
    assert cli.main([str(arg) for arg in argv]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    if code:
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("fastmlp: error: ")
    return captured.err if code else captured.out


def quick(sets: Path, data: str = "classes.npz") -> list[object]:
    return ["--data", sets / data, "--epochs", 2, "--batch-size", 8, "--device", "cpu"]


def swept(capsys, sets: Path, out: Path, *more: object, data: str = "classes.npz") -> dict:
    return json.loads(run(capsys, "sweep", *quick(sets, data), "--out", out, *more, "--json"))


def test_members_are_runs_of_train(capsys, sets, tmp_path):
    """Same seed, same division, same starting weights, same order: the results differ by rounding alone."""
    sizes = ["--sizes", "4-6-3", "--dtype", "float64"]
    grid = ["--activation", "relu,tanh", "--lr", "0.2,0.05", "--momentum", "0,0.9", "--seeds", "3,8"]
    summary = swept(capsys, sets, tmp_path / "sweep", *sizes, *grid)
    assert len(summary["members"]) == 16
    for number in (0, 7, 10):
        member = summary["members"][number]
        alone = ["--activation", member["activation"], "--lr", member["lr"], "--momentum", member["momentum"]]
        alone += ["--seed", member["seed"], "--validation", 0.2, "--out", tmp_path / f"run{number}", "--json"]
        found = json.loads(run(capsys, "train", *quick(sets), *sizes, *alone))
        for name in ("validation_loss", "validation_accuracy", "train_loss", "best_epoch"):
            assert member[name] == pytest.approx(found[name], rel=1e-6)
    assert summary["score"] == "validation_accuracy"
    means = [setting["mean"] for setting in summary["settings"]]
    assert means == sorted(means, reverse=True)
    assert sorted(os.listdir(tmp_path / "sweep")) == FILES
    # The best member is a checkpoint as train writes it.
    best, evaluated = summary["best"], ["eval", tmp_path / "sweep", "--data", sets / "classes.npz", "--device", "cpu"]
    scores = json.loads(run(capsys, *evaluated, "--json"))
    assert scores["test_accuracy"] == best["test_accuracy"]
    assert scores["test_loss"] == pytest.approx(best["test_loss"], rel=1e-6)
    first = summary["settings"][0]["setting"]
    assert {name: best[name] for name in first} == first
    assert best["validation_accuracy"] == summary["settings"][0]["best"]
    config = read_checkpoint(tmp_path / "sweep").config
    assert (config["activation"], config["training"]["lr"]) == (best["activation"], best["lr"])
    alone = ["--activation", best["activation"], "--lr", best["lr"], "--momentum", best["momentum"]]
    alone += ["--seed", best["seed"], "--validation", 0.2, "--out", tmp_path / "best"]
    run(capsys, "train", *quick(sets), *sizes, *alone)
    assert read_checkpoint(tmp_path / "best").config["standardization"] == config["standardization"]


def test_options_of_a_step(capsys, sets, tmp_path):
    """Dropout is a setting. The options are those of train, and the checkpoint of the best member says them."""
    options = ["--optimizer", "adamw", "--betas", "0.8", "0.9", "--label-smoothing", 0.1, "--class-weight", "1,2,3"]
    options += ["--ema-decay", 0.5, "--sizes", "4-6-3", "--weight-decay", 0.5]
    options += ["--param-group", "*.bias:weight-decay=0", "--dtype", "float64"]
    summary = swept(capsys, sets, tmp_path / "sweep", *options, "--dropout", "0,0.25")
    assert [member["dropout"] for member in summary["members"]] == [0, 0.25]
    alone = ["--validation", 0.2, "--out", tmp_path / "run", "--json", *options]
    for member, more in zip(summary["members"], ([], ["--dropout", 0.25, "--overwrite"]), strict=True):
        found = json.loads(run(capsys, "train", *quick(sets), *alone, *more))
        for name in ("validation_loss", "train_loss", "best_epoch"):
            assert member[name] == pytest.approx(found[name], rel=1e-6)
    config = read_checkpoint(tmp_path / "sweep").config
    assert config.get("dropout", 0) == summary["best"]["dropout"]
    said = {"betas": [0.8, 0.9], "label_smoothing": 0.1, "param_group": ["*.bias:weight-decay=0"], "ema_decay": 0.5}
    assert {name: config["training"].get(name) for name in said} == said
    run(capsys, "eval", tmp_path / "sweep", "--data", sets / "classes.npz")


def test_a_sweep_of_an_older_fastmlp_goes_on(capsys, sets, tmp_path):
    """Its plan has no options of a step, and its members no dropout."""
    out = tmp_path / "sweep"
    before = swept(capsys, sets, out, "--sizes", "4-5-3", "--lr", "0.1,0.2")
    plan = json.loads((out / "sweep.json").read_text())
    known = {*before["members"][0], "sizes", "loss", "optimizer", "nesterov", "epochs", "batch_size", "schedule"}
    known |= {"warmup", "seeds", "folds", "validation", "dtype", "data", "device", "backend"}
    known -= {"dropout"}
    plan["config"] = {name: value for name, value in plan["config"].items() if name in known}
    (out / "sweep.json").write_text(json.dumps(plan))
    tensors, about = read_tensors(group_file(out, 0), "fastmlp sweep group")
    group = json.loads(about["group"])
    for member in group["members"]:
        del member["dropout"]
    write_tensors(group_file(out, 0), tensors, {**about, "group": json.dumps(group)})
    text = run(capsys, "sweep", "--resume", out)
    assert "resumed" in text
    assert "1 of 1 groups are finished" in text
    assert json.loads((out / "results.json").read_text())["members"] == before["members"]


def test_lines_and_tables(capsys, sets, tmp_path, with_pictures):
    out = tmp_path / "sweep"
    grid = ["--lr", "0.1,1e9", "--weight-decay", "0,0.01", "--seeds", 2, "--folds", 3, "--sizes", "16-5-4"]
    text = run(capsys, "sweep", *quick(sets, "idx"), "--out", out, *grid, "--activation", "relu").splitlines()
    assert text[0] == "24 members in 2 groups, float32"
    assert text[3].startswith("group 1/2: ")
    assert text[4].startswith("epoch 1/2  median train loss ")
    assert any(line.endswith(" diverged") for line in text)
    head = next(number for number, line in enumerate(text) if line.startswith("rank"))
    assert text[head].split() == [
        *("rank", "lr", "weight", "decay", "mean", "accuracy", "%", "±", "worst", "best", "members", "diverged")
    ]
    table = [line.split() for line in text[head + 1 : head + 5]]
    assert [(row[0], row[1], row[-2], row[-1]) for row in table] == [
        ("1", "0.1", "6", "0"), ("2", "0.1", "6", "0"), ("3", "1e+09", "6", "6"), ("4", "1e+09", "6", "6")
    ]  # fmt: skip
    assert text[-2:] == [f"checkpoint of the best member: {out}/model.safetensors", f"picture: {out}/results.png"]
    with open(out / "results.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["number"] for row in rows] == [str(number) for number in range(24)]
    assert {row["fold"] for row in rows} == {"0", "1", "2"}
    assert all((row["diverged"] == "") == (row["lr"] == "0.1") for row in rows)
    with Image.open(out / "results.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_values(capsys, sets, tmp_path, loss, with_pictures):
    """Ranked by the loss; the best one has the standardization of its own fold; a bar for each setting."""
    out, sizes = tmp_path / "sweep", ["--sizes", "4-32-1"]
    summary = swept(
        capsys, sets, out, "--loss", loss, "--folds", 2, "--activation", "relu,gelu", *sizes, data="values.npz"
    )
    assert summary["score"] == "validation_loss"
    means = [setting["mean"] for setting in summary["settings"]]
    assert means == sorted(means)
    assert summary["best"]["validation_loss"] == summary["settings"][0]["best"]
    assert summary["members"][0]["lr"] == pytest.approx(1 / 32)
    text = run(capsys, "predict", out, sets / "values.npz", "--device", "cpu")
    assert text
    with Image.open(out / "results.png") as image:
        assert image.format == "PNG"


def content(out: Path) -> dict:
    """The files of a sweep, apart from the times."""
    found = {name: (out / name).read_bytes() for name in ("results.csv", "model.safetensors")}
    summary = json.loads((out / "results.json").read_text())
    return {**found, **{name: summary[name] for name in ("best", "settings", "members", "groups")}}


def test_resume(capsys, sets, tmp_path, monkeypatch):
    grid = ["--lr", "0.1,0.2", "--seeds", 3, "--sizes", "4-5-3", "--group", 2]
    whole, out = tmp_path / "whole", tmp_path / "sweep"
    swept(capsys, sets, whole, *grid)
    train_group, trained = group_module.train_group, []

    def interrupted(members, *rest):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(members)
        return train_group(members, *rest)

    def counted(members, *rest):
        trained.append(members)
        return train_group(members, *rest)

    monkeypatch.setattr(group_module, "train_group", interrupted)
    argv = ["sweep", *quick(sets), "--out", out, *grid]
    assert cli.main(list(map(str, argv))) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith(f"1 of 3 groups are finished.\nTo go on: fastmlp sweep --resume {out}\n")
    assert captured.err.strip() == "fastmlp: interrupted"
    assert sorted(os.listdir(out)) == ["groups", "sweep.json"]
    assert "or go on with --resume" in run(capsys, *argv, code=2)

    monkeypatch.setattr(group_module, "train_group", counted)
    trained.clear()
    text = run(capsys, "sweep", "--resume", out)
    assert f"resumed: {out}, 1 of 3 groups are finished" in text
    assert len(trained) == 2
    assert content(out) == content(whole)
    assert sorted(os.listdir(out)) == FILES

    damaged = group_file(out, 1)
    damaged.write_bytes(damaged.read_bytes()[:-4])
    trained.clear()
    assert cli.main(["sweep", "--resume", str(out)]) == 0
    assert capsys.readouterr().err.startswith("fastmlp: warning: ")
    assert len(trained) == 1
    assert content(out) == content(whole)

    trained.clear()
    assert json.loads(run(capsys, "sweep", "--resume", out, "--json"))["groups"] == [2, 2, 2]
    assert trained == []
    assert "leave out --lr, --group" in run(capsys, "sweep", "--resume", out, "--lr", "0.1", "--group", 3, code=2)
    plan = json.loads((out / "sweep.json").read_text())
    plan["config"]["data"] = str(sets / "others.npz")
    (out / "sweep.json").write_text(json.dumps(plan))
    assert "the training data are not those of the sweep" in run(capsys, "sweep", "--resume", out, code=2)
    run(capsys, *argv, "--overwrite", "--seeds", 1)
    assert len(list((out / "groups").iterdir())) == 1


def test_a_full_disk(capsys, sets, tmp_path, monkeypatch):
    """The message names the command to go on with."""
    out = tmp_path / "sweep"

    def full(path, *rest):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("fastmlp.train.sweep.results.save_group", full)
        assert cli.main(["sweep", *map(str, quick(sets)), "--out", str(out), "--sizes", "4-5-3"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.endswith(f"To go on: fastmlp sweep --resume {out}\n")
    run(capsys, "sweep", "--resume", out)


def test_all_diverge(capsys, sets, tmp_path):
    argv = ["sweep", *quick(sets), "--out", tmp_path / "sweep", "--lr", "1e9,1e10", "--sizes", "4-5-3"]
    assert cli.main([*map(str, argv), "--activation", "relu"]) == 1
    assert "all 2 members diverged; try learning rates (--lr) of a tenth" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "sweep")) == ["groups", "results.csv", "results.json", "sweep.json"]


def test_the_default_folder_and_its_claim(capsys, sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["sweep", *quick(sets), "--sizes", "4-5-3"]
    assert "table: runs/sweep/results.csv" in run(capsys, *argv)
    assert "table: runs/sweep-2/results.csv" in run(capsys, *argv)
    from fastmlp.base.atomic import Claim

    claim = Claim(tmp_path / "runs/sweep", CLAIM)
    assert "another sweep writes to runs/sweep" in run(capsys, "sweep", "--resume", "runs/sweep", code=2)
    claim.release()
    run(capsys, "sweep", "--resume", "runs/sweep")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", ""], "the list is empty; expected values separated by commas, such as 0.1,0.01"),
        (["--lr", "0.1,,0.2"], "'0.1,,0.2' has an empty place"),
        (["--lr", "0.1,fast"], "'fast' is not a finite number above 0"),
        (["--lr", "0.1,0.10"], "'0.1,0.10' has 0.10 twice"),
        (["--momentum", "0.9,1"], "'1' is not a finite number of at least 0 and below 1"),
        (["--activation", "relu,tanhh"], "Did you mean 'tanh'?"),
        (["--seeds", "0"], "'0' is no number of seeds from 1 to 1,000,000; expected how many, such as 5, or a list"),
        (["--seeds", "1,x"], "'1,x' is no whole number and no list of whole numbers"),
        (["--seeds", "1,-2"], "has a seed below 0"),
        (["--seeds", "4,4"], "has a seed twice"),
        (["--folds", "61"], "--folds: expected 2 to 60 folds for 60 training rows, got 61"),
        (["--folds", "1"], "1 is not in the range x>=2"),
        (["--folds", "3", "--validation", "0.1"], "give one of the two"),
        (["--validation", "0.001"], "--validation: 60 training rows cannot be divided"),
        (["--sizes", "5-4-3"], "--sizes 5-4-3 must start with 4 (features) and end with 3 classes"),
        (["--sizes", "4-5-3", "--sizes", "4-5-3"], "--sizes has the same sizes twice"),
        (["--optimizer", "adamw", "--momentum", "0.9"], "--optimizer adamw has no --momentum"),
        (["--loss", "hubert"], "Did you mean 'huber'?"),
        (["--dropout", "0,1"], "'1' is not a finite number of at least 0 and below 1"),
        (["--betas", "0.9", "0.99"], "--optimizer sgd has no --betas; it has --lr, "),
        (["--delta", "2"], "--loss cross_entropy has no --delta"),
        (["--class-weight", "1,2"], "expected --class-weight of shape [3], one value for each class, got [2]"),
        (["--param-group", "bias:lr=1", "--sizes", "4-5-3"], "no parameter of the model is named 'bias'"),
        (["--resume", "nowhere"], "leave out --data"),
    ],
)
def test_mistakes(capsys, sets, tmp_path, argv, words):
    out = tmp_path / "sweep"
    assert words in run(capsys, "sweep", "--data", sets / "classes.npz", "--out", out, *argv, code=2)
    assert not out.exists()


def test_mistakes_of_resume(capsys, tmp_path):
    assert "has no sweep; expected a folder with sweep.json" in run(capsys, "sweep", "--resume", tmp_path, code=2)
    for text, words in (("{", "is damaged: it is not JSON"), ("{}", "is no plan of a sweep")):
        (tmp_path / "sweep.json").write_text(text)
        assert words in run(capsys, "sweep", "--resume", tmp_path, code=2)
    for rest, words in (({"format_version": 9}, "has format version 9"), ({"format_version": 1}, "it lacks config")):
        (tmp_path / "sweep.json").write_text(json.dumps({"format": "fastmlp sweep", **rest}))
        assert words in run(capsys, "sweep", "--resume", tmp_path, code=2)


def test_a_variable_of_torchrun_that_is_no_number(capsys, sets, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "the variable WORLD_SIZE is 'two'" in run(capsys, "sweep", *quick(sets), code=2)


def two_processes(*argv: object) -> list[subprocess.CompletedProcess]:
    return ended(started(2, *argv))


def test_two_processes(request, capsys, sets, tmp_path):
    """The results are those of one process; mistakes are said once; an interrupted sweep goes on."""
    if not request.config.getoption("full"):
        pytest.skip("with --full")
    grid = ["--lr", "0.1,0.2", "--seeds", 3, "--sizes", "4-5-3", "--group", 2]
    one, out = tmp_path / "one", tmp_path / "two"
    swept(capsys, sets, one, *grid)
    first, second = two_processes("sweep", *quick(sets), *grid, "--out", out)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "6 members in 3 groups, float32, 2 processes" in first.stdout
    assert second.stdout == ""
    assert sorted(os.listdir(out)) == FILES
    expected, found = content(one), content(out)
    assert found["groups"] == expected["groups"]
    for member, other in zip(expected["members"], found["members"], strict=True):
        assert other == {
            name: pytest.approx(value, rel=1e-4) if "_loss" in name else value for name, value in member.items()
        }
    shutil.rmtree(out / "groups")
    first, second = two_processes("sweep", "--resume", out)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert content(out)["members"] == found["members"]
    first, second = two_processes("sweep", *quick(sets), "--out", out)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("fastmlp: error: ") == 1
    assert "has results already" in first.stderr
    assert "error" not in second.stderr
