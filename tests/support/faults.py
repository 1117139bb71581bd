"""Faults at every file call: the n-th call that touches a folder fails, is interrupted, or is the process's last one.

The calls are those of the module os, which all of fastmlp's writing goes through, and the lock of fcntl. A test counts
the points by itself: it makes the first call fail, then the second, and so on, until the work ends before the n-th.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

#: Functions of a path, and functions of an open file.
OF_PATHS = ("open", "stat", "listdir", "scandir", "mkdir", "rmdir", "unlink", "replace", "rename", "link")
OF_FILES = ("write", "read", "fsync", "fstat", "ftruncate", "close", "flock")
#: What happens: an error before the call; an error after it; half of a write, without an error; Ctrl-C; SIGKILL.
KINDS = ("EIO", "ENOSPC", "EIO afterwards", "half", "interrupt")


class Calls:
    """The calls so far; ``hit`` is the name of the one that failed."""

    def __init__(self) -> None:
        self.count = 0
        self.hit: str | None = None


@contextmanager
def fault(folder: Path, at: int, kind: str) -> Iterator[Calls]:
    """The call number ``at`` (1 for the first) that touches ``folder`` or a file below has a fault of this kind."""
    calls, files = Calls(), set()

    def counts(name: str, first: Any) -> bool:
        if kind == "half" and name != "write":
            return False
        if name in OF_FILES:
            return first in files
        return isinstance(first, (str, os.PathLike)) and str(os.fspath(first)).startswith(str(folder))

    def faulty(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counted = counts(name, arguments[0] if arguments else None)
            calls.count += counted
            if counted and calls.count == at:
                calls.hit = name
                return _fail(kind, name, function, arguments)
            result = function(*arguments, **options)
            if name == "open" and str(arguments[0]).startswith(str(folder)):
                files.add(result)
            if name == "close":
                files.discard(arguments[0])
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*OF_PATHS, *OF_FILES):
            module = fcntl if name == "flock" else os
            patch.setattr(module, name, faulty(name, getattr(module, name)))
        yield calls


def _fail(kind: str, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if kind == "half":
        return function(arguments[0], arguments[1][: len(arguments[1]) // 2])
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "close" or (kind == "EIO afterwards" and name != "open"):
        function(*arguments)  # close takes the file away in any case
    if kind == "interrupt":
        raise KeyboardInterrupt
    code = errno.ENOSPC if kind == "ENOSPC" else errno.EIO
    raise OSError(code, os.strerror(code), *(arguments[:1] if name in OF_PATHS else ()))


def every_point(
    folder: Path, kind: str, before: Callable[[], None], work: Callable[[], None], stride: int = 1
) -> Iterator[str]:
    """Do ``before`` and then ``work`` with a fault at each call in turn; yields the call's name after each.

    With ``stride`` only one of so many calls has a fault.
    """
    for at in itertools.count(1, stride):
        before()
        with fault(folder, at, kind) as calls:
            work()
        if calls.hit is None:
            return
        yield calls.hit


def forked(work: Callable[[], None]) -> int:
    """Start ``work`` in a process of its own, which takes no time to import torch; returns the process's number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of a fork with threads; the child only writes files
        child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def every_kill(folder: Path, before: Callable[[], None], work: Callable[[], None], stride: int = 1) -> Iterator[None]:
    """As `every_point`, where a process of its own does the work and is killed."""
    for at in itertools.count(1, stride):
        before()
        _, status = os.waitpid(forked(partial(_killed, folder, at, work)), 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        yield


def _killed(folder: Path, at: int, work: Callable[[], None]) -> None:
    with fault(folder, at, "kill"):
        work()
