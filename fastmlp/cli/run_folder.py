"""The run folder of ``fastmlp train``: checkpoint, summary and curves, each written whole, by one process at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from fastmlp.train import EpochResult, History
    from fastmlp.train.checkpoint import Checkpoint

WEIGHTS, CONFIG, CURVES, SUMMARY = "model.safetensors", "model.json", "curves.png", "summary.json"
#: The file that says which process is writing to the folder.
CLAIM = ".training"


def check_run_folder(folder: Path, overwrite: bool) -> None:
    """UserError if ``folder`` cannot become a run folder, or has a run and ``overwrite`` is not set."""
    with common.user_errors((OSError,)):
        is_file = folder.exists() and not folder.is_dir()
        there = [name for name in (WEIGHTS, CONFIG, CURVES, SUMMARY) if (folder / name).exists()]
    if is_file:
        raise common.UserError(f"--out {folder} is a file; expected a folder, or a name that is free for one")
    if there and not overwrite:
        raise common.UserError(
            f"--out {folder} has a run already ({', '.join(there)}); give another folder, or --overwrite to replace it"
        )


class Run:
    """The run folder, which keeps the results of a run; the command's help describes it.

    A context manager: the folder is this run's alone meanwhile, and a new folder without results is removed.
    """

    def __init__(self, out: str | None, name: str, overwrite: bool = False) -> None:
        from fastmlp.base.atomic import Claim

        with common.user_errors((OSError,)):
            self.is_new = out is None or not Path(out).exists()
            self.folder = _new_folder(Path("runs"), name) if out is None else Path(out)
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.claim = Claim(self.folder, CLAIM)
            except BlockingIOError as error:
                raise common.UserError(
                    f"another training writes to {self.folder} ({error.strerror}); wait for its end, or give another "
                    "folder with --out"
                ) from error
        try:
            check_run_folder(self.folder, overwrite)  # the claim's last owner may have finished a run just now
        except BaseException:
            self.claim.release()
            raise
        self.epoch = 0
        self.before = self._checkpoint()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.claim.release()
        with contextlib.suppress(OSError):
            if self.is_new:
                self.folder.rmdir()  # which an empty folder only can be

    def save(self, model: Any, config: dict[str, Any], result: EpochResult) -> None:
        """Replace the checkpoint after an epoch; the first epoch also removes the results of the run before."""
        from fastmlp.train.checkpoint import save_checkpoint

        with self._failures():
            save_checkpoint(self.folder / WEIGHTS, model, config, vars(result))
            if self.epoch == 0:
                for leftover in (CURVES, SUMMARY):
                    (self.folder / leftover).unlink(missing_ok=True)
        self.epoch = result.epoch

    def state(self) -> str:
        """What the folder has of an unfinished run."""
        kept = self._checkpoint()
        if kept is None:
            return "No checkpoint was written"
        if self.epoch == 0 and kept == self.before:
            return f"No checkpoint was written; that of the run before is still in {self.folder}"
        return f"The checkpoint of epoch {kept.metrics.get('epoch')} is in {self.folder}"

    def published(self, name: str) -> str:
        """The path of a result, as files have it that leave this machine."""
        return str(Path(self.folder.name, name) if self.folder.is_absolute() else self.folder / name)

    def finish(self, history: History, summary: dict[str, Any]) -> None:
        """Write summary and curves. A picture that fails is a warning, and None in the summary."""
        with self._failures():
            self._write_summary(summary)
            try:
                self._draw(history, summary)
            except Exception as error:
                common.say("warning", f"the curves were not drawn ({type(error).__name__}: {error})")
                summary["curves"] = None
                self._write_summary(summary)

    def _checkpoint(self) -> Checkpoint | None:
        """The checkpoint in the folder; None where there is none, or a damaged one."""
        from fastmlp.train.checkpoint import CheckpointError, read_checkpoint

        try:
            return read_checkpoint(self.folder / WEIGHTS)
        except (OSError, CheckpointError):
            return None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Report that a file could not be written, and what the folder has."""
        try:
            yield
        except OSError as error:
            raise common.Failure(f"{error}. {self.state()}") from error

    def _write_summary(self, summary: dict[str, Any]) -> None:
        from fastmlp.base.atomic import atomic_write

        atomic_write(self.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def _draw(self, history: History, summary: dict[str, Any]) -> None:
        from fastmlp.train.plots import plot_history

        config = summary["config"]
        momentum = f"{'Nesterov ' if config['nesterov'] else ''}momentum {config['momentum']:g}"
        plot_history(
            history,
            self.folder / CURVES,
            title=f"{'-'.join(map(str, config['sizes']))}, {config['activation']}",
            subtitle=f"SGD, learning rate {config['lr']:g} ({config['schedule']}), {momentum}, "
            f"batch {config['batch_size']}, {config['dtype']}, seed {config['seed']}",
            caption=f"{summary['dataset']}\n{summary['device_name']}, {summary['backend']} backend, "
            f"{summary['images_per_second']:,.0f} images/s, torch {summary['versions']['torch']}",
        )


def _new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or the first of name-2, name-3, ... that is free."""
    folder, number = parent / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{name}-{number}"
