"""The user's cache folder, and files that several processes read and write at once.

A reader sees the old file or the whole new file, whatever happens to the writer. Writers of one folder take turns: each
holds a lock of the operating system on the folder, which ends with the process. A temporary file that a writer finds is
therefore the leftover of a process that died, and the writer removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

#: Seconds that a writer waits for its turn; the second number is for files that can be made again.
LOCK_TIMEOUT, CACHE_TIMEOUT = 60.0, 10.0
#: Where folders cannot be locked, a temporary file of this age (seconds) counts as left over.
ABANDONED_AFTER = 24 * 3600
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def cache_folder() -> Path:
    """The folder of what fastmlp can make again: ``fastmlp`` in the operating system's folder for caches.

    The latter is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local").expanduser() / "fastmlp" / "Cache"
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    # os.path.expanduser, unlike Path's method, does not raise for a user without a home.
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or default)) / "fastmlp"


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A FIFO would block, and a device may never end.

    Raises:
        OSError: there is no such file, or the path is a folder, a FIFO, a socket or a device.
    """
    _check_regular(os.stat(path), path)
    # Should a FIFO take the place of the file now, O_NONBLOCK keeps the call from waiting.
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(opened), path)
        return os.fdopen(opened, "rb")
    except BaseException:
        os.close(opened)
        raise


def _check_regular(about: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file, got a device, FIFO or socket", os.fspath(path))


def read_file(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes; OSError as `open_file`, and for a larger file."""
    with open_file(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"expected at most {most:,} bytes, got a larger file", os.fspath(path))
    return content


def atomic_write(path: str | os.PathLike[str], content: bytes | bytearray | memoryview) -> None:
    """Write ``content`` to ``path``: afterwards the file is either the old one or the whole new one.

    The bytes go to a new file in the same folder, which then takes the place of ``path``. Missing parent folders
    are made, and the file gets the permissions that ``open`` would give it.

    Raises:
        OSError: the folder cannot be made or written to; ``path`` is then the old file or the whole new one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(target.parent) as locked:
        replace_file(target, content, locked)


def update_file(path: Path, most: int, change: Callable[[bytes], bytes]) -> None:
    """Replace the content of ``path``, a file of the cache, by what ``change`` makes of it. Processes take turns.

    ``change`` gets no bytes where there is no file, or a file of more than ``most`` bytes.

    Raises:
        OSError: the file cannot be read or replaced; as `atomic_write`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(path.parent, CACHE_TIMEOUT) as locked:
        try:
            content = read_file(path, most)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EFBIG):
                raise
            content = b""
        replace_file(path, change(content), locked)


def replace_file(
    target: Path,
    content: bytes | bytearray | memoryview | Sequence[memoryview],
    locked: bool,
    final: Path | None = None,
    *,
    sync_names: bool = True,
) -> None:
    """`atomic_write` for a caller inside `folder_lock`, which gave ``locked``.

    Errors and temporary files have the name of ``final``, by default ``target``. Without ``sync_names`` a power cut
    may leave the old file, because the new name is not written to the disk at once.
    """
    final = target if final is None else final
    sweep(final.parent, f".{final.name}.", ".tmp", locked)
    # A file of tempfile.mkstemp would be readable by its owner only, after the rename too.
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write(temporary, content)
        os.replace(temporary, target)
        if sync_names:
            sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(final)) from error
        raise


def _write(path: Path, content: bytes | bytearray | memoryview | Sequence[memoryview]) -> None:
    """Write a new file to the disk, not only to the system's memory: a rename may reach the disk before the bytes."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for piece in [content] if isinstance(content, (bytes, bytearray, memoryview)) else content:
            rest = memoryview(piece).cast("B")
            while rest:
                rest = rest[os.write(opened, rest) :]
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(folder: Path) -> None:
    """Write the names in ``folder`` to the disk, where the system can: a rename is one of these names."""
    if os.name != "posix":
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not listed
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # the same numbers say that the file system cannot do this to a folder
            raise
    finally:
        os.close(opened)


def sweep(folder: Path, prefix: str, suffix: str, locked: bool, keep: str = "") -> None:
    """Remove the files and folders that writers left in ``folder``, with names from ``prefix`` to ``suffix``.

    Call inside `folder_lock`, which gave ``locked``: nobody else is writing then. Without a lock, and where the middle
    of the name is not 16 hexadecimal digits, only what has a certain age is removed. The file named ``keep`` stays, and
    so does what cannot be removed.
    """
    ours = re.compile(f"{re.escape(prefix)}(.+){re.escape(suffix)}")
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            found = ours.fullmatch(name)
            if found is None or name == keep:
                continue
            path = folder / name
            with contextlib.suppress(OSError):
                about = os.stat(path)
                is_new = time.time() - about.st_mtime < ABANDONED_AFTER
                if is_new and not (locked and re.fullmatch("[0-9a-f]{16}", found[1])):
                    continue
                if stat.S_ISDIR(about.st_mode):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)


@contextlib.contextmanager
def folder_lock(folder: Path, timeout: float | None = None) -> Iterator[bool]:
    """Keep out every other process and thread that asks for this lock; yields whether the system has such locks.

    The lock leaves no file, and it ends with the process.

    Raises:
        TimeoutError: another process has held the lock for ``timeout`` seconds, by default `LOCK_TIMEOUT`.
    """
    opened = _lock(folder, LOCK_TIMEOUT if timeout is None else timeout)
    try:
        yield opened is not None
    finally:
        if opened is not None:
            try:
                with contextlib.suppress(OSError):
                    fcntl.flock(opened, fcntl.LOCK_UN)  # a forked process may have the file open as well
            finally:
                os.close(opened)


def _lock(folder: Path, timeout: float) -> int | None:
    """The folder, opened and locked; None where the system has no such locks."""
    if fcntl is None:
        return None
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return None
    try:
        until = time.monotonic() + timeout
        while not _try_lock(opened):
            if time.monotonic() > until:
                text = f"another process has been writing here for {timeout:.0f} s; end it, or wait and try again"
                raise TimeoutError(errno.ETIMEDOUT, text, os.fspath(folder))
            time.sleep(0.002)
        return opened
    except BaseException as error:
        os.close(opened)
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            return None
        raise


def _try_lock(opened: int) -> bool:
    """Whether an open file is locked now, which it is not while another process has the lock."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Claim:
    """The sole right to a folder, for as long as the process lives or until `release`.

    The right is a lock on the file ``name`` in the folder, which has the number of the process. The file of a process
    that was killed is no longer locked, and the next claim takes the file over. Where the system has no such locks,
    every claim succeeds.

    Raises:
        BlockingIOError: another process, or another claim of this process, has the folder.
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self._opened: int | None = None
        while fcntl is not None and self._opened is None:
            opened = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _try_lock(opened):
                    owner = os.read(opened, 100).decode(errors="replace").strip() or "another process"
                    raise BlockingIOError(errno.EWOULDBLOCK, f"{owner} is using the folder", os.fspath(folder))
                # The file may have been removed, with its lock, since it was opened.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(opened), os.stat(self.path)):
                        os.ftruncate(opened, 0)
                        os.write(opened, f"process {os.getpid()}".encode())
                        self._opened = opened
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self.path.unlink(missing_ok=True)
                return
            finally:
                if self._opened is None:
                    os.close(opened)

    def release(self) -> None:
        """Give the folder back."""
        opened, self._opened = self._opened, None
        if opened is None:
            return
        try:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        finally:
            with contextlib.suppress(OSError):
                os.close(opened)
