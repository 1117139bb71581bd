"""The results of a first contact: one JSON file that is whole at any time.

    {"format": 1, "rehearsal": bool, "started": ..., "limit_s": ...,
     "stages": {name: {"status": ..., "reason": ..., "seconds": ..., "units": ...}},
     "items": [{"stage": ..., "unit": ..., "name": ..., "status": ..., "reason": ..., ...}, ...]}

An item's status is "ok", "info" (a fact that is not judged), "wrong" (a result over its budget), "failed" (an
exception), "crashed", "hung", "unfinished" (killed at the end of its stage) or "skipped".
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

__all__ = ["BAD", "FILE_BYTES", "Document", "save_text"]

BAD = ("wrong", "failed", "crashed", "hung")
#: Bytes of one file in the folder of results, at most.
FILE_BYTES = 16 << 20
_ITEM_BYTES, _TEXT = 32 << 10, 1500


def save_text(path: Path, text: str) -> None:
    """Write at most ``FILE_BYTES`` to ``path``; a reader finds the old text or the whole new text."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.encode()[:FILE_BYTES])
    os.replace(temporary, path)


class Document:
    """The results so far; every change is on the disk when the call returns. Threads may share it.

    Attributes:
        data: the content, see above.
        unwritten: why the last write failed, or "".
    """

    def __init__(self, folder: Path, **head: Any) -> None:
        self.path = folder / "first_contact.json"
        self.data: dict[str, Any] = {"format": 1, **head, "stages": {}, "items": []}
        self.unwritten = ""
        self._lock = threading.Lock()
        self._bytes = 0

    def stage(self, name: str, **values: Any) -> None:
        """Set values of a stage."""
        with self._lock:
            self.data["stages"].setdefault(name, {}).update(values)
            self._save()

    def item(self, stage: str, unit: str, **values: Any) -> None:
        """Add an item. Texts are cut; an item of more than 32 KiB, or one that no longer fits the file, is left out."""
        cut = {key: value[-_TEXT:] if isinstance(value, str) else value for key, value in values.items()}
        item = {"stage": stage, "unit": unit, **cut}
        size = len(json.dumps(item))
        if size > _ITEM_BYTES:
            item = {"stage": stage, "unit": unit, "status": "failed", "reason": f"an item of {size:,} bytes"}
            size = len(json.dumps(item))
        with self._lock:
            if 2 * (self._bytes + size) > FILE_BYTES:  # the other half is for the stages and the indentation
                self.data["items_left_out"] = self.data.get("items_left_out", 0) + 1
            else:
                self._bytes += size
                self.data["items"].append(item)
            self._save()

    def items(self, stage: str) -> list[dict[str, Any]]:
        """The items of a stage."""
        return [item for item in self.data["items"] if item["stage"] == stage]

    def _save(self) -> None:
        try:
            lines = ",\n".join(json.dumps(item) for item in self.data["items"])
            head = {key: value for key, value in self.data.items() if key != "items"}
            save_text(self.path, json.dumps(head, indent=1)[:-2] + f',\n "items": [\n{lines}\n]\n}}\n')
            self.unwritten = ""
        except OSError as error:  # a full disk must not end the run, which also prints the verdict
            self.unwritten = f"{type(error).__name__}: {error}"
