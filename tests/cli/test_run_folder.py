"""The run folder: one owner, faults at every file call, full disks, signals, and what files say of the machine."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastmlp
from fastmlp import cli
from fastmlp.cli import common
from fastmlp.cli.progress import Reporter
from fastmlp.cli.run_folder import CLAIM, Run
from fastmlp.cli.run_folder import RESULTS as NAMES
from fastmlp.data import ImageDataset, dataset, fashion_mnist, load_fashion_mnist
from fastmlp.train import loop, plots
from fastmlp.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from tests.support.faults import KINDS, every_point, fault

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and signals of POSIX")
RESULTS = sorted(NAMES)
SMALL = ["--sizes", "784-4-10", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture
def small(monkeypatch):
    """40 images, no time for drawing, and the numbers of the epochs in every checkpoint's place."""
    train, test = load_fashion_mnist(source="bundled")

    def first(data: ImageDataset) -> ImageDataset:
        return dataclasses.replace(data, images=data.images[:40], labels=data.labels[:40])

    monkeypatch.setattr(common, "load_data", lambda source, device, loss: (first(train), first(test)))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, buffer, format: buffer.write(b"a picture"))
    monkeypatch.setattr("fastmlp.cli.train.common.versions", lambda: {"torch": "0"})


def train(out: Path, *more: object) -> int:
    return cli.main(["train", *SMALL, "--out", str(out), *map(str, more)])


def epoch_of(out: Path) -> int:
    """The epoch of the folder's checkpoint, whose two files must belong together."""
    load_checkpoint(out)
    return read_checkpoint(out).metrics["epoch"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_call_of_a_training(request, tmp_path, small, capsys, kind):
    """A good run is replaced; whatever fails, the folder's checkpoint loads, and the error is one line."""
    full = request.config.getoption("full")
    if kind in ("ENOSPC", "EIO afterwards") and not full:
        pytest.skip("with --full")
    good, out = tmp_path / "good", tmp_path / "run"
    assert train(good) == 0
    codes = Counter()

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(good, out)
        capsys.readouterr()

    def work() -> None:
        codes[train(out, "--overwrite", "--seed", 1)] += 1

    points = Counter()
    for call in every_point(out, kind, before, work, 1 if full else 10):
        points[call] += 1
        lines = capsys.readouterr().err.split("\n")
        lines = [line for line in lines if line]
        assert len(lines) <= 2, lines
        assert all(line.startswith("fastmlp: ") for line in lines)
        assert epoch_of(out) in (1, 2)
    print(f"{kind}: {points.total()} faults, 0 losses, exit codes {dict(codes)}")
    assert points.total() >= (1 if kind == "half" else 120 if full else 10)
    assert set(codes) <= ({0, 130} if kind == "interrupt" else {0} if kind == "half" else {0, 1, 2})
    assert train(out, "--overwrite") == 0
    assert sorted(os.listdir(out)) == RESULTS


def test_a_full_disk(tmp_path, small, capsys, monkeypatch):
    """The message names the file, what is kept and how to go on; the exit code says that the work failed."""
    out, write = tmp_path / "run", os.write

    def full(opened: int, data: memoryview) -> int:
        if (out / "history.csv").exists():  # after the first epoch
            raise OSError(28, "No space left on device")
        return write(opened, data)

    monkeypatch.setattr(os, "write", full)
    assert train(out) == 1
    error = capsys.readouterr().err
    assert f"No space left on device: '{out}/last.safetensors'. The checkpoint of epoch 1 is in {out}. " in error
    assert f"To go on after epoch 1: fastmlp train --resume {out}\n" in error
    monkeypatch.setattr(os, "write", write)
    assert epoch_of(out) == 1
    assert sorted(os.listdir(out)) == ["history.csv", "last.safetensors", "model.json", "model.safetensors"]
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert sorted(os.listdir(out)) == RESULTS


def test_a_full_disk_from_the_start(tmp_path, small, capsys):
    out = tmp_path / "run"
    with fault(out, 6, "ENOSPC"):
        assert train(out) in (1, 2)
    assert "No space left on device" in capsys.readouterr().err
    assert not out.exists()


def test_a_picture_that_fails(tmp_path, small, capsys, monkeypatch):
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(plots, "plot_history", broken)
    assert train(tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert captured.err == "fastmlp: warning: the curves were not drawn (ValueError: no font)\n"
    assert "curves.png" not in captured.out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["curves"] is None
    assert set(summary["pictures"]) == {"confusion", "mistakes", "weights"}


def test_a_log_that_cannot_be_written_ends_no_training(tmp_path, small, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert train(tmp_path / "run") == 0
    assert sorted(os.listdir(tmp_path / "run")) == RESULTS


def test_two_trainings_of_one_folder(tmp_path, small, capsys, monkeypatch):
    """The second is refused while the first runs, with --overwrite too, and the first one's results stay."""
    fit, second = loop.fit, []

    def and_meanwhile(*arguments: object, **options: object) -> object:
        monkeypatch.setattr("fastmlp.train.fit", fit)
        second.append(train(tmp_path / "run", "--overwrite"))
        return fit(*arguments, **options)

    monkeypatch.setattr("fastmlp.train.fit", and_meanwhile)
    assert train(tmp_path / "run") == 0
    assert second == [2]
    error = capsys.readouterr().err
    assert f"another training writes to {tmp_path / 'run'} (process {os.getpid()} is using the folder)" in error
    assert "wait for its end, or give another folder with --out" in error
    assert sorted(os.listdir(tmp_path / "run")) == RESULTS


def test_a_run_that_appears_before_the_claim(tmp_path):
    """Both trainings found the folder free at their start."""
    save_checkpoint(tmp_path, fastmlp.MLP((4, 2)), {})
    with pytest.raises(common.UserError, match="has a run already"):
        Run(str(tmp_path), "")
    assert not (tmp_path / CLAIM).exists()


def test_one_of_many_trainings_gets_the_folder(tmp_path):
    runs, refused, start = [], [], threading.Barrier(6)

    def begin() -> None:
        start.wait(60)
        try:
            runs.append(Run(str(tmp_path / "run"), ""))
        except common.UserError as error:
            refused.append(error.message)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(runs), len(refused)) == (1, 5)
    with runs[0]:
        assert os.listdir(tmp_path / "run") == [CLAIM]
    assert not (tmp_path / "run" / CLAIM).exists()


@pytest.fixture
def interruptible():
    """A shell starts its background jobs with SIGINT ignored, and then Python makes no KeyboardInterrupt of it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("when", ["before the training", "within an epoch", "after an epoch", "with a run before"])
def test_signals(tmp_path, small, capsys, monkeypatch, interruptible, sent, when):
    """The steps of a stretch are finished and kept; the exit code is that of the signal."""
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    out, stretch = tmp_path / "run", {"within an epoch": 2, "after an epoch": 3}.get(when, 1)
    if when == "with a run before":
        assert train(out) == 0
    before, moved, seen = signal.getsignal(signal.SIGTERM), Reporter.progress, []

    def progress(self: Reporter, progress: object) -> None:
        moved(self, progress)
        seen.append(progress)
        if len(seen) == stretch:
            os.kill(os.getpid(), sent)

    def killed(source: object, device: object, loss: object) -> None:
        os.kill(os.getpid(), sent)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "progress", progress)
        if when == "before the training":
            patch.setattr(common, "load_data", killed)
        capsys.readouterr()
        assert train(out, "--overwrite", "--seed", 1) == {signal.SIGINT: 130, signal.SIGTERM: 143}[sent]
    captured = capsys.readouterr()
    assert captured.err.strip() == {signal.SIGINT: "fastmlp: interrupted", signal.SIGTERM: "fastmlp: terminated"}[sent]
    assert signal.getsignal(signal.SIGTERM) == before
    if when == "before the training":
        assert not out.exists()
        return
    if when == "after an epoch":
        text, files = "The checkpoint of epoch 1 is in {0}\nTo go on after epoch 1: ", len(RESULTS) - 6
    elif when == "within an epoch":
        text, files = "No checkpoint was written\nTo go on after step 4 of epoch 1: ", 1
    else:
        text, files = "No checkpoint was written; that of the run before is still in {0}\nTo go on after step 2 of ", 3
    assert f"{text.format(out)}" in captured.out
    assert f"fastmlp train --resume {out}\n" in captured.out
    assert len(os.listdir(out)) == files
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert train(tmp_path / "whole", "--seed", 1) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_second_signal_ends_the_run_at_once(tmp_path, small, capsys, monkeypatch, interruptible):
    def twice(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was ignored")

    monkeypatch.setattr("fastmlp.train.fit", twice)
    assert train(tmp_path / "run") == 130
    assert "No checkpoint was written\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_killed_training_and_the_next_one(request, tmp_path, small):
    """SIGKILL at some moment of a real process: what the folder has loads, and the next training cleans it up."""
    out = tmp_path / "run"
    argv = ["train", "--data", "bundled", "--sizes", "784-8-10", "--epochs", "3000", "--out", str(out), "--overwrite"]
    for attempt in range(20 if request.config.getoption("full") else 1):
        command = [sys.executable, "-m", "fastmlp", *argv]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
            lines = (line for line in child.stdout if line.startswith("epoch"))
            for _ in range(3 + attempt):
                next(lines)
            child.kill()
        assert epoch_of(out) >= 2
        assert train(out, "--overwrite") == 0
        assert sorted(os.listdir(out)) == RESULTS


def test_no_file_has_a_path_of_the_machine(tmp_path, small, monkeypatch):
    """The data's folder and the run folder are below tmp_path."""
    loaded = common.load_data

    def from_a_folder(source: str, device: torch.device, loss: str) -> tuple[ImageDataset, ...]:
        return tuple(dataclasses.replace(d, origin=str(tmp_path / "my data")) for d in loaded(source, device, loss))

    captions = []
    monkeypatch.setattr(common, "load_data", from_a_folder)
    monkeypatch.setattr(plots, "plot_history", lambda *args, **options: captions.extend(options.values()))
    assert train(tmp_path / "run") == 0
    # last.safetensors has the options of the run, which are for this machine; no curves were drawn.
    names = {*RESULTS} - {"last.safetensors", "curves.png"}
    files = "".join((tmp_path / "run" / name).read_text(errors="replace") for name in names)
    for text in (files, *captions):
        assert str(tmp_path) not in text
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["dataset"] == "FashionMNIST subset 40 train (my data)"
    assert summary["checkpoint"] == "run/model.safetensors"
    assert summary["curves"] == "run/curves.png"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--out", ""], "'--out': expected the name of a folder, got an empty text"),
        (["eval", ""], "'CHECKPOINT': expected the name of a folder"),
        (["train", "--data", ""], "'--data': expected the name of a folder"),
        (["reproduce", "--all", "--plot", ""], "'--plot': expected the name of a folder"),
        (["bench", "quick", "--out", ""], "'--out': expected a path, got an empty text"),
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["bench", "qiuck"], "No such command 'qiuck'. Did you mean 'quick'?"),
        (["train", "--activation", "Relu"], "Did you mean 'relu'?"),
        (["train", "--dtype", "fp16"], "Did you mean 'float16'?"),
        (["train", "--backend", "tritn"], "Did you mean 'triton'?"),
        (["reproduce", "derivative"], "unknown system 'derivative'; expected one of"),
        (["reproduce", "derivative"], "Did you mean 'derivatives'?"),
    ],
)
def test_wrong_words(capsys, argv, words):
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_errors_speak_of_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "SOURCES", ("bundled",))
    warnings.simplefilter("default")
    for argv in (["train", "--data", tmp_path], ["train", *SMALL, "--backend", "triton"], ["reproduce", "basic"]):
        if "triton" in argv and os.environ.get("TRITON_INTERPRET") == "1":
            continue
        assert cli.main([str(arg) for arg in argv]) == 2
        error = capsys.readouterr().err
        assert "--data" in error or "--backend" in error
        assert "root=" not in error
        assert "ave root" not in error
        assert "backend '" not in error.partition("; ")[2]


def test_an_exploded_loss_is_a_divergence(tmp_path, capsys):
    """Saturated units keep the loss finite."""
    argv = ["--data", "bundled", "--sizes", "784-8-10", "--lr", "1e10", "--activation", "sigmoid"]
    assert cli.main(["train", *argv, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "training diverged: the loss became " in error
    assert "100 times that of a guess" in error
    assert "Try a learning rate of 1e+09 or smaller (--lr). No checkpoint was written" in error
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_promise_too_much(tmp_path, capsys, monkeypatch):
    """The shapes of the weights are compared before a model of these sizes gets memory."""
    for sizes in ([784, 1_500_000, 10], [784, 2**62, 10], [784] + [2] * 100_000 + [10]):
        save_checkpoint(tmp_path, fastmlp.MLP((784, 3, 10)), {"sizes": sizes, "activation": "relu"})
        with monkeypatch.context() as patch:
            patch.setattr("fastmlp.train.checkpoint.load_tensors", None)
            assert cli.main(["eval", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_quick_form_takes_the_same_images_everywhere(tmp_path, monkeypatch):
    """The bundled subset is what the full data has in its rows, and without --data it is always taken."""
    from fastmlp.recipes import base

    bundled = load_fashion_mnist(source="bundled")
    generator = torch.Generator().manual_seed(0)

    def longer(data: ImageDataset) -> ImageDataset:
        """The subset, with further images of each class behind."""
        labels = torch.randint(0, 10, (900,), generator=generator)
        images = torch.randint(0, 256, (900, 784), generator=generator, dtype=torch.uint8)
        full = torch.cat((data.images, images)), torch.cat((data.labels, labels))
        return ImageDataset(*full, "FashionMNIST", data.split, str(tmp_path), data.classes)

    def load(root: str | None = None, **options: object) -> tuple[ImageDataset, ...]:
        return tuple(map(longer, bundled)) if root else load_fashion_mnist(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "load_fashion_mnist", load)
    assert fashion_mnist.SUBSET["train"][0].shape[0] == 6000
    for data in (None, "bundled", str(tmp_path)):
        for found, expected in zip(base.Settings(quick=True, data=data).images(), bundled, strict=True):
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.labels, expected.labels)
