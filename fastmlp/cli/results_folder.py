"""A folder for the results of a command: one process at a time writes to it, and only --overwrite replaces results."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from . import common


def check_free(folder: Path, overwrite: bool, names: Sequence[str], state: str, what: str) -> None:
    """UserError if ``folder`` cannot get results, or has ``what`` already and ``overwrite`` is not set.

    Args:
        names: of the files that tell of results.
        state: the file among them that a command can go on from.
    """
    with common.user_errors((OSError,)):
        is_file = folder.exists() and not folder.is_dir()
        there = [name for name in names if (folder / name).exists()]
    if is_file:
        raise common.UserError(f"--out {folder} is a file; expected a folder, or a name that is free for one")
    if there and not overwrite:
        go_on = f", or go on with --resume {shlex.quote(str(folder))}" if state in there else ""
        raise common.UserError(
            f"--out {folder} has {what} already ({', '.join(there)}); give another folder, or --overwrite to replace "
            f"{'it' if what.startswith('a ') else 'them'}{go_on}"
        )


class ResultsFolder:
    """The folder, which is this process's alone until `release`.

    Args:
        out: the folder; None: a new one in runs/, NAME, or the first of NAME-2, NAME-3, ... that is free.
        name: of a new folder.
        claim: the file that says which process is writing.
        what: what is going on where another process is writing, such as "training".
        option: the option by which the user can name another folder.
    """

    def __init__(self, out: str | None, name: str, *, claim: str, what: str, option: str = "--out") -> None:
        from fastmlp.base.atomic import Claim

        with common.user_errors((OSError,)):
            self.is_new = out is None or not Path(out).exists()
            self.folder = _new_folder(Path("runs"), name) if out is None else Path(out)
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.claim = Claim(self.folder, claim)
            except BlockingIOError as error:
                raise common.UserError(
                    f"another {what} writes to {self.folder} ({error.strerror}); wait for its end, or give another "
                    f"folder with {option}"
                ) from error

    def release(self) -> None:
        """Give the folder back; a new folder without results is removed."""
        self.claim.release()
        with contextlib.suppress(OSError):
            if self.is_new:
                self.folder.rmdir()  # which an empty folder only can be

    def published(self, name: str) -> str:
        """The path of a result for files that leave this machine."""
        return str(Path(self.folder.name, name) if self.folder.is_absolute() else self.folder / name)


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
