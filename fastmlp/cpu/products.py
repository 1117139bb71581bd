"""The matrix products of a linear layer by the library that is faster at their shape: Z = X W^T + b, dZ W, dZ^T X.

Each function chooses a library and returns a function that multiplies into a given buffer, or into new memory where
``out`` is None. oneDNN's results are always new tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from . import choose, onednn
from .choose import Choice
from .processor import product_dtype

#: (dZ, X, lr): W -= lr dZ^T X, in place.
Update = Callable[[Tensor, Tensor, float], object]
_LIBRARIES: tuple[Choice, ...] = ("aten", "onednn")


def linear(
    m: int, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """X [m, K] -> f(X W^T + b) in ``out`` [m, N]; ``activation`` is one that oneDNN has (``Activation.epilogue``)."""
    wide = product_dtype(weight.dtype, weight.device)
    n, k = weight.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        x, scratch = weight.new_ones((rows, k)), weight.new_empty((rows, n))
        return {library: partial(_linear(library, weight, bias, activation, scratch), x) for library in _LIBRARIES}

    if wide == weight.dtype or out is None:
        library = choose.choose(f"linear {ACTIVATIONS[activation].epilogue}", m, k, n, weight.dtype, trials)
        return _linear(library, weight, bias, activation, out)
    x32, w32 = weight.new_empty((m, k), dtype=wide), weight.to(wide)
    b32 = None if bias is None else bias.to(wide)
    product = linear(m, w32, b32, activation, torch.empty_like(out, dtype=wide))

    def widened(x: Tensor) -> Tensor:
        w32.copy_(weight)
        if b32 is not None and bias is not None:
            b32.copy_(bias)
        return out.copy_(product(x32.copy_(x)))

    return widened


def dgrad(m: int, weight: Tensor, out: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """DZ [m, N] -> dZ W in ``out`` [m, K]."""
    wide = product_dtype(weight.dtype, weight.device)
    n, k = weight.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, scratch = weight.new_ones((rows, n)), weight.new_empty((rows, k))
        return {library: partial(_dgrad(library, weight, scratch), dz) for library in _LIBRARIES}

    if wide == weight.dtype or out is None:
        return _dgrad(choose.choose("dgrad", m, k, n, weight.dtype, trials), weight, out)
    dz32, w32 = weight.new_empty((m, n), dtype=wide), weight.to(wide)
    product = dgrad(m, w32, torch.empty_like(out, dtype=wide))

    def widened(dz: Tensor) -> Tensor:
        w32.copy_(weight)
        return out.copy_(product(dz32.copy_(dz)))

    return widened


def wgrad(m: int, n: int, k: int, dtype: torch.dtype, out: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """(dZ [m, n], X [m, k]), both in ``dtype``, -> dZ^T X in ``out`` [n, k], whose dtype may be wider."""
    if out is not None and out.dtype != dtype:
        dz32, x32 = out.new_empty((m, n)), out.new_empty((m, k))
        product = wgrad(m, n, k, out.dtype, out)
        return lambda dz, x: product(dz32.copy_(dz), x32.copy_(x))
    if m == 1:  # one product per element, which BLAS computes several times as slowly
        return lambda dz, x: torch.mul(dz.t(), x, out=out)

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, x, scratch = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, n), (rows, k), (n, k)))
        return {library: partial(_wgrad(library, scratch), dz, x) for library in _LIBRARIES}

    return _wgrad(choose.choose("wgrad", m, k, n, dtype, trials), out)


def update(m: int, weight: Tensor) -> Update:
    """(dZ [m, N], X [m, K], lr): W -= lr dZ^T X in place, the plain SGD step of a layer's weight."""
    n, k = weight.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, x, scratch = weight.new_ones((rows, n)), weight.new_ones((rows, k)), torch.zeros_like(weight)
        # Not with lr = 0, for which BLAS would not multiply at all.
        return {library: partial(_update(library, rows, scratch), dz, x, 1e-3) for library in _LIBRARIES}

    return _update(choose.choose("wgrad_update", m, k, n, weight.dtype, trials), m, weight)


def _linear(
    library: Choice, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor | None
) -> Callable[[Tensor], Tensor]:
    f, weight_t = ACTIVATIONS[activation], weight.t()
    if library == "onednn":
        return lambda x: onednn.linear(x, weight, bias, f.epilogue)
    if bias is None:
        return lambda x: f.overwrite(torch.mm(x, weight_t, out=out))
    return lambda x: f.overwrite(torch.addmm(bias, x, weight_t, out=out))


def _dgrad(library: Choice, weight: Tensor, out: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight_t = weight.t()
    if library == "onednn":
        return lambda dz: onednn.linear(dz, weight_t, None, "none")
    return lambda dz: torch.mm(dz, weight, out=out)


def _wgrad(library: Choice, out: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    return onednn.wgrad if library == "onednn" else lambda dz, x: torch.mm(dz.t(), x, out=out)


def _update(library: Choice, m: int, weight: Tensor) -> Update:
    """aten does gradient and update in one product, oneDNN in two passes.

    Where dW is slim, aten also needs two passes: BLAS would add row after row to its result, and each addition would
    round the weight.
    """
    if library == "onednn":
        return lambda dz, x, lr: weight.add_(onednn.wgrad(dz, x), alpha=-lr)
    if m >= 64 and min(weight.shape) < 16:
        dw = torch.empty_like(weight)
        return lambda dz, x, lr: weight.add_(torch.mm(dz.t(), x, out=dw), alpha=-lr)
    return lambda dz, x, lr: weight.addmm_(dz.t(), x, alpha=-lr)
