"""The kept choices: any content, several writers, and a fault at any file call."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from fastmlp.cpu import cache
from tests.support.faults import KINDS, every_kill, every_point, forked

posix = pytest.mark.skipif(os.name != "posix", reason="locks and files of POSIX")


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """A file of the test's own, of which nothing is remembered."""
    monkeypatch.setattr(cache, "choices_path", lambda: tmp_path / "folder" / "choices.json")
    cache.kept.cache_clear()
    yield tmp_path / "folder" / "choices.json"
    cache.kept.cache_clear()


def on_disk(path: Path) -> dict[str, str]:
    return json.loads(path.read_bytes())[cache._machine()]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"null",
        b"1e999999",
        b"9" * 10_000,
        b'{"a": {"b": [[[]]]}, "c": 1}',
        b'{"\\ud800": {"\\udfff": "aten"}}',
        b"{" + b" " * (17 << 20) + b"}",
    ],
    ids=range(10),
)
def test_any_content(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert cache.kept() == {}
    cache.keep({"a shape": "aten"})
    assert on_disk(path) == {"a shape": "aten"}


@posix
@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero", "folder", "20 GB"])
def test_what_is_no_file_of_choices(path, kind):
    path.parent.mkdir()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "20 GB":
        path.touch()
        os.truncate(path, 20 << 30)
    else:
        path.symlink_to(kind)
    assert cache.kept() == {}
    cache.keep({"a shape": "aten"})
    assert (kind == "20 GB") == (path.is_file() and not path.is_symlink())


@posix
def test_four_writers_lose_nothing(path):
    """Two threads here, and two processes."""

    def write(name: str) -> None:
        for i in range(20):
            cache.keep({f"{name} {i}": "onednn"})

    processes = [forked(partial(write, name)) for name in ("first", "second")]
    threads = [threading.Thread(target=write, args=(name,)) for name in ("third", "fourth")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    assert len(on_disk(path)) == 80


@posix
@pytest.mark.parametrize("kind", [*KINDS, "kill"])
def test_a_fault_at_any_call(path, kind):
    """No fault loses an earlier choice, and only an interrupt is seen by the caller."""

    def before() -> None:
        path.parent.mkdir(exist_ok=True)
        for old in path.parent.iterdir():
            old.unlink()
        cache.keep({"first": "aten"})

    def work() -> None:
        try:
            cache.keep({"second": "onednn"})
        except KeyboardInterrupt:
            assert kind == "interrupt"

    points = Counter()
    for _ in every_kill(path.parent, before, work) if kind == "kill" else every_point(path.parent, kind, before, work):
        points[kind] += 1
        assert on_disk(path).items() >= {"first": "aten"}.items()
        cache.keep({"third": "aten"})
        assert on_disk(path).items() >= {"first": "aten", "third": "aten"}.items()
        assert os.listdir(path.parent) == [path.name]
    print(f"{kind}: {points[kind]} faults, 0 losses")
    assert points[kind] >= (1 if kind == "half" else 12)
