"""``fastmlp train`` in several processes: the run of one process, written once; a death ends all."""

from __future__ import annotations

import signal

import pytest
import torch

from fastmlp import cli
from fastmlp.cli.ranks import Ranks
from fastmlp.train.engines import check_shares
from fastmlp.train.state import load_state
from tests.cli.processes import ended, started
from tests.cli.test_resume import outcome, table


def test_two_processes_are_one(tmp_path):
    """Batches, losses and parameters, the last batch smaller; and the run goes on in one process."""
    argv = ["--data", table(tmp_path, 142), "--sizes", "6-8-3", "--batch-size", 16, "--dtype", "float64"]
    argv += ["--ema-decay", 0.9, "--validation", 0.2, "--schedule", "constant", "--epochs"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([str(arg) for arg in ("train", *argv, 3, "--out", one)]) == 0
    first, second = ended(started(2, "train", *argv, 2, "--out", two))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "float64, step engine, 2 processes" in first.stdout
    assert second.stdout == ""
    assert cli.main(["train", "--resume", str(two), "--epochs", "3"]) == 0
    states = [load_state(folder / "last.safetensors") for folder in (one, two)]
    for part in ("model", "engine", "best"):
        expected, found = (getattr(state, part) or {} for state in states)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert [line[0] for line in outcome(one)["history"]] == [line[0] for line in outcome(two)["history"]]


def test_batches_that_cannot_be_divided(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Ranks, "__enter__", lambda ranks: ranks)
    monkeypatch.setattr(Ranks, "__exit__", lambda ranks, *error: None)
    monkeypatch.setattr(Ranks, "gather", lambda ranks, value: [value, value])
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["train", "--data", str(table(tmp_path)), "--sizes", "6-8-3"]
    assert cli.main([*argv, "--batch-size", "15"]) == 2
    assert "choose a --batch-size that is a multiple of 2, such as 16" in capsys.readouterr().err
    assert cli.main([*argv, "--engine", "autograd"]) == 2
    assert "--engine autograd trains in one process; leave out torchrun" in capsys.readouterr().err


def test_a_death_ends_the_others(request, tmp_path):
    """And a signal to one process stops all after the same step, with a run that goes on."""
    if not request.config.getoption("full"):
        pytest.skip("with --full")
    for number, code in ((signal.SIGKILL, 1), (signal.SIGTERM, 143)):
        out = tmp_path / str(number)
        argv = ["--data", "bundled", "--sizes", "784-64-10", "--epochs", 1000, "--out", out]
        processes = started(2, "train", *argv)
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("epoch"):
                break
        processes[1].send_signal(number)
        first, second = ended(processes)
        assert (first.returncode, second.returncode) == (code, -9 if number == signal.SIGKILL else 143)
        words = "another process" if number == signal.SIGKILL else "To go on after"
        assert words in first.stderr + first.stdout
        assert f"fastmlp train --resume {out}" in first.stderr + first.stdout
        assert load_state(out / "last.safetensors").epoch >= 1


def test_shares():
    check_shares(128, 60_000, 4)
    check_shares(8, 100, 4)
    with pytest.raises(ValueError, match=r"batches of 100 rows cannot be divided among 3 processes; .* such as 102"):
        check_shares(100, 1000, 3)
    with pytest.raises(ValueError, match="the last batch of 97 rows in batches of 32 has 1, fewer than the 4"):
        check_shares(32, 97, 4)
