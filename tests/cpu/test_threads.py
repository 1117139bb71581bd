"""One thread for one call: inside the call, afterwards, on other threads, and where this is not possible."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fastmlp.cpu import threads as cpu_threads
from tests.support.steps import threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    with threads(3):
        yield


needs_setters = pytest.mark.skipif(cpu_threads._setters() is None, reason="torch was built without OpenMP or MKL")


def mkl_threads() -> int:
    """MKL's number of threads for the calling thread."""
    setters = cpu_threads._setters()
    assert setters is not None
    threads = setters[1](1)
    setters[1](threads)
    return threads


@needs_setters
def test_one_thread_inside_and_all_of_them_afterwards():
    mkl = mkl_threads()
    assert cpu_threads.available()
    assert cpu_threads.alone(lambda x, *, y: (x, y, torch.get_num_threads(), mkl_threads()), 1, y=2) == (1, 2, 1, 1)
    assert (torch.get_num_threads(), mkl_threads()) == (3, mkl)


@needs_setters
def test_all_of_them_after_an_error():
    mkl = mkl_threads()
    with pytest.raises(ZeroDivisionError):
        cpu_threads.alone(lambda: 1 // 0)
    assert (torch.get_num_threads(), mkl_threads()) == (3, mkl)


@needs_setters
def test_one_inside_of_another():
    assert cpu_threads.alone(cpu_threads.alone, torch.get_num_threads) == 1
    assert torch.get_num_threads() == 3


@needs_setters
def test_other_threads_keep_theirs():
    """This includes threads that start while this thread is alone."""
    seen = []

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    cpu_threads.alone(elsewhere)
    assert seen == [3]


@needs_setters
def test_large_operations_use_all_threads_again():
    """OpenMP's pool of threads works as before."""
    x = torch.rand(1 << 20)
    expected = x.sum()
    for _ in range(3):
        cpu_threads.alone(torch.mm, torch.rand(3, 3), torch.rand(3, 3))
        assert torch.equal(x.sum(), expected)


def test_where_it_is_not_possible(monkeypatch):
    """The function is called as without ``alone``."""
    monkeypatch.setattr(cpu_threads, "_setters", lambda: None)
    assert not cpu_threads.available()
    assert cpu_threads.alone(torch.get_num_threads) == 3


def test_one_thread_to_begin_with(monkeypatch):
    torch.set_num_threads(1)
    assert not cpu_threads.available()
    assert cpu_threads.alone(torch.get_num_threads) == 1


@pytest.mark.parametrize("missing", ["file", "function"])
def test_another_build_of_torch(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    if missing == "function":
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libtorch_cpu.so").touch()
        monkeypatch.setattr(cpu_threads.ctypes, "CDLL", lambda path: object())
    monkeypatch.setattr(cpu_threads, "_library", cpu_threads._library.__wrapped__)
    assert cpu_threads._setters.__wrapped__() is None
    assert cpu_threads.team.__wrapped__() == ()


class TestAtOnce:
    @needs_setters
    def test_every_task_has_a_thread_and_no_further_ones(self):
        seen: list[tuple[int, int, int]] = []
        barrier = threading.Barrier(3, timeout=60)

        def task() -> None:
            barrier.wait()  # all three run at the same time
            seen.append((threading.get_ident(), torch.get_num_threads(), mkl_threads()))

        for _ in range(2):
            seen.clear()
            cpu_threads.at_once([task] * 3)
            assert len({ident for ident, *_ in seen}) == 3
            assert threading.get_ident() in {ident for ident, *_ in seen}
            assert {(torch_s, mkl_s) for _, torch_s, mkl_s in seen} == {(1, 1)}
        assert torch.get_num_threads() == 3

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_an_error_comes_out_after_all_have_ended(self, place):
        ended = []

        def good() -> None:
            ended.append(1)

        def bad() -> None:
            raise ZeroDivisionError

        tasks = [good, good, good]
        tasks[place] = bad
        with pytest.raises(ZeroDivisionError):
            cpu_threads.at_once(tasks)
        assert len(ended) == 2
        cpu_threads.at_once([good] * 3)
        assert len(ended) == 5

    def test_from_within_and_from_two_threads(self):
        """Whoever comes second runs the tasks one after the other."""
        ended = []
        inner = [lambda: ended.append(1)] * 2
        cpu_threads.at_once([lambda: cpu_threads.at_once(inner)] * 2)
        assert len(ended) == 4

    def test_one_task(self):
        seen = []
        cpu_threads.at_once([lambda: seen.append(torch.get_num_threads())])
        assert seen == [1 if cpu_threads.available() else 3]
