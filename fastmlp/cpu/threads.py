"""Runs a function in the calling thread alone, so that torch and BLAS use no second thread; or several at once.

``torch.set_num_threads`` would change the whole process, threads that start meanwhile included. OpenMP and MKL have a
number of threads for the calling thread only (``omp_set_num_threads``, ``mkl_set_num_threads_local``). To set both and
to set them back takes a microsecond.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


#: In the order of ``native.layout``. Compilers write calls of the first two for a parallel region and its barriers.
_OF_TEAMS = "GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads"
#: No team has more threads.
_limit = ctypes.c_int64(1 << 30)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """torch's library, which finds the functions of the libraries that it uses."""
    found = list(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    try:
        return ctypes.CDLL(str(found[0]))
    except (IndexError, OSError):
        return None


@functools.cache
def _setters() -> tuple[Callable[[int], None], Callable[[int], int]] | None:
    """OpenMP's and MKL's functions as torch's library finds them; None where torch is built with something else."""
    library: Any = _library()
    try:
        openmp, mkl = library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except AttributeError:
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    return openmp, mkl


@functools.cache
def team() -> tuple[int, ...]:
    """What machine code needs of the OpenMP that torch uses: the addresses of ``_OF_TEAMS`` and of ``_limit``.

    Empty where there is another OpenMP, or none.
    """
    library = _library()
    try:
        found = [getattr(library, name) for name in _OF_TEAMS]
    except AttributeError:
        return ()
    functions = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]
    return *functions, ctypes.addressof(_limit)


def available() -> bool:
    """Whether ``alone`` can do what it says, and there is more than one thread to begin with."""
    return torch.get_num_threads() > 1 and _setters() is not None


def alone(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What ``run`` returns, run without further threads where ``available``; afterwards there are as many as before."""
    setters, threads = _setters(), torch.get_num_threads()
    if setters is None or threads == 1:
        return run(*args, **kwargs)
    openmp, mkl = setters
    openmp(1)
    mkl_threads = mkl(1)
    try:
        return run(*args, **kwargs)
    finally:
        openmp(threads)
        mkl(mkl_threads)


#: Work for the threads beside the calling one: each takes pairs of a function and where its error, or None, goes.
_workers: list[SimpleQueue[tuple[Callable[[], object], SimpleQueue[BaseException | None]]]] = []
_busy = Lock()


def at_once(tasks: Sequence[Callable[[], object]]) -> None:
    """Run every task in a thread of its own, each without further threads, and return when all have ended.

    The calling thread takes the first task. While another thread of this process runs tasks here, the calling thread
    runs all of its own tasks, one after the other.

    Raises:
        The error of the first task that failed.
    """
    if len(tasks) < 2 or not _busy.acquire(blocking=False):
        for task in tasks:
            alone(task)
        return
    try:
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        while len(_workers) < len(tasks) - 1:
            _workers.append(SimpleQueue())
            Thread(target=_work, args=(_workers[-1],), name="fastmlp members", daemon=True).start()
        for queue, task in zip(_workers, tasks[1:], strict=False):
            queue.put((task, ended))
        try:
            alone(tasks[0])
        finally:
            errors = [ended.get() for _ in tasks[1:]]
    finally:
        _busy.release()
    for error in errors:
        if error is not None:
            raise error


def _work(queue: SimpleQueue[tuple[Callable[[], object], SimpleQueue[BaseException | None]]]) -> None:
    """What a worker does as long as the process lives."""
    setters = _setters()
    torch.get_num_threads()  # at its first use in a thread, torch sets the thread's number
    if setters is not None:
        openmp, mkl = setters
        openmp(1)
        mkl(1)
    while True:
        task, ended = queue.get()
        error: BaseException | None = None
        try:
            task()
        except BaseException as caught:
            error = caught
        del task  # the worker keeps nothing alive while it waits
        ended.put(error)
        del ended, error


def _forget_workers() -> None:
    """A forked process has none of its parent's threads, and OpenMP would wait for them for ever."""
    global _busy
    _limit.value = 1
    _busy = Lock()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
