"""Dropout of plain torch: masks, and products with them. The kernels have both inside.

``kept`` gives a ``Dropout`` its mask. Where a compiler or a dispatch mode watches, the operator
``fastmlp::dropout_keep`` makes the mask, so that no compiler has to take its many operations on integers apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpu
from ..activations import ACTIVATIONS
from ..backend import functorch_active, get_backend, triton_available, watched
from ..base.dropout import Dropout, threshold
from ..reference.dropout import dropout, numbers_of
from . import triton_ops

__all__ = ["before_dropout", "dropout_keep_operator", "dropped", "kept", "kept_layers", "overwritten"]


def _check_keep(state: Tensor, layer: int, rows: int, columns: int, p: float) -> None:
    torch._check(
        state.dtype == torch.int64 and state.dim() == 1 and state.shape[0] == 2,
        lambda: f"expected state to be int64 [2], (seed, step), got {state.dtype} {list(state.shape)}",
    )
    if not 0 < p < 1:
        raise ValueError(f"expected a dropout probability above 0 and below 1, got {p}")


@torch.library.custom_op("fastmlp::dropout_keep", mutates_args=())
def dropout_keep_operator(state: Tensor, layer: int, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    """Which elements of a layer's output [rows, columns] dropout keeps, bool; ``state`` is (seed, step)."""
    _check_keep(state, layer, rows, columns, p)
    if state.device.type == "cpu":
        seed, step = state.tolist()
        return cpu.dropout_keep(seed, step, layer, rows, columns, p, stream)
    if state.is_cuda and get_backend() != "torch" and triton_available():
        ones = torch.ones((rows, columns), dtype=torch.float32, device=state.device)
        return triton_ops.activation_bwd(ones, None, "identity", dropout=Dropout(state, layer, p, stream)) != 0
    return numbers_of(state, layer, rows, columns, stream) >= threshold(p)


@dropout_keep_operator.register_fake
def _(state: Tensor, layer: int, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    _check_keep(state, layer, rows, columns, p)
    return state.new_empty((rows, columns), dtype=torch.bool)


def kept(d: Dropout, shape: Sequence[int]) -> Dropout:
    """``d`` with the mask of an output [*, N], unless ``d`` has one."""
    if d.keep is not None:
        return d
    (found,) = kept_layers([d], d.state, [shape])
    assert found is not None
    return found


def kept_layers(
    layers: Sequence[Dropout | None], state: Tensor, shapes: Sequence[Sequence[int]]
) -> tuple[Dropout | None, ...]:
    """The dropout of each layer, with this state and with the mask of an output of the given shape [*, N]."""
    values: list[int] | None = None
    if state.device.type == "cpu" and not (watched(state) or functorch_active()):
        values = state.tolist()
    found: list[Dropout | None] = []
    for d, (*lead, columns) in zip(layers, shapes, strict=True):
        if d is None:
            found.append(None)
            continue
        _, layer, p, stream, _ = d
        rows = lead[0] if len(lead) == 1 else math.prod(lead)
        if values is None:
            keep = dropout_keep_operator(state, layer, rows, columns, p, stream)
        else:
            keep = cpu.dropout_keep(values[0], values[1], layer, rows, columns, p, stream)
        found.append(Dropout(state, layer, p, stream, keep if len(lead) == 1 else keep.view(*lead, columns)))
    return tuple(found)


def _unseen(a: Tensor, keep: Tensor) -> bool:
    return a.device.type == "cpu" and not (watched(a, keep) or functorch_active())


def dropped(a: Tensor, d: Dropout) -> Tensor:
    """A * keep / (1 - p) in new memory, differentiable with respect to A."""
    d = kept(d, a.shape)
    assert d.keep is not None
    return dropout(a, d.keep, d.p)


def overwritten(a: Tensor, d: Dropout) -> Tensor:
    """``dropped`` in A's own memory, off the tape."""
    d = kept(d, a.shape)
    assert d.keep is not None
    if _unseen(a, d.keep):
        return cpu.times_kept(a, d.keep, d.p, a)
    return a.mul_(d.keep).mul_(1 / (1 - d.p))


def before_dropout(saved: Tensor | None, activation: str, p: float) -> Tensor | None:
    """What f' is computed from, of what the forward pass kept: A is A_out * (1 - p) wherever dZ is not 0."""
    f = ACTIVATIONS[activation]
    if saved is None or f.saved != "a" or f.kink is not None:  # f' of a kink depends on the sign alone
        return saved
    return saved * (1 - p)
