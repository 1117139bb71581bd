"""A checkpoint survives: an error, an interrupt or a kill at any file call, and readers and writers at the same moment.

The tests print how many faults they made (``pytest -s``).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastmlp.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from tests.support.faults import KINDS, every_kill, every_point

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and kills of POSIX")


def model(epoch: int) -> torch.nn.Module:
    layer = torch.nn.Linear(3, 2)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, float(epoch))
    return layer


def save(folder: Path, epoch: int) -> None:
    save_checkpoint(folder, model(epoch), {"epoch": epoch}, {"epoch": epoch})


def loaded(folder: Path) -> int:
    """The epoch of the checkpoint, whose files must belong together."""
    state, config = load_checkpoint(folder)
    assert all((tensor == config["epoch"]).all() for tensor in state.values())
    return config["epoch"]


def empty(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def check_and_save_again(folder: Path) -> None:
    """The checkpoint is the old one or the new one, the next save works, and no stray file is left."""
    assert loaded(folder) in (1, 2)
    assert read_checkpoint(folder).metrics["epoch"] in (1, 2)
    save(folder, 3)
    assert loaded(folder) == 3
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_call(request, tmp_path, kind):
    if kind in ("ENOSPC", "EIO afterwards") and not request.config.getoption("full"):
        pytest.skip("with --full")
    folder = tmp_path / "run"

    def before() -> None:
        empty(folder)
        save(folder, 1)

    def work() -> None:
        with contextlib.suppress(*expected):
            save(folder, 2)

    expected = () if kind == "half" else (OSError, KeyboardInterrupt)
    points = Counter()
    for call in every_point(folder, kind, before, work):
        points[call] += 1
        check_and_save_again(folder)
    print(f"{kind}: {points.total()} faults, 0 losses: {dict(points)}")
    assert points["write"] >= 2
    if kind != "half":
        assert points["replace"] == 3
        assert points["fsync"] >= 4
        assert points.total() > 25


def test_a_kill_at_any_call(tmp_path):
    folder = tmp_path / "run"

    def before() -> None:
        empty(folder)
        save(folder, 1)

    killed = 0
    for _ in every_kill(folder, before, lambda: save(folder, 2)):
        killed += 1
        check_and_save_again(folder)
    print(f"{killed} kills, 0 losses")
    assert killed > 25


def test_a_kill_after_a_kill(request, tmp_path):
    """The checkpoint of a process that died between its last two renames is the good one of the next process."""
    if not request.config.getoption("full"):
        pytest.skip("with --full")
    folder = tmp_path / "run"

    def before() -> None:
        empty(folder)
        save(folder, 1)
        old = (folder / "model.safetensors").read_bytes()
        save(folder, 2)
        digest = read_checkpoint(folder).sha256[:16]
        (folder / "model.safetensors").rename(folder / f".model.safetensors.{digest}.new")
        (folder / "model.safetensors").write_bytes(old)
        assert loaded(folder) == 2

    killed = 0
    for _ in every_kill(folder, before, lambda: save(folder, 3)):
        killed += 1
        assert loaded(folder) in (2, 3)
    assert killed > 25


def test_readers_and_writers_at_the_same_moment(tmp_path):
    """Two threads save, of which each has locks of its own, and every read finds files that belong together."""
    save(tmp_path, 0)
    failures = []

    def write(epochs: range) -> None:
        try:
            for epoch in epochs:
                save(tmp_path, epoch)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(range(start, 60, 2),)) for start in (1, 2)]
    for writer in writers:
        writer.start()
    reads = Counter()
    while any(writer.is_alive() for writer in writers):
        reads[loaded(tmp_path)] += 1
    assert failures == []
    assert loaded(tmp_path) in (58, 59)
    assert len(reads) > 1
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
