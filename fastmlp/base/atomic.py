"""The user's cache folder, and writing files so that a reader never sees half a file."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder of what fastmlp can make again: ``fastmlp`` in the operating system's folder for caches.

    The latter is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local").expanduser() / "fastmlp" / "Cache"
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    # os.path.expanduser, unlike Path's method, does not raise for a user without a home.
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or default)) / "fastmlp"


def atomic_write(path: str | os.PathLike[str], content: bytes | bytearray | memoryview) -> None:
    """Write ``content`` to ``path``: afterwards the file is either the old one or the whole new one.

    The bytes go to a new file in the same folder, which then takes the place of ``path``. Missing parent folders
    are made, and the file gets the permissions that ``open`` would give it.

    Raises:
        OSError: the folder cannot be made or written to; ``path`` is then unchanged.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A file of tempfile.mkstemp would be readable by its owner only, after the rename too.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
