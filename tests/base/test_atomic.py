"""Files of several processes: turns, claims, leftovers, and what is no regular file."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from fastmlp.base import atomic
from fastmlp.base.atomic import Claim, atomic_write, folder_lock, read_file, update_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
LEFTOVER = ".file.0123456789abcdef.tmp"


def test_the_leftover_of_a_dead_process_is_removed(tmp_path):
    for name in (LEFTOVER, ".other.0123456789abcdef.tmp", ".file.tmp", "file.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    atomic_write(tmp_path / "file", b"new")
    assert LEFTOVER not in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 4


def test_a_file_that_another_process_is_writing_stays(tmp_path, monkeypatch):
    """The other process stops before its rename; a second writer waits for it, and then both files are there."""
    real, waiting, go_on = os.replace, threading.Event(), threading.Event()

    def slow(source: Path, target: Path) -> None:
        if target.name == "a":
            waiting.set()
            assert go_on.wait(60)
        real(source, target)

    monkeypatch.setattr(os, "replace", slow)
    threads = [threading.Thread(target=atomic_write, args=(tmp_path / "a", b"a"))]
    threads[0].start()
    assert waiting.wait(60)
    threads.append(threading.Thread(target=atomic_write, args=(tmp_path / "b", b"b")))
    threads[1].start()
    time.sleep(0.05)
    assert len(os.listdir(tmp_path)) == 1
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_that_is_never_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "LOCK_TIMEOUT", 0.05)
    with folder_lock(tmp_path) as locked:
        assert locked
        with pytest.raises(TimeoutError, match=f"another process has been writing here.*{tmp_path}"):
            atomic_write(tmp_path / "file", b"")
    atomic_write(tmp_path / "file", b"")


def test_without_locks_only_old_leftovers_are_removed(tmp_path, monkeypatch):
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", none)
    (tmp_path / LEFTOVER).touch()
    atomic_write(tmp_path / "file", b"new")
    assert LEFTOVER in os.listdir(tmp_path)
    os.utime(tmp_path / LEFTOVER, (0, 0))
    atomic_write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert Claim(tmp_path, "claim").path.exists() is False


def test_errors_name_the_file(tmp_path, monkeypatch):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        atomic_write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []


def test_updates_by_many_threads_lose_nothing(tmp_path):
    def add(number: int) -> None:
        for i in range(10):
            line = f"{number}.{i}\n".encode()
            update_file(tmp_path / "file", 1 << 20, partial(bytes.__add__, line))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set((tmp_path / "file").read_text().split())) == 40


def test_an_update_does_not_replace_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"kept")

    def fail(path: Path, most: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "read_file", fail)
    with pytest.raises(OSError, match="Input/output"):
        update_file(tmp_path / "file", 10, lambda old: b"new")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_reading_takes_regular_files_of_a_bounded_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="expected at most 4 bytes, got a larger file"):
        read_file(tmp_path / "file", 4)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(OSError, match="expected a regular file"):
            read_file(path, 5)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 5)


def test_a_claim_is_exclusive_until_it_is_released(tmp_path):
    first = Claim(tmp_path, "claim")
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} is using the folder: '{tmp_path}'"):
        Claim(tmp_path, "claim")
    first.release()
    first.release()
    assert os.listdir(tmp_path) == []
    Claim(tmp_path, "claim").release()


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / "claim").write_text("process 1 of long ago")
    claim = Claim(tmp_path, "claim")
    assert (tmp_path / "claim").read_text() == f"process {os.getpid()}"
    claim.release()


def test_one_of_many_claims_succeeds(tmp_path):
    claims, start = [], threading.Barrier(8)

    def claim() -> None:
        start.wait(60)
        with contextlib.suppress(BlockingIOError):
            claims.append(Claim(tmp_path, "claim"))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(claims) == 1
    claims[0].release()
