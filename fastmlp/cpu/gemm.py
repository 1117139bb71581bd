"""Which library multiplies on a CPU, and how: the measured choice between aten's BLAS and oneDNN, per shape.

aten's ``addmm``/``mm`` call MKL and write into a given buffer. oneDNN's fused linear adds bias and activation in the
same pass but allocates its result. Which is faster depends on the processor (MKL's kernels hold back on AMD) and on
the shape, so the first use of a shape times both on scratch data, for a few milliseconds, and the answer is kept, also
for later processes (``fastmlp.cpu.cache``); batch sizes between two powers of two share one, and so do all from 512
on. The two round differently: where results must be the same bits on another machine of the kind too, call
``set_cpu_gemm("aten")`` (``torch.use_deterministic_algorithms(True)`` implies it).

A processor without instructions for 16-bit products makes them in float32, rounded once at the end: aten's own loops
for that case are slower by far.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from . import cache

__all__ = [
    "CPU_GEMMS",
    "Library",
    "choices",
    "choose",
    "dgrad",
    "dgrad_library",
    "get_cpu_gemm",
    "keep_choices",
    "linear",
    "linear_library",
    "onednn_linear",
    "onednn_wgrad",
    "only_aten",
    "product_dtype",
    "set_cpu_gemm",
    "wgrad",
    "wgrad_library",
    "wgrad_update",
    "worth_measuring",
]

Library = Literal["aten", "onednn", "addmm", "rows", "each", "alone", "wide"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
CPU_GEMMS = ("auto", "aten", "onednn")

_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
#: What a shape's measurement takes: calls that are not counted (the first ones map memory), then rounds in turns, five
#: at least, and as many more as fit the time.
_WARM_UP, _LEAST_ROUNDS, _MOST_ROUNDS, _BUDGET_S = 2, 5, 25, 0.02
#: From this many rows on, which library is faster no longer changes: larger batches are measured with so many.
_MOST_ROWS = 512
#: Multiplications of a product below which aten has it unasked: oneDNN's result is new memory each time, which costs a
#: step more than the few microseconds by which its small products may be faster on their own.
_WORTH_MEASURING = 1 << 20

_mode = "auto"
_choices: dict[tuple[object, ...], Library] = {}
#: Those of them that are not in the user's cache yet.
_measured: dict[str, Library] = {}


def set_cpu_gemm(mode: str) -> None:
    """Choose who multiplies matrices on a CPU: "auto" (measured per shape), "aten" or "onednn".

    With "auto", training steps of small networks are measured whole, and may run on one thread
    (``fastmlp.step.cpu_plan``).

    Takes effect for following calls of modules and functions, and for training steps planned afterwards. Modules and
    functions leave to aten what is small, not contiguous, traced or watched (``fastmlp.ops.torch_products``).

    Raises:
        ValueError: unknown mode.
        RuntimeError: "onednn" where torch was built without it.
    """
    global _mode
    if mode not in CPU_GEMMS:
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(CPU_GEMMS)}")
    if mode == "onednn" and not _onednn_available():
        raise RuntimeError("this build of torch has no oneDNN linear operator; use 'auto' or 'aten'")
    _mode = mode


def get_cpu_gemm() -> str:
    """The mode in force: "auto", "aten" or "onednn"."""
    return _mode


def choices() -> dict[tuple[object, ...], str]:
    """What was chosen so far: (operation, M, K, N, dtype, threads) -> "aten" or "onednn", for few rows one of the
    ways of ``fastmlp.cpu.few_rows``, for whole steps one of those of ``fastmlp.step.cpu_plan``.

    M is the power of two at or below the batch sizes that the answer is used for, 512 for all larger ones.
    """
    return dict(_choices)


def _onednn_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of ``dtype`` run in: itself, or float32 for 16 bits that a CPU cannot multiply."""
    return dtype if dtype.itemsize != 2 or device.type != "cpu" else _product_dtype_here(dtype)


@functools.cache
def _product_dtype_here(dtype: torch.dtype) -> torch.dtype:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    native = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    return dtype if native else torch.float32


@functools.cache
def _keep_freed_memory() -> None:
    """Make the C library keep freed blocks of up to 32 MiB instead of giving them back to the kernel.

    oneDNN allocates its result anew at every call, and a result whose pages the kernel has to map again costs more
    than a small product. glibc's thresholds for that rise to the largest block freed so far (mallopt(3), "dynamic
    mmap threshold", up to 32 MiB), so freeing one that was never touched is enough; elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _measured_rows(m: int) -> int:
    """The power of two at or below ``m``, at most ``_MOST_ROWS``."""
    return min(1 << m.bit_length() - 1, _MOST_ROWS)


def choose(
    kind: str,
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    trials: Callable[[int], dict[Library, Callable[[], object]]],
    least: int | None = None,
) -> Library:
    """The fastest by its best of a few interleaved rounds; ``trials`` makes scratch data of so many rows.

    aten, unmeasured, below ``least`` multiplications (default ``_WORTH_MEASURING``).
    """
    if dtype not in _ONEDNN_DTYPES or _mode == "aten" or not _onednn_available():
        return "aten"
    if _mode == "onednn":
        return "onednn"
    if torch.are_deterministic_algorithms_enabled() or not worth_measuring(m * k * n, least):
        return "aten"
    _keep_freed_memory()
    key = (kind, _measured_rows(m), k, n, dtype, torch.get_num_threads())
    known = _choices.get(key)
    if known is not None:
        return known
    label = f"{kind} {key[1]}x{k}x{n} {str(dtype).removeprefix('torch.')}, {key[-1]} threads"
    kept = cache.kept().get(label)
    for library in LIBRARIES:
        if kept == library:
            _choices[key] = library
            return library
    with torch.no_grad():
        _choices[key] = _measured[label] = winner = _fastest(trials(_measured_rows(m)))
    return winner


def worth_measuring(multiplications: int, least: int | None = None) -> bool:
    """Whether there are so many (default ``_WORTH_MEASURING``) that a product need not be aten's."""
    return multiplications >= (_WORTH_MEASURING if least is None else least)


@contextlib.contextmanager
def only_aten() -> Iterator[None]:
    """Everything that is chosen meanwhile is aten."""
    global _mode
    mode, _mode = _mode, "aten"
    try:
        yield
    finally:
        _mode = mode


def _fastest(candidates: dict[Library, Callable[[], object]]) -> Library:
    """The one with the smallest time of all rounds."""
    best: dict[Library, float] = {}
    started = time.perf_counter()
    for round_ in range(_WARM_UP + _MOST_ROUNDS):
        if round_ >= _WARM_UP + _LEAST_ROUNDS and time.perf_counter() - started > _BUDGET_S:
            break
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            if round_ >= _WARM_UP:
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - begin)
    return min(best, key=best.__getitem__)


def keep_choices() -> None:
    """Write what was measured since the last call into the user's cache."""
    if _measured:
        cache.keep(_measured)
        _measured.clear()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str) -> Tensor:
    """f(X W^T + b) by oneDNN, new memory; ``epilogue`` is ``Activation.epilogue``."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, epilogue, [], ""))


#: Rows whose dZ is transposed at a time (it stays in the caches), and from how many on by two threads, in halves.
_TRANSPOSED_ROWS, _LEAST_ROWS = 4096, 1024
#: Elements of a dZ from which on a shuffle's vector code makes up for the cost of calling it.
_LEAST_SHUFFLED = 1 << 14


def _transposed(dz: Tensor, blocks: int) -> Tensor:
    """dZ [M, N] as [blocks, N, M/blocks]: the transposes of blocks of rows, each by a thread.

    torch transposes a matrix with one thread, element by element. Shuffling the channels of an image with M/blocks x N
    channels and one pixel a block does it with vector registers, and with a thread for every block.
    """
    m, n = dz.shape
    rows = m // blocks
    pixels = dz.view(1, blocks, 1, rows * n).permute(0, 3, 1, 2)
    return torch.native_channel_shuffle(pixels, rows).permute(0, 2, 3, 1).view(blocks, n, rows)


def onednn_wgrad(dz: Tensor, x: Tensor) -> Tensor:
    """dZ^T X for dZ [M, N], X [M, K]. oneDNN's linear wants its first operand contiguous."""
    m = dz.shape[0]
    if dz.dtype != torch.float32 or not dz.is_contiguous() or dz.numel() < _LEAST_SHUFFLED:
        return onednn_linear(dz.t(), x.t(), None, "none")
    if m < _LEAST_ROWS or m % 2:
        return onednn_linear(_transposed(dz, 1)[0], x.t(), None, "none")
    total = None
    for some_dz, some_x in zip(dz.split(_TRANSPOSED_ROWS), x.split(_TRANSPOSED_ROWS), strict=True):
        half = some_dz.shape[0] // 2
        for dz_t, rows in zip(_transposed(some_dz, 2), some_x.split(half), strict=True):
            if total is None:
                total = onednn_linear(dz_t, rows.t(), None, "none")
            else:
                total = cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(dz_t, total, rows.t(), None, "add"))
    assert total is not None
    return total


def linear_library(m: int, weight: Tensor, bias: Tensor | None, activation: str) -> Library:
    """Which library is faster at f(X W^T + b) for X [m, K], f one that oneDNN has."""
    n, k = weight.shape
    f = ACTIVATIONS[activation]
    epilogue = f.epilogue
    assert epilogue is not None

    def trials(rows: int) -> dict[Library, Callable[[], object]]:
        x, into = weight.new_ones((rows, k)), weight.new_empty((rows, n))
        b = weight.new_zeros(n) if bias is None else bias
        return {
            "aten": lambda: f.overwrite(torch.addmm(b, x, weight.t(), out=into)),
            "onednn": lambda: onednn_linear(x, weight, bias, epilogue),
        }

    return choose(f"linear {epilogue}", m, k, n, weight.dtype, trials)


def dgrad_library(m: int, weight: Tensor) -> Library:
    """Which library is faster at dZ W for dZ [m, N]."""
    n, k = weight.shape

    def trials(rows: int) -> dict[Library, Callable[[], object]]:
        dz, into = weight.new_ones((rows, n)), weight.new_empty((rows, k))
        return {
            "aten": lambda: torch.mm(dz, weight, out=into),
            "onednn": lambda: onednn_linear(dz, weight.t(), None, "none"),
        }

    return choose("dgrad", m, k, n, weight.dtype, trials)


def wgrad_library(m: int, k: int, n: int, dtype: torch.dtype) -> Library:
    """Which library is faster at dZ^T X for dZ [m, n], X [m, k]."""

    def trials(rows: int) -> dict[Library, Callable[[], object]]:
        dz, x, into = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, n), (rows, k), (n, k)))
        return {"aten": lambda: torch.mm(dz.t(), x, out=into), "onednn": lambda: onednn_wgrad(dz, x)}

    return choose("wgrad", m, k, n, dtype, trials)


def linear(m: int, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> Callable[[Tensor], Tensor]:
    """A function X -> X W^T + b for X [m, K], with the activation already applied if it is one that oneDNN has; the
    result is ``out`` [m, N] or, where oneDNN is faster, a new tensor.
    """
    wide = product_dtype(weight.dtype, weight.device)
    if wide != weight.dtype:
        wide_x, wide_w = weight.new_empty((m, weight.shape[1]), dtype=wide), weight.to(wide)
        wide_b = None if bias is None else bias.to(wide)
        product = linear(m, wide_w, wide_b, activation, torch.empty_like(out, dtype=wide))

        def widened(x: Tensor) -> Tensor:
            wide_w.copy_(weight)
            if wide_b is not None and bias is not None:
                wide_b.copy_(bias)
            return out.copy_(product(wide_x.copy_(x)))

        return widened
    weight_t = weight.t()
    activation = activation if ACTIVATIONS[activation].epilogue else "identity"
    f = ACTIVATIONS[activation]
    epilogue = f.epilogue
    assert epilogue is not None

    def aten(x: Tensor) -> Tensor:
        if bias is None:
            return f.overwrite(torch.mm(x, weight_t, out=out))
        return f.overwrite(torch.addmm(bias, x, weight_t, out=out))

    def onednn(x: Tensor) -> Tensor:
        return onednn_linear(x, weight, bias, epilogue)

    return aten if linear_library(m, weight, bias, activation) == "aten" else onednn


def dgrad(m: int, weight: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """A function dZ -> dZ W for dZ [m, N]; the result is ``out`` [m, K] or a new tensor."""
    wide = product_dtype(weight.dtype, weight.device)
    if wide != weight.dtype:
        wide_dz, wide_w = weight.new_empty((m, weight.shape[0]), dtype=wide), weight.to(wide)
        product = dgrad(m, wide_w, torch.empty_like(out, dtype=wide))

        def widened(dz: Tensor) -> Tensor:
            wide_w.copy_(weight)
            return out.copy_(product(wide_dz.copy_(dz)))

        return widened
    weight_t = weight.t()

    def aten(dz: Tensor) -> Tensor:
        return torch.mm(dz, weight, out=out)

    def onednn(dz: Tensor) -> Tensor:
        return onednn_linear(dz, weight_t, None, "none")

    return aten if dgrad_library(m, weight) == "aten" else onednn


def wgrad(m: int, out: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (dZ, X) -> dZ^T X for dZ [m, N], X [m, K] in ``dtype``; the result is ``out`` [N, K], in
    ``product_dtype(dtype)``, or a new tensor.
    """
    n, k = out.shape
    if out.dtype != dtype:
        wide_dz, wide_x = out.new_empty((m, n)), out.new_empty((m, k))
        product = wgrad(m, out, out.dtype)
        return lambda dz, x: product(wide_dz.copy_(dz), wide_x.copy_(x))

    if m == 1:  # one product an element, which BLAS computes several times as slowly
        return lambda dz, x: torch.mul(dz.t(), x, out=out)

    def aten(dz: Tensor, x: Tensor) -> Tensor:
        return torch.mm(dz.t(), x, out=out)

    return aten if wgrad_library(m, k, n, out.dtype) == "aten" else onednn_wgrad


def wgrad_update(m: int, weight: Tensor) -> Callable[[Tensor, Tensor, float], object]:
    """A function (dZ, X, lr) that does W -= lr dZ^T X in place: the plain SGD step of a layer's weight.

    aten does gradient and update in one GEMM; oneDNN's product is subtracted in a second pass. So is aten's where dW is
    slim: there BLAS adds row after row to its result, and each addition would round the weight.
    """
    n, k = weight.shape
    slim = m >= 64 and min(n, k) < 16

    def aten_into(w: Tensor) -> Callable[[Tensor, Tensor, float], object]:
        if slim:
            dw = torch.empty_like(w)
            return lambda dz, x, lr: w.add_(torch.mm(dz.t(), x, out=dw), alpha=-lr)
        return lambda dz, x, lr: w.addmm_(dz.t(), x, alpha=-lr)

    def onednn_into(w: Tensor) -> Callable[[Tensor, Tensor, float], object]:
        return lambda dz, x, lr: w.add_(onednn_wgrad(dz, x), alpha=-lr)

    def trials(rows: int) -> dict[Library, Callable[[], object]]:
        dz, x, scratch = weight.new_ones((rows, n)), weight.new_ones((rows, k)), torch.zeros_like(weight)
        with_aten, with_onednn = aten_into(scratch), onednn_into(scratch)
        # Not a factor of 0, with which BLAS would not multiply at all.
        return {"aten": lambda: with_aten(dz, x, 1e-3), "onednn": lambda: with_onednn(dz, x, 1e-3)}

    winner = choose("wgrad_update", m, k, n, weight.dtype, trials)
    return (aten_into if winner == "aten" else onednn_into)(weight)
