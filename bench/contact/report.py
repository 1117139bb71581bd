"""What a process of a stage knows about its run, and how it sends its results."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import Device

__all__ = ["Report"]


@dataclass
class Report:
    """Passed to ``units`` and ``run`` of every stage.

    Attributes:
        results: the descriptor of the pipe to the command.
        out: the folder of results, for the few files beside the JSON.
        rehearsal: whether there is no GPU: small sizes, and no times.
        workers: how many processes a unit may start.
        spent: set by a unit after which the process must be replaced.
        until: the time at which the unit should have ended, by ``time.monotonic``.
    """

    results: int
    out: Path
    rehearsal: bool
    workers: int = 1
    spent: bool = False
    until: float = math.inf
    _device: Device | None = None

    @property
    def device(self) -> Device:
        """The GPU or its stand-in; a stage with ``DEVICE = False`` has none."""
        assert self._device is not None, "the stage's module says DEVICE = False"
        return self._device

    @property
    def seconds_left(self) -> float:
        """Seconds until the unit should have ended."""
        return self.until - time.monotonic()

    def send(self, message: dict[str, Any]) -> None:
        """Send one line to the command."""
        data = (json.dumps(_plain(message)) + "\n").encode()
        while data:
            data = data[os.write(self.results, data) :]

    def item(self, name: str, status: str = "ok", reason: str = "", **values: Any) -> None:
        """Send one result; ``document`` explains the statuses."""
        self.send({"name": name, "status": status, **({"reason": reason} if reason else {}), **values})

    def share(self, name: str, share: float, **values: Any) -> None:
        """Send an error as a share of its budget: right up to 1; NaN is wrong."""
        self.item(name, "ok" if share <= 1 else "wrong", share=share, **values)

    def exception(self, name: str, error: BaseException) -> None:
        """Send the exception of a unit or of a part of it."""
        first = str(error).strip().splitlines()
        where = traceback.extract_tb(error.__traceback__)
        lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in where[-4:]]
        reason = f"{type(error).__name__}: {first[0] if first else ''}"
        self.item(name, "failed", reason[:500], where=lines, text=str(error)[:1200])


def _plain(value: Any) -> Any:
    """A value for JSON: NaN and unknown types as text, and numbers with five digits."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int, type(None))) else str(value)
