"""Kills ``fastmlp train`` at random moments and resumes it, again and again.

    python -m tests.cli.killing FOLDER KILLS

The trainings are forks of this process, which has trained the same network for an epoch. So it has imported everything,
and a start takes no time. It has also measured who multiplies fastest, which is a part of the result, and which forks
that had to measure would each do for themselves. OMP_NUM_THREADS must be 1, because a fork has no threads of OpenMP.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import sys
import time
import warnings
from pathlib import Path

from matplotlib.figure import Figure

from fastmlp import cli
from fastmlp.train.checkpoint import load_checkpoint
from fastmlp.train.state import load_state
from tests.cli.test_resume import OPTIMIZERS, outcome, table

EPOCHS = 12
#: Longest pause in seconds between an epoch's line and the kill; an epoch takes about as long.
PAUSE = 0.04


def started(argv: list[str]) -> tuple[int, int]:
    """(process, pipe of its output) of a training."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.dup2(write, 1)
    os.dup2(write, 2)
    os._exit(cli.main(argv))


def finished(text: bytes) -> int:
    """The last epoch whose line is there."""
    lines = [line for line in text.decode().split("\n")[:-1] if line.startswith("epoch ")]
    return int(lines[-1].split()[1].partition("/")[0]) if lines else 0


def killed(argv: list[str], rng: random.Random) -> tuple[bool, int, str]:
    """(whether a training was killed before its end, its last epoch, its output)."""
    child, pipe = started(argv)
    text, wanted, until = b"", rng.randrange(4), None
    while True:
        if until is None and text.count(b"\nepoch ") >= wanted:
            until = time.monotonic() + rng.random() * PAUSE
        rest = 60.0 if until is None else max(0.0, until - time.monotonic())
        if select.select([pipe], [], [], rest)[0]:
            piece = os.read(pipe, 1 << 16)
            if not piece:
                break
            text += piece
        elif until is not None:
            os.kill(child, signal.SIGKILL)
            break
    while piece := os.read(pipe, 1 << 16):
        text += piece
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), finished(text), text.decode()


def main(folder: Path, kills: int) -> dict[str, object]:
    """Whole runs, killed runs, and how they compare."""
    data = str(table(folder, 800))
    assert os.environ["OMP_NUM_THREADS"] == "1"
    Figure.savefig = lambda self, buffer, format: buffer.write(b"a picture")  # no time for drawing
    rng, done, runs, lost = random.Random(kills), 0, 0, 0
    different: list[str] = []
    variants = [[*argv, *more] for argv in OPTIMIZERS.values() for more in ([], ["--validation", "0.2"])]
    wholes: dict[int, dict[str, object]] = {}
    while done < kills:
        variant = runs % len(variants)
        argv = ["train", "--data", data, "--sizes", "6-32-3", "--batch-size", "4", "--device", "cpu", "--lr", "0.01"]
        argv += ["--epochs", str(EPOCHS), *variants[variant]]
        if variant not in wholes:
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main([*argv, "--epochs", "1", "--out", str(folder / f"first{variant}")]) == 0
            child, pipe = started([*argv, "--out", str(folder / f"whole{variant}")])
            while os.read(pipe, 1 << 16):
                pass
            assert os.waitpid(child, 0)[1] == 0
            wholes[variant] = outcome(folder / f"whole{variant}")
        out = folder / f"run{runs}"
        runs += 1
        command, limit = [*argv, "--out", str(out)], min(kills, 8)
        while True:
            was_killed, epoch, text = killed(command, rng if done < kills and limit else Never())
            if not was_killed:
                break
            done, limit = done + 1, limit - 1
            found = 0
            with contextlib.suppress(FileNotFoundError):
                found = load_state(out / "last.safetensors").epoch
                command = ["train", "--resume", str(out)]
            if found:
                with contextlib.suppress(FileNotFoundError):  # the kill came between the first state and the checkpoint
                    load_checkpoint(out)
            elif out.exists() and not (out / "last.safetensors").exists():
                command = [*argv, "--out", str(out), "--overwrite"]
            lost += found < epoch
        if not (out / "summary.json").exists():
            different.append(f"{out.name} did not end: {text[-1000:]}")
        elif differences := [name for name, value in outcome(out).items() if value != wholes[variant][name]]:
            different.append(f"{out.name} {' '.join(variants[variant])}: {', '.join(differences)}")
    return {"kills": done, "runs": runs, "lost": lost, "different": different}


class Never(random.Random):
    """Lets a training end."""

    def randrange(self, *arguments: int) -> int:
        """More epochs than there are."""
        return 10**9


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
