"""The losses on plain torch, for CPUs and for dtypes that the kernels do not compute in.

Cross-entropy has the formulas of ``kernels/cross_entropy.py``, in place wherever a buffer is ours, and never on the
autograd tape. Z is [M, C] or [N, C, S], computed in float32, or in float64 where anything is. Labels on the CPU without
smoothing go through torch's nll_loss operators, which check and mask them. The other losses are those of
``fastmlp.reference``, computed in float32 where the operands have 16 bits, and differentiable any number of times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import reference
from ..base.arguments import LABELS
from ..base.losses import LOSSES
from ..cpu import instruction_set

#: Z, target, weight, what the forward pass kept and the denominator of the mean, for a backward pass.
Rows = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
#: Of the input and of the target, each None unless wanted.
Gradients = tuple[Tensor | None, Tensor | None]
WIDE = (torch.float32, torch.float64)
#: Rows from which the softmax of short ones gains more than a node of the tape in Python costs.
_MANY_ROWS = 256


class Settings(NamedTuple):
    """The arguments of a cross-entropy that are not tensors."""

    reduction: str
    ignore_index: int
    smoothing: float
    dtype: torch.dtype  #: of the result
    nll: bool = False  #: labels [M] on the CPU without smoothing: torch's own nll_loss checks and masks them

    @property
    def nll_arguments(self) -> tuple[int, int]:
        """(reduction, ignore_index) as torch's operators number them."""
        return {"none": 0, "mean": 1, "sum": 2}[self.reduction], self.ignore_index

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where the result is, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _soft_target(target: Tensor, weight: Tensor | None, classes: int, s: Settings) -> Tensor:
    """Q = ((1-e) t + e/C) w, new memory or the target itself."""
    q = target.to(s.compute_dtype)
    if s.smoothing:
        q = q * (1 - s.smoothing) + s.smoothing / classes
    return q if weight is None else q * _per_class(weight, q, s)


def _per_class(weight: Tensor, z: Tensor, s: Settings) -> Tensor:
    """w with a shape that broadcasts against Z."""
    return weight.to(s.compute_dtype).view(-1, *[1] * (z.dim() - 2))


def _labels(z: Tensor, target: Tensor, weight: Tensor | None, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(y, w_y, ignored): y is 0 and w_y 0 where ignored; w_y is NaN for labels outside [0, C)."""
    target = target.long()
    ignored = target == s.ignore_index
    usable = (target >= 0) & (target < z.shape[1]) & ~ignored
    y = torch.where(usable, target, 0)
    w_y = torch.ones_like(y, dtype=s.compute_dtype) if weight is None else weight.to(s.compute_dtype)[y]
    return y, torch.where(usable, w_y, torch.where(ignored, 0.0, math.nan).to(s.compute_dtype)), ignored


@functools.cache
def vector_width(dtype: torch.dtype) -> int:
    """Numbers in one of the vector registers that torch computes with: of 64 bytes with AVX-512, of 32 elsewhere."""
    return (64 if instruction_set() == "AVX512" else 32) // dtype.itemsize


def _rows_are_short(z: Tensor) -> bool:
    """Whether rows of Z [M, C] are shorter than a vector register, and enough of them to be worth a transposed copy.

    torch's softmax takes such a row element by element. With AVX-512 a float32 row of 10 classes is short, and takes
    ten times as long as a column of Z^T. With AVX2 only rows of fewer than 8 classes are short.
    """
    return z.size(0) >= _MANY_ROWS and z.shape[1] < vector_width(torch.promote_types(z.dtype, torch.float32))


def torch_is_as_fast(z: Tensor, target: Tensor, smoothing: float) -> bool:
    """Whether torch.nn.functional.cross_entropy does the same work in the same precision, without a node in Python."""
    return (
        z.is_cpu
        and target.is_cpu
        and z.dim() == 2
        and z.dtype in WIDE
        and target.dtype in LABELS
        and isinstance(smoothing, (int, float))
        and smoothing == 0
        and (type(z) is not Tensor or is_compiling() or not _rows_are_short(z))
    )


def cross_entropy_fwd(
    z: Tensor, target: Tensor, weight: Tensor | None, s: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, log p, denominator of the mean or None where it is the number of rows)."""
    dtype = s.compute_dtype if z.dtype != s.compute_dtype else None
    denominator = None
    if s.nll:
        across = _rows_are_short(z)
        log_p = torch.log_softmax(z.t(), 0, dtype=dtype).t() if across else torch.log_softmax(z, 1, dtype=dtype)
        weight = None if weight is None else weight.to(s.compute_dtype)
        loss, denominator = torch.ops.aten.nll_loss_forward(log_p, target, weight, *s.nll_arguments)
        return loss.to(s.dtype), log_p, denominator
    log_p = torch.log_softmax(z, 1, dtype=dtype)
    if target.is_floating_point():
        loss = (_soft_target(target, weight, z.shape[1], s) * log_p).sum(1).neg_()
    else:
        y, w_y, ignored = _labels(z, target, weight, s)
        loss = log_p.gather(1, y.unsqueeze(1)).squeeze(1).mul_(w_y).mul_(s.smoothing - 1)
        if s.smoothing:
            weighted = log_p if weight is None else log_p * _per_class(weight, log_p, s)
            loss.sub_(weighted.sum(1), alpha=s.smoothing / z.shape[1])
        loss.masked_fill_(ignored, 0.0)
        denominator = w_y.sum()
    if s.reduction == "mean":
        loss = loss.mean() if denominator is None else loss.sum() / denominator
    elif s.reduction == "sum":
        loss = loss.sum()
    return loss.to(s.dtype), log_p, denominator


def cross_entropy_bwd(dloss: Tensor, rows: Rows, s: Settings, want: Sequence[bool]) -> Gradients:
    """dZ = g (p sum_c Q - Q) and dt = -(1-e) w log p g."""
    z, target, weight, log_p, denominator = rows
    g = dloss.to(s.compute_dtype)
    if s.nll:
        weight = None if weight is None else weight.to(s.compute_dtype)
        d_log_p = torch.ops.aten.nll_loss_backward(g, log_p, target, weight, *s.nll_arguments, denominator)
        if _rows_are_short(z):
            dz = torch.ops.aten._log_softmax_backward_data(d_log_p.t(), log_p.t(), 0, s.compute_dtype).t()
            return dz.contiguous().to(z.dtype), None
        return torch.ops.aten._log_softmax_backward_data(d_log_p, log_p, 1, s.compute_dtype).to(z.dtype), None
    if s.reduction == "mean":
        g = g / (denominator if denominator is not None else z.numel() // z.shape[1])
    g_row = g.unsqueeze(1) if s.reduction == "none" else g
    dz = dt = None
    if target.is_floating_point():
        if want[0]:
            q = _soft_target(target, weight, z.shape[1], s)
            dz = log_p.exp().mul_(q.sum(1, keepdim=True)).sub_(q).mul_(g_row)
        if want[1]:
            dt = log_p * (g_row * (s.smoothing - 1))
            dt = (dt if weight is None else dt.mul_(_per_class(weight, dt, s))).to(target.dtype)
    else:
        y, w_y, ignored = _labels(z, target, weight, s)
        g_row = torch.where(ignored, 0.0, g).unsqueeze(1)
        hot = w_y.mul(1 - s.smoothing).unsqueeze(1)
        dz = log_p.exp()
        if s.smoothing:
            w = None if weight is None else _per_class(weight, dz, s)
            share = s.smoothing / z.shape[1]
            mass = hot + (s.smoothing if w is None else share * w.sum())
            dz = dz.mul_(mass).sub_(share if w is None else share * w)
        else:
            dz.mul_(hot)
        dz.scatter_add_(1, y.unsqueeze(1), -hot)
        dz.mul_(g_row)
    return None if dz is None else dz.to(z.dtype), dt


def widened(t: Tensor) -> Tensor:
    """16-bit values in float32; others as they are."""
    return t.float() if t.itemsize < 4 else t


def mean_factor(loss: str, a: Tensor, reduction: str) -> float:
    """The factor of the sum of the losses of A: 1 / count for "mean" (NaN where nothing is counted), else 1."""
    if reduction != "mean":
        return 1.0
    count = LOSSES[loss].count(a)
    return 1 / count if count else math.nan


def _values(target: Tensor, z: Tensor) -> Tensor:
    """Y [M, C]: the target, or one-hot rows of labels."""
    if target.is_floating_point():
        return widened(target)
    return torch.zeros_like(z).scatter(1, target.long().unsqueeze(1), 1)


def by_formula(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    """A loss of the reference, its sum, or its mean, in a's dtype."""
    wide = widened(a)
    if loss == "softmax_squared_error":
        losses = reference.softmax_squared_error(wide, _values(y, wide))
    else:
        losses = reference.elementwise_loss(wide, widened(y), loss, delta)
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        count = LOSSES[loss].count(a)
        losses = losses.mean() if losses.numel() == count else losses.sum() / count
    return losses.to(a.dtype)


def loss_fwd(a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = 1.0) -> Tensor:
    """A loss other than cross-entropy, in a's dtype; torch's own function where torch has one."""
    function = LOSSES[loss].torch
    if function is torch.nn.functional.huber_loss:
        return function(a, y, reduction=reduction, delta=delta)
    if function is not None:
        return function(a, y, reduction=reduction)
    return by_formula(a, y, loss, reduction, delta)


def loss_bwd(
    g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want: Sequence[bool], delta: float = 1.0
) -> Gradients:
    """The gradients of ``loss_fwd`` for the upstream gradient of its result."""
    g, wide = widened(g) * mean_factor(loss, a, reduction), widened(a)
    da: Tensor | None = None
    dy: Tensor | None = None
    if loss == "softmax_squared_error":
        da, dy = reference.softmax_squared_error_backward(g, wide, _values(y, wide))
        return da.to(a.dtype) if want[0] else None, dy.to(y.dtype) if want[1] else None
    wide_y = widened(y)
    if want[0]:
        da = (reference.elementwise_loss_grad(wide, wide_y, loss, delta) * g).to(a.dtype)
    if want[1]:
        dy = (reference.elementwise_loss_target_grad(wide, wide_y, loss, delta) * g).to(y.dtype)
    return da, dy
