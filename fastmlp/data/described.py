"""What data sets say of themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class Described:
    """A data set with a name, a split and an origin."""

    name: str
    split: str
    origin: str

    @property
    def source(self) -> str:
        """One line that names the data set, its size, split and origin."""
        return f"{self.name} {len(self)} {self.split} ({self.origin})"

    @property
    def published(self) -> str:
        """``source`` for files that leave this machine, with only the last name of a path. Every result shows it."""
        origin = Path(self.origin).name if os.path.isabs(self.origin) else self.origin
        return f"{self.name} {len(self)} {self.split} ({origin})"

    def __len__(self) -> int:
        raise NotImplementedError


def numbers(count: int) -> tuple[str, ...]:
    """The names of classes that have no names."""
    return tuple(map(str, range(count)))


def shown(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, for a message."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
