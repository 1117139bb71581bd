"""The matrix products of a linear layer by the library that is faster at their shape: Z = X W^T + b, dZ W, dZ^T X.

``linear``, ``dgrad`` and ``wgrad`` multiply at once, for modules and functions. The functions ``planned_*`` choose a
library ahead, for a training step, and return a function that multiplies into buffers.
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

__all__ = ["Update", "dgrad", "linear", "planned_dgrad", "planned_linear", "planned_update", "planned_wgrad", "wgrad"]

#: (dZ, X, lr): W -= lr dZ^T X, in place.
Update = Callable[[Tensor, Tensor, float], object]
_LIBRARIES: tuple[Choice, ...] = ("aten", "onednn")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """f(X W^T + b), new memory; ``activation`` is one that oneDNN has (``Activation.epilogue``)."""
    f = ACTIVATIONS[activation]
    library = _linear_library(x.shape[0], weight, bias, activation)
    choose.keep_choices()
    if library == "onednn":
        return onednn.linear(x, weight, bias, f.epilogue)
    return f.overwrite(torch.nn.functional.linear(x, weight, bias))


def dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dZ W, new memory."""
    library = _dgrad_library(dz.shape[0], weight)
    choose.keep_choices()
    return onednn.linear(dz, weight.t(), None, "none") if library == "onednn" else torch.mm(dz, weight)


def wgrad(dz: Tensor, x: Tensor) -> Tensor:
    """dZ^T X, new memory."""
    library = _wgrad_library(dz.shape[0], x.shape[1], dz.shape[1], dz.dtype)
    choose.keep_choices()
    return onednn.wgrad(dz, x) if library == "onednn" else torch.mm(dz.t(), x)


def planned_linear(
    m: int, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor
) -> Callable[[Tensor], Tensor]:
    """A function X -> f(X W^T + b) for X [m, K]; ``activation`` is one that oneDNN has.

    The result is ``out`` [m, N] or, where oneDNN is faster, a new tensor.
    """
    wide = product_dtype(weight.dtype, weight.device)
    if wide == weight.dtype:
        return _linear(_linear_library(m, weight, bias, activation), weight, bias, activation, out)
    x32, w32 = weight.new_empty((m, weight.shape[1]), dtype=wide), weight.to(wide)
    b32 = None if bias is None else bias.to(wide)
    product = planned_linear(m, w32, b32, activation, torch.empty_like(out, dtype=wide))

    def widened(x: Tensor) -> Tensor:
        w32.copy_(weight)
        if b32 is not None and bias is not None:
            b32.copy_(bias)
        return out.copy_(product(x32.copy_(x)))

    return widened


def planned_dgrad(m: int, weight: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """A function dZ -> dZ W for dZ [m, N]; the result is ``out`` [m, K] or a new tensor."""
    wide = product_dtype(weight.dtype, weight.device)
    if wide == weight.dtype:
        return _dgrad(_dgrad_library(m, weight), weight, out)
    dz32, w32 = weight.new_empty((m, weight.shape[0]), dtype=wide), weight.to(wide)
    product = planned_dgrad(m, w32, torch.empty_like(out, dtype=wide))

    def widened(dz: Tensor) -> Tensor:
        w32.copy_(weight)
        return out.copy_(product(dz32.copy_(dz)))

    return widened


def planned_wgrad(m: int, out: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (dZ, X) -> dZ^T X for dZ [m, N], X [m, K] in ``dtype``.

    The result is in the dtype of ``out`` [N, K], which may be wider: ``out`` itself or a new tensor.
    """
    n, k = out.shape
    if out.dtype != dtype:
        dz32, x32 = out.new_empty((m, n)), out.new_empty((m, k))
        product = planned_wgrad(m, out, out.dtype)
        return lambda dz, x: product(dz32.copy_(dz), x32.copy_(x))
    if m == 1:  # one product per element, which BLAS computes several times as slowly
        return lambda dz, x: torch.mul(dz.t(), x, out=out)
    return _wgrad(_wgrad_library(m, k, n, dtype), out)


def planned_update(m: int, weight: Tensor) -> Update:
    """A function (dZ, X, lr) that does W -= lr dZ^T X in place: the plain SGD step of a layer's weight."""
    n, k = weight.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, x, scratch = weight.new_ones((rows, n)), weight.new_ones((rows, k)), torch.zeros_like(weight)
        # Not with lr = 0, for which BLAS would not multiply at all.
        return {library: partial(_update(library, rows, scratch), dz, x, 1e-3) for library in _LIBRARIES}

    return _update(choose.choose("wgrad_update", m, k, n, weight.dtype, trials), m, weight)


def _linear_library(m: int, weight: Tensor, bias: Tensor | None, activation: str) -> Choice:
    n, k = weight.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        x, out = weight.new_ones((rows, k)), weight.new_empty((rows, n))
        return {library: partial(_linear(library, weight, bias, activation, out), x) for library in _LIBRARIES}

    return choose.choose(f"linear {ACTIVATIONS[activation].epilogue}", m, k, n, weight.dtype, trials)


def _dgrad_library(m: int, weight: Tensor) -> Choice:
    n, k = weight.shape

    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, out = weight.new_ones((rows, n)), weight.new_empty((rows, k))
        return {library: partial(_dgrad(library, weight, out), dz) for library in _LIBRARIES}

    return choose.choose("dgrad", m, k, n, weight.dtype, trials)


def _wgrad_library(m: int, k: int, n: int, dtype: torch.dtype) -> Choice:
    def trials(rows: int) -> dict[Choice, Callable[[], object]]:
        dz, x, out = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, n), (rows, k), (n, k)))
        return {library: partial(_wgrad(library, out), dz, x) for library in _LIBRARIES}

    return choose.choose("wgrad", m, k, n, dtype, trials)


def _linear(
    library: Choice, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor
) -> Callable[[Tensor], Tensor]:
    f, weight_t = ACTIVATIONS[activation], weight.t()
    if library == "onednn":
        return lambda x: onednn.linear(x, weight, bias, f.epilogue)
    if bias is None:
        return lambda x: f.overwrite(torch.mm(x, weight_t, out=out))
    return lambda x: f.overwrite(torch.addmm(bias, x, weight_t, out=out))


def _dgrad(library: Choice, weight: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    weight_t = weight.t()
    if library == "onednn":
        return lambda dz: onednn.linear(dz, weight_t, None, "none")
    return lambda dz: torch.mm(dz, weight, out=out)


def _wgrad(library: Choice, out: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
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
