"""The run folder of ``fastmlp train``: every file is written whole, by one process at a time.

After an epoch, the state to resume from is written first (`LAST`, one file), then the checkpoint, then the line of
`HISTORY`. Whichever of these files a process has written before it dies, the next process goes on from the state.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .drawing import PICTURES, draw
from .results_folder import ResultsFolder, check_free

if TYPE_CHECKING:
    from fastmlp.train import History
    from fastmlp.train.checkpoint import Checkpoint
    from fastmlp.train.judged import Judged
    from fastmlp.train.state import RunState

    from .inputs import Format

WEIGHTS, CONFIG, SUMMARY = "model.safetensors", "model.json", "summary.json"
LAST, HISTORY, EVALUATION, TENSORBOARD = "last.safetensors", "history.csv", "evaluation.safetensors", "tensorboard"
#: What tells that a folder has a run.
RESULTS = (WEIGHTS, CONFIG, LAST, HISTORY, EVALUATION, SUMMARY, *PICTURES.values())
#: The file that says which process is writing to the folder.
CLAIM = ".training"


def check_run_folder(folder: Path, overwrite: bool) -> None:
    """UserError if ``folder`` cannot become a run folder, or has a run and ``overwrite`` is not set."""
    check_free(folder, overwrite, RESULTS, LAST, "a run")


class Run(ResultsFolder):
    """The run folder, which keeps the results of a run; the command's help describes it.

    A context manager: the folder is this run's alone meanwhile, and a new folder without results is removed.

    Args:
        out: the folder; None: a new one in runs/, with the given ``name``.
        overwrite: replace the run that the folder has.
        resume: go on with the run that the folder has.
    """

    def __init__(self, out: str | None, name: str, overwrite: bool = False, *, resume: bool = False) -> None:
        from fastmlp.train.logs import CsvLog

        super().__init__(out, name, claim=CLAIM, what="training", option="--resume" if resume else "--out")
        try:
            # The claim's last owner may have finished a run just now.
            check_run_folder(self.folder, overwrite or resume)
        except BaseException:
            self.claim.release()
            raise
        self.epoch = 0
        self.step = 0
        self.wrote = False
        self.resumed = resume
        self.before = self._checkpoint()
        self.log = CsvLog(self.folder / HISTORY)
        self.is_logged = False

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def check_unchanged(self, since: os.stat_result) -> None:
        """UserError if another process went on with the run since its state was read."""
        with common.user_errors((OSError,)):
            now = os.stat(self.folder / LAST)
        if (now.st_ino, now.st_mtime_ns) != (since.st_ino, since.st_mtime_ns):
            raise common.UserError(f"another training has just gone on with {self.folder}; give the command again")

    def keep(self, state: RunState, model: Any, config: dict[str, Any]) -> None:
        """Write the state, and after an epoch also the checkpoint, if the epoch is the best so far, and the log.

        The first state removes the files that the run before wrote at its end. After this process's first epoch, the
        checkpoint and the whole log are written in any case, because the process before may have died before it wrote
        them.
        """
        from fastmlp.train.state import save_state

        with self._failures():
            save_state(self.folder / LAST, state)
            self.epoch, self.step = state.epoch, state.step
            if not self.wrote:
                for leftover in (SUMMARY, EVALUATION, *PICTURES.values()):
                    (self.folder / leftover).unlink(missing_ok=True)
                if not state.epoch:
                    (self.folder / HISTORY).unlink(missing_ok=True)
            self.wrote = True
            if state.step:
                return
            if state.history.best is state.history.last or not self.is_logged:
                self.save(model if state.best is None else _with(model, state.best), config, state.history)
            if self.is_logged:
                self.log(state.history.last)
            else:
                self.log.rewrite(state.history.epochs)
                self.is_logged = True

    def save(self, model: Any, config: dict[str, Any], history: History) -> None:
        """Replace the checkpoint by the model of the best epoch, which without validation data is the latest."""
        from fastmlp.train.checkpoint import save_checkpoint

        with self._failures():
            save_checkpoint(self.folder / WEIGHTS, model, config, vars(history.best))

    def state(self) -> str:
        """What the folder has of an unfinished run."""
        kept = self._checkpoint()
        if kept is None:
            return "No checkpoint was written"
        if not self.resumed and self.epoch == 0 and kept == self.before:
            return f"No checkpoint was written; that of the run before is still in {self.folder}"
        return f"The checkpoint of epoch {kept.metrics.get('epoch')} is in {self.folder}"

    def how_to_go_on(self) -> str:
        """The command that resumes the run; an empty text where there is nothing to resume."""
        if not (self.wrote or self.resumed):
            return ""
        where = f"after step {self.step} of epoch {self.epoch + 1}" if self.step else f"after epoch {self.epoch}"
        if not self.wrote:
            where = "from there"
        return f"To go on {where}: fastmlp train --resume {shlex.quote(str(self.folder))}"

    def finish(
        self, model: Any, form: Format, history: History, summary: dict[str, Any], judged: Judged | None
    ) -> None:
        """Write summary, evaluation and pictures. A picture that fails is a warning, and None in the summary."""
        from fastmlp.train.judged import save_judged

        with self._failures():
            self.log.rewrite(history.epochs)  # the best has its results on the test data only now
            if judged is not None:
                save_judged(self.folder / EVALUATION, judged)
            self._write_summary(summary)
            drawn, failed = draw(self.folder, model, form, history, summary, judged)
            for name, reason in failed.items():
                common.say("warning", f"{name} not drawn ({reason})")
            summary["curves"] = self.published(PICTURES["curves"]) if "curves" in drawn else None
            summary["pictures"] = {name: self.published(path.name) for name, path in drawn.items()}
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
            go_on = self.how_to_go_on()
            raise common.Failure(f"{error}. {self.state()}{f'. {go_on}' if go_on else ''}") from error

    def _write_summary(self, summary: dict[str, Any]) -> None:
        from fastmlp.base.atomic import atomic_write

        atomic_write(self.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def _with(model: Any, parameters: dict[str, Any]) -> Any:
    """A copy of the model with other parameters."""
    model = copy.deepcopy(model)
    model.load_state_dict(parameters)
    return model
