"""The choice among ways to do the same work, measured per shape.

aten's ``addmm``/``mm`` call MKL and write into a given buffer. oneDNN's fused linear adds bias and activation in the
same pass but allocates its result. Which is faster depends on the processor (MKL's kernels hold back on AMD) and on the
shape. The first use of a shape times all ways on scratch data for a few milliseconds. The choice is kept, also for
later processes (``fastmlp.cpu.cache``). Batch sizes between two powers of two share one choice, and so do all from 512
on. Libraries round differently: ``set_cpu_gemm("aten")`` gives the same bits on other machines of the kind too, and
``torch.use_deterministic_algorithms(True)`` implies it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast, get_args

import torch

from ..base.names import unknown
from . import cache, native, onednn

Choice = Literal[
    "aten", "onednn", "each", "alone", "wide", "batched", "spread", "small", "native", "native alone", "native team"
]  # fmt: skip
#: Rows of scratch data to make -> the work on them, by choice.
Trials = Callable[[int], dict[Choice, Callable[[], object]]]
_MODES = ("auto", "aten", "onednn", "native")

_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
#: A measurement begins with a round that is not counted, because first calls map memory. Then all ways take turns for
#: at least five rounds, and for more rounds while there is time.
_LEAST_ROUNDS, _MOST_ROUNDS, _BUDGET_S = 5, 25, 0.02
#: From this many rows on, which library is faster no longer changes: larger batches are measured with so many.
_MOST_ROWS = 512
#: Products of fewer multiplications always use aten. oneDNN allocates a new result on every call, which costs more than
#: it saves on small products.
_WORTH_MEASURING = 1 << 20

_mode = "auto"
_choices: dict[tuple[object, ...], Choice] = {}
#: The choices by their names in the cache's file: those of this process, and those of a run that it goes on with.
_named: dict[str, str] = {}
_adopted: dict[str, str] = {}


def set_cpu_gemm(mode: str) -> None:
    """Choose who multiplies matrices on a CPU: "auto" (measured per shape), "aten", "onednn" or "native".

    With "auto", training steps of small networks are measured whole, and may run, where numba is installed, as one call
    of machine code, on one thread or on all. "native" takes the machine code, on one thread, for every training step
    that it has, in float32 and float64, without measuring; all else is as with "auto".

    Takes effect for following calls of modules and functions, and for training steps planned afterwards. Modules and
    functions leave to aten what is small, not contiguous, traced or watched (``fastmlp.ops.torch_products``).

    Raises:
        ValueError: unknown mode.
        RuntimeError: "onednn" where torch was built without it, "native" where numba is not installed.
    """
    global _mode
    if mode not in _MODES:
        raise ValueError(unknown("mode", mode, _MODES))
    if mode == "onednn" and not onednn.available():
        raise RuntimeError("this build of torch has no oneDNN linear operator; use 'auto' or 'aten'")
    if mode == "native" and not native.installed():
        raise RuntimeError(f"{native.missing(torch.float32)}, or use 'auto'")
    _mode = mode


def get_cpu_gemm() -> str:
    """The mode in force: "auto", "aten", "onednn" or "native"."""
    return _mode


@contextlib.contextmanager
def only_aten() -> Iterator[None]:
    """Inside the block every choice is "aten"."""
    global _mode
    mode, _mode = _mode, "aten"
    try:
        yield
    finally:
        _mode = mode


def choices() -> dict[tuple[object, ...], str]:
    """The choices so far: (kind of work, M, K, N, dtype, threads) -> "aten" or "onednn" for a product, one of the ways
    of ``whole_step`` or ``ensembles`` for a step, "aten" or "wide" for a weight gradient of ``widened``.

    M is the power of two at or below the batch sizes that the choice is used for, 512 for all larger ones.
    """
    return dict(_choices)


def named_choices() -> dict[str, str]:
    """The choices of this process, by names that hold for other processes on machines of the kind too."""
    return dict(_named)


def adopt_choices(named: Mapping[str, str]) -> None:
    """Let ``named_choices()`` of another process hold where this process has not chosen yet, so that bits agree."""
    _adopted.update(named)


def worth_measuring(multiplications: int) -> bool:
    """Whether a product of so many multiplications is large enough to measure; aten makes smaller ones."""
    return multiplications >= _WORTH_MEASURING


def measures() -> bool:
    """Whether ways to do the same work are measured."""
    return _mode == "auto" and not torch.are_deterministic_algorithms_enabled()


def choose(
    kind: str,
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    trials: Trials,
    *,
    whatever_size: bool = False,
    whatever_dtype: bool = False,
) -> Choice:
    """The fastest way by the median of a few rounds, in which all ways take turns.

    Products that are not ``worth_measuring`` get "aten" unmeasured, unless ``whatever_size`` is set. So do dtypes that
    oneDNN does not have, unless ``whatever_dtype`` is set.
    """
    if not (whatever_dtype or dtype in _ONEDNN_DTYPES) or _mode == "aten" or not onednn.available():
        return "aten"
    if _mode == "onednn":
        return "onednn"
    if torch.are_deterministic_algorithms_enabled() or not (whatever_size or worth_measuring(m * k * n)):
        return "aten"
    onednn.keep_freed_memory()
    rows = min(1 << m.bit_length() - 1, _MOST_ROWS)
    key = (kind, rows, k, n, dtype, torch.get_num_threads())
    if key not in _choices:
        label = f"{kind} {rows}x{k}x{n} {str(dtype).removeprefix('torch.')}, {key[-1]} threads"
        kept = _adopted.get(label) or cache.kept().get(label)
        if kept in get_args(Choice):
            _choices[key] = cast(Choice, kept)
        else:
            with torch.no_grad():
                _choices[key] = winner = _fastest(trials(rows))
            cache.keep({label: winner})
        _named[label] = _choices[key]
    return _choices[key]


def _fastest(candidates: dict[Choice, Callable[[], object]]) -> Choice:
    """The one with the smallest median time.

    Each turn is two calls, of which the second one counts: it finds weights in the caches of those cores that use them,
    as in a loop of steps. The smallest time of all would mislead on a busy machine, where threads that wait for each
    other lose most rounds.
    """
    times: dict[Choice, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for round_ in range(1 + _MOST_ROUNDS):
        if round_ > _LEAST_ROUNDS and time.perf_counter() - started > _BUDGET_S:
            break
        for name, run in candidates.items():
            run()
            begin = time.perf_counter()
            run()
            if round_:
                times[name].append(time.perf_counter() - begin)
    return min(times, key=lambda name: statistics.median(times[name]))
