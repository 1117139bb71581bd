"""Fetching the full FashionMNIST files: through torchvision, or from the Debian package.

Both run as child processes. torchvision has no timeout and cannot silence its progress bar, and a socket timeout set in
the caller's process would change every other connection of that process. A child that no longer changes its folder is
ended, so that a machine whose network drops packets does not hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package puts the files

SOCKET_TIMEOUT = 10.0  # seconds for one connection attempt or one read
STALL_TIMEOUT = 30.0  # seconds without a new byte in the folder
START_TIMEOUT = 120.0  # seconds until the first byte: importing torch from a cold disk takes a while

# argv: folder, socket timeout, class, its options as JSON. Making the folder ends the start-up allowance.
_TORCHVISION_PROGRAM = """
import json, os, socket, sys
try:
    from torchvision import datasets
except ImportError as error:
    sys.exit(f"torchvision cannot be imported: {error}")
socket.setdefaulttimeout(float(sys.argv[2]))
os.makedirs(sys.argv[1])
try:
    # One download has both parts of all sets but QMNIST.
    for train in (True, False) if sys.argv[3] == "QMNIST" else (False,):
        getattr(datasets, sys.argv[3])(sys.argv[1], train=train, download=True, **json.loads(sys.argv[4]))
except Exception as error:
    sys.exit(" ".join(f"{error}".split()) or type(error).__name__)
"""


class SourceUnavailable(Exception):
    """A source of the data cannot be used on this machine now; the text says why."""


def fetch_torchvision(staging: Path, name: str = "FashionMNIST", **options: str) -> Path:
    """Download with a class of ``torchvision.datasets`` below ``staging`` (an empty folder); the files' folder.

    Raises:
        SourceUnavailable: no torchvision, no network, or torchvision's own check of the files failed.
    """
    if not sys.executable:
        raise SourceUnavailable("no Python executable to run torchvision's download with")
    target = staging / "torchvision"
    command = [sys.executable, "-c", _TORCHVISION_PROGRAM, str(target), str(SOCKET_TIMEOUT), name, json.dumps(options)]
    run_watched(command, staging, start_timeout=START_TIMEOUT)
    return target


def fetch_debian(staging: Path) -> Path:
    """Download the Debian package below ``staging`` (an empty folder) and unpack it, without root; the files' folder.

    Raises:
        SourceUnavailable: not a Debian-like system, no network, or no such package in its repositories.
    """
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg")
    if apt is None or dpkg is None:
        raise SourceUnavailable("needs apt-get and dpkg, which are not installed")
    timeouts = [f"-oAcquire::{protocol}::Timeout={SOCKET_TIMEOUT:.0f}" for protocol in ("http", "https")]
    apt_get = [apt, "-q", "-oAcquire::Retries=0", *timeouts]
    try:
        run_watched([*apt_get, "download", PACKAGE], staging)
    except SourceUnavailable as failure:
        if not re.search(r"Unable to locate|no candidate|No packages found|404", str(failure)):
            raise
        # Container images have no package lists, and users may not update the system's. So these lists are our own.
        lists = staging / "lists"
        (lists / "partial").mkdir(parents=True)
        apt_get += [f"-oDir::State::Lists={lists}", f"-oDir::Cache={staging / 'cache'}"]
        run_watched([*apt_get, "update"], staging)
        run_watched([*apt_get, "download", PACKAGE], staging)
    packages = list(staging.glob(f"{PACKAGE}*.deb"))
    if len(packages) != 1:
        raise SourceUnavailable(f"apt-get download left {len(packages)} packages")
    unpacked = staging / "unpacked"
    run_watched([dpkg, "-x", str(packages[0]), str(unpacked)], staging)
    return unpacked / SYSTEM_FOLDER.relative_to("/")


def run_watched(
    command: Sequence[str], folder: Path, *, start_timeout: float | None = None, stall_timeout: float | None = None
) -> None:
    """Run ``command`` in ``folder``, printing nothing, for as long as the folder keeps changing.

    Args:
        command: program and arguments.
        folder: the working directory, which is also watched.
        start_timeout: seconds until the first change; default: ``stall_timeout``.
        stall_timeout: seconds from one change to the next; default: ``STALL_TIMEOUT``.

    Raises:
        SourceUnavailable: the program cannot be started, fails (with the end of what it printed) or stalls.
    """
    stall_timeout = STALL_TIMEOUT if stall_timeout is None else stall_timeout
    program = Path(command[0]).name
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "LC_ALL": "C"},  # apt's messages are compared
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=os.name == "posix",  # its helpers can be ended with it
            )
        except OSError as error:
            raise SourceUnavailable(f"{program} cannot be started: {error}") from error
        try:
            allowed = stall_timeout if start_timeout is None else start_timeout
            state, changed = _folder_state(folder), time.monotonic()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.1)
                    break
                if (now_state := _folder_state(folder)) != state:
                    state, changed, allowed = now_state, time.monotonic(), stall_timeout
                elif time.monotonic() - changed > allowed:
                    raise SourceUnavailable(f"{program} received nothing for {allowed:g} seconds")
        finally:
            _end(process)
        if process.returncode != 0:
            output.seek(0)
            raise SourceUnavailable(f"{program} failed: {_last_words(output.read())}")


def _folder_state(folder: Path) -> tuple[int, int]:
    """How many entries are below ``folder`` and how many bytes they have."""
    count = size = 0
    for parent, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        for name in files:
            with contextlib.suppress(OSError):  # a temporary file that is gone by now
                size += os.stat(os.path.join(parent, name)).st_size
    return count, size


def _end(process: subprocess.Popen[bytes]) -> None:
    """End ``process`` and the helpers that it started."""
    if process.poll() is not None:
        return
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _last_words(output: bytes) -> str:
    """What a failed program said: apt's error lines, or else the last line (\\r ends a line of a progress bar)."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output.decode(errors="replace")) if line.strip()]
    errors = [line.removeprefix("E:").strip() for line in lines if line.startswith("E:")]
    return "; ".join(errors) or (lines[-1] if lines else "it printed nothing")
