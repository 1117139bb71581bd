"""A function run by the calling thread alone: torch's operations and BLAS use no second thread.

``torch.set_num_threads`` would change the whole process, threads that start meanwhile included. OpenMP and MKL have a
number of threads for the calling thread only (``omp_set_num_threads``, ``mkl_set_num_threads_local``). To set both and
to set them back takes a microsecond.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _setters() -> tuple[Callable[[int], None], Callable[[int], int]] | None:
    """OpenMP's and MKL's functions as torch's library finds them; None where torch is built with something else."""
    found = list(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    try:
        library = ctypes.CDLL(str(found[0]))
        openmp, mkl = library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except (IndexError, OSError, AttributeError):
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    return openmp, mkl


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
