"""What a process of a stage knows of its run, and how it tells what it found."""

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
        out: the folder of results, for the few files beside the JSON.
        rehearsal: no GPU: small sizes, and no times.
        device: the GPU or its stand-in; None for a stage that asks for none.
        workers: how many processes a unit may start for itself.
        spent: set by a unit that leaves the process in a state that no other unit should meet; a new one follows.
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
        """The GPU or its stand-in."""
        assert self._device is not None, "the stage's module says DEVICE = False"
        return self._device

    @property
    def seconds_left(self) -> float:
        """Until the unit should have ended."""
        return self.until - time.monotonic()

    def send(self, message: dict[str, Any]) -> None:
        """One line to the command."""
        data = (json.dumps(_plain(message)) + "\n").encode()
        while data:
            data = data[os.write(self.results, data) :]

    def item(self, name: str, status: str = "ok", reason: str = "", **values: Any) -> None:
        """One result; ``document`` says what the statuses mean."""
        self.send({"name": name, "status": status, **({"reason": reason} if reason else {}), **values})

    def share(self, name: str, share: float, **values: Any) -> None:
        """An error as a share of its budget: right up to 1, and NaN is wrong."""
        self.item(name, "ok" if share <= 1 else "wrong", share=share, **values)

    def exception(self, name: str, error: BaseException) -> None:
        """A unit or a part of it that raised."""
        first = str(error).strip().splitlines()
        where = traceback.extract_tb(error.__traceback__)
        lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in where[-4:]]
        reason = f"{type(error).__name__}: {first[0] if first else ''}"
        self.item(name, "failed", reason[:500], where=lines, text=str(error)[:1200])


def _plain(value: Any) -> Any:
    """For JSON: no NaN, which is no JSON, no more digits than a result has, and text for what is unknown."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int, type(None))) else str(value)
