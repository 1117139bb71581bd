"""Logs of a run: a line per epoch in history.csv, and scalars for TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.atomic import atomic_write
from .results import EpochResult, History

COLUMNS = tuple(field.name for field in dataclasses.fields(EpochResult))
"""The columns of history.csv."""


def _lines(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


class CsvLog:
    """``history.csv``: a header, and a line per epoch, with the fields of `EpochResult`; None is an empty field.

    ``on_epoch=CsvLog("history.csv")`` begins a new file with the first epoch. Each line is one write of the system, so
    a process that is killed leaves whole lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._began = False

    def __call__(self, result: EpochResult) -> None:
        """Add the line of an epoch."""
        if not self._began:
            self.rewrite([result])
            return
        opened = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            line = memoryview(_lines([tuple(vars(result).values())]))
            while line:
                line = line[os.write(opened, line) :]
        finally:
            os.close(opened)

    def rewrite(self, results: Sequence[EpochResult]) -> None:
        """Replace the file, as a whole, by one with these epochs."""
        atomic_write(self.path, _lines([COLUMNS, *(tuple(vars(result).values()) for result in results)]))
        self._began = True


def read_csv(path: str | os.PathLike[str], loss: str = "cross_entropy") -> History:
    """The history that `CsvLog` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    results = []
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            found: dict[str, Any] = {name: float(text) if text else None for name, text in row.items()}
            if not set(found) <= set(COLUMNS) or not found.get("epoch"):
                raise ValueError(f"{os.fspath(path)} has no line of an epoch in {row}")
            results.append(EpochResult(**{**found, "epoch": int(found["epoch"])}))
    return History(results, loss)


class TensorBoardLog:
    """``on_epoch=TensorBoardLog(folder)``: losses, metrics and speed of each epoch, for TensorBoard.

    TensorBoard shows nothing that an earlier log of the folder wrote. A second call for an epoch writes what the first
    call did not have, such as the results on the test data.

    Args:
        folder: gets torch's files of events.
        earlier: epochs of the run that an earlier process trained. They are written anew, because that process may have
            died before it wrote the last of them.

    Raises:
        ModuleNotFoundError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], earlier: Sequence[EpochResult] = ()) -> None:
        self._writer = _writer()(os.fspath(folder), purge_step=1)
        self._written: set[tuple[str, int]] = set()
        for result in earlier:
            self(result)

    def __call__(self, result: EpochResult) -> None:
        """Write the scalars of an epoch, such as loss/train and accuracy/validation."""
        for name, value in vars(result).items():
            if value is None or name == "epoch" or (name, result.epoch) in self._written:
                continue
            split, _, kind = name.partition("_")
            is_score = split in ("train", "validation", "test")
            self._writer.add_scalar(f"{kind}/{split}" if is_score else f"speed/{name}", value, result.epoch)
            self._written.add((name, result.epoch))
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _writer() -> Any:
    """torch's writer; ModuleNotFoundError where it cannot be."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"logs for TensorBoard need the package tensorboard, which is not installed ({error}); "
            "install it with: pip install tensorboard"
        ) from error
    return SummaryWriter


def check_tensorboard() -> None:
    """ModuleNotFoundError where the package tensorboard is not installed."""
    _writer()
