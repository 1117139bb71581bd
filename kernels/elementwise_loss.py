"""Elementwise losses of an output A and a target Y with gradients: squared, absolute, Huber, binary NLL, -Y log A.

    mse                    L = (a - y)^2                                dL/da = 2 (a - y)
    l1                     L = |a - y|                                  dL/da = sign(a - y)
    huber                  L = c (a - y - c/2)                          dL/da = c = clamp(a - y, -delta, delta)
    binary_cross_entropy   L = -(y log a + (1 - y) log(1 - a))          dL/da = (a - y) / (a (1 - a))
    bce_with_logits        L = (1 - y) a + max(-a, 0) + log(1 + e^-|a|) dL/da = sigmoid(a) - y
     with pos_weight p     L = (1 - y) a + (1 - y + p y) (max(-a, 0) + log(1 + e^-|a|))
                           dL/da = (1 - y + p y) sigmoid(a) - p y
    nllm                   L = -y log a                                 dL/da = -y / a

bce_with_logits is binary_cross_entropy of sigmoid(a). Where a logarithm or a quotient is not finite, the values are
torch's: the logarithms of binary_cross_entropy are at least -100, a (1 - a) is at least 1e-12, and y = 0 makes nllm and
its gradient 0. dL/dy follows each formula.

In a step the loss and the gradient of row m may have a factor s_m, and the gradient a divisor, C sum s
(``row_weights``).

Shapes: A, Y [M, C], p [C] and s [M], any strides; results contiguous. Contiguous operands are read as one long row,
whatever C.
Members: A, the loss and dA have an axis E in front; Y, s and ``rows`` may have it, and ``factor`` is [E].
Dtypes: float32, float16, bfloat16; computed in float32.
Bytes: one pass reads A and Y and writes dA (3 M C items). The forward pass reads 2 M C items and writes one number per
program. The backward pass reads 2 M C items and writes M C per gradient wanted.
Source: loss derivatives of lecture notes 7.5.13; sigmoid and NLL together, concept 50.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .dependent import wait_for_previous
from .launch import Call, call, remembered, with_active
from .maths import log1p_small
from .members import count_of, inactive, stride_of
from .reduce_sum import reduce_sum
from .row_weights import batch_weight, load_sample_weights, summed_block, total_weight

__all__ = ["elementwise_loss", "elementwise_loss_bwd", "elementwise_loss_fwd"]

BLOCK = 1024


@triton.jit
def _log_probability(p, rest):
    """log p for rest = 1 - p, at least -100. Near p = 1 ``rest`` has the digits that p has lost."""
    near_one = log1p_small(-tl.minimum(rest, 0.5))
    return tl.maximum(tl.where(rest < 0.5, near_one, tl.log(p)), -100.0)


@triton.jit
def _near(a, y, delta):
    """A - Y between -delta and delta; NaN stays NaN."""
    d = a - y
    return tl.where(d > delta, delta, tl.where(d < -delta, -delta, d))


@triton.jit
def _loss(a, y, delta, LOSS: tl.constexpr):
    if LOSS == "mse":
        loss = (a - y) * (a - y)
    elif LOSS == "l1":
        loss = tl.abs(a - y)
    elif LOSS == "huber":
        near = _near(a, y, delta)
        loss = near * (a - y - 0.5 * near)
    elif LOSS == "binary_cross_entropy":
        loss = -(y * _log_probability(a, 1.0 - a) + (1.0 - y) * _log_probability(1.0 - a, a))
    elif LOSS == "bce_with_logits":
        loss = (1.0 - y) * a + tl.where(a < 0.0, -a, 0.0) + log1p_small(tl.exp(-tl.abs(a)))
    else:
        tl.static_assert(LOSS == "nllm", "unknown loss")
        loss = tl.where(y == 0.0, 0.0, -y * tl.log(a))
    return loss


@triton.jit
def _loss_grad(a, y, delta, LOSS: tl.constexpr):
    if LOSS == "mse":
        da = 2.0 * (a - y)
    elif LOSS == "l1":
        da = tl.where(a > y, 1.0, tl.where(a < y, -1.0, 0.0))
    elif LOSS == "huber":
        da = _near(a, y, delta)
    elif LOSS == "binary_cross_entropy":
        da = (a - y) / tl.maximum(a * (1.0 - a), 1e-12)
    elif LOSS == "bce_with_logits":
        da = tl.sigmoid(a) - y
    else:
        tl.static_assert(LOSS == "nllm", "unknown loss")
        da = tl.where(y == 0.0, 0.0, -y / a)
    return da


@triton.jit
def _loss_target_grad(a, y, delta, LOSS: tl.constexpr):
    if LOSS == "mse" or LOSS == "l1" or LOSS == "huber":
        dy = -_loss_grad(a, y, delta, LOSS)
    elif LOSS == "binary_cross_entropy":
        dy = _log_probability(1.0 - a, a) - _log_probability(a, 1.0 - a)
    elif LOSS == "bce_with_logits":
        dy = -a
    else:
        tl.static_assert(LOSS == "nllm", "unknown loss")
        dy = -tl.log(a)
    return dy


class _Members(NamedTuple):
    """Elements from one member to the next."""

    a: int
    y: int
    rows: int
    sample: int


@triton.jit
def _positive_loss(a, y, p):
    """bce_with_logits with the factor p of the terms with y."""
    return (1.0 - y) * a + (1.0 - y + p * y) * (tl.where(a < 0.0, -a, 0.0) + log1p_small(tl.exp(-tl.abs(a))))


@triton.jit
def _positive_loss_grad(a, y, p):
    return (1.0 - y + p * y) * tl.sigmoid(a) - p * y


@triton.jit
def _elementwise_loss_kernel(
    a_ptr, y_ptr, rows_ptr, g_ptr, pos_ptr, sample_ptr, divisor_ptr, loss_ptr, partial_ptr, da_ptr, dy_ptr, members,
    active_ptr,
    scale, delta, total, C, stride_am, stride_ac, stride_ym, stride_yc, stride_gm, stride_gc, stride_p, stride_s, M,
    LOSS: tl.constexpr, DENSE: tl.constexpr, G_NUMBER: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    if members is not None:
        member = tl.program_id(2).to(tl.int64)
        if inactive(active_ptr, member):
            return
        a_ptr += member * members.a
        y_ptr += member * members.y
        loss_ptr += member * total
        da_ptr += member * total
        if rows_ptr is not None:
            rows_ptr += member * members.rows
        if g_ptr is not None:
            g_ptr += member
        if sample_ptr is not None:
            sample_ptr += member * members.sample
        if divisor_ptr is not None:
            divisor_ptr += member
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    if DENSE:
        # Addresses without a division by C, which would hide that neighbours are neighbours.
        a_ptrs = a_ptr + offs
        y_ptrs = y_ptr + offs
        if pos_ptr is not None:
            c = offs % C
        if sample_ptr is not None:
            row_y = offs // C
        if g_ptr is not None:
            g_ptrs = g_ptr + offs
    else:
        m = offs // C
        c = offs % C
        a_ptrs = a_ptr + m * stride_am + c * stride_ac
        row_y = m
        if rows_ptr is not None:
            row_y = tl.load(rows_ptr + m, mask=mask, other=0).to(tl.int64)
        y_ptrs = y_ptr + row_y * stride_ym + c * stride_yc
        if g_ptr is not None:
            g_ptrs = g_ptr + m * stride_gm + c * stride_gc
    a = tl.load(a_ptrs, mask=mask, other=0.5).to(tl.float32)
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    if pos_ptr is not None:
        pos = tl.load(pos_ptr + c * stride_p, mask=mask, other=1.0).to(tl.float32)
    if sample_ptr is not None:
        sample = load_sample_weights(sample_ptr, row_y * stride_s, mask)
    if loss_ptr is not None or partial_ptr is not None:
        if pos_ptr is not None:
            loss = tl.where(mask, _positive_loss(a, y, pos), 0.0)
        else:
            loss = tl.where(mask, _loss(a, y, delta, LOSS), 0.0)
        if sample_ptr is not None:
            loss *= sample
        if loss_ptr is not None:
            tl.store(loss_ptr + offs, loss.to(loss_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            tl.store(partial_ptr + tl.program_id(0), tl.sum(loss, 0))
    g = scale
    if g_ptr is not None:
        if G_NUMBER:
            g = scale * tl.load(g_ptr).to(tl.float32)
        else:
            g = scale * tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    if divisor_ptr is not None:
        g = g / batch_weight(
            divisor_ptr, y_ptr, rows_ptr, None, sample_ptr, None, None, stride_s, C.to(tl.float32), M, C, 0, False, SUM
        )  # fmt: skip
    if sample_ptr is not None:
        g = g * sample
    if da_ptr is not None:
        if pos_ptr is not None:
            tl.store(da_ptr + offs, (g * _positive_loss_grad(a, y, pos)).to(da_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(da_ptr + offs, (g * _loss_grad(a, y, delta, LOSS)).to(da_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        tl.store(dy_ptr + offs, (g * _loss_target_grad(a, y, delta, LOSS)).to(dy_ptr.dtype.element_ty), mask=mask)


def _plan(
    a: Tensor, y: Tensor, rows: Tensor | None, g: Tensor | None, pos_weight: Tensor | None,
    sample_weight: Tensor | None, divisor: Tensor | None, loss: Tensor | None, partial: Tensor | None,
    da: Tensor | None, dy: Tensor | None, scale: float, delta: float, loss_name: str, summed: int,
    active: Tensor | None = None,
) -> Call:  # fmt: skip
    count, members = count_of(a), None
    total, C = a.numel() // (count or 1), a.shape[-1]
    if count is None:
        number = g is not None and not any(g.stride())  # 0-d, or expanded from one number
        dense = rows is None and all(t.is_contiguous() for t in (a, y, *(() if g is None or number else (g,))))
    else:
        members = _Members(stride_of(a, 2), stride_of(y, 2), stride_of(rows, 1), stride_of(sample_weight, 1))
        number = g is not None
        dense = rows is None and all((t if t.dim() == 2 else t[0]).is_contiguous() for t in (a, y))
    stride_g = (0, 0) if g is None or number else g.stride()
    return call(
        _elementwise_loss_kernel, (cdiv(total, BLOCK), 1, count or 1),
        a, y, rows, g, pos_weight, sample_weight, divisor, loss, partial, da, dy, members, active,
        scale, delta, total, C, *a.stride()[-2:], *y.stride()[-2:], *stride_g,
        *[None if t is None else t.stride(-1) for t in (pos_weight, sample_weight)],
        None if divisor is None else a.shape[-2],
        LOSS=loss_name, DENSE=dense, G_NUMBER=number, SUM=summed, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


_launch_planned = remembered(_plan)
_launch_active = remembered(with_active(_plan))


def _launch(
    a: Tensor,
    y: Tensor,
    loss_name: str,
    *,
    rows: Tensor | None = None,
    g: Tensor | None = None,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    loss: Tensor | None = None,
    partial: Tensor | None = None,
    da: Tensor | None = None,
    dy: Tensor | None = None,
    scale: float = 1.0,
    delta: float = 1.0,
    active: Tensor | None = None,
) -> None:
    summed = 0 if divisor is None else summed_block(a.shape[-2])
    if divisor is not None and not summed:
        total_weight(divisor, a.shape[-2], sample_weight=sample_weight, rows=rows, scale=a.shape[-1])
    tensors = (a, y, rows, g, pos_weight, sample_weight, divisor, loss, partial, da, dy)
    numbers = float(scale), float(delta)
    if active is None:
        _launch_planned(tensors, (loss_name, summed), numbers)
    else:
        _launch_active((active, *tensors), (loss_name, summed), numbers)


def elementwise_loss(
    a: Tensor,
    y: Tensor,
    loss_name: str,
    *,
    scale: float = 1.0,
    factor: Tensor | None = None,
    delta: float = 1.0,
    pos_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    rows: Tensor | None = None,
    loss: Tensor | None = None,
    da: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch one pass over A [M, C] and Y [M, C]: (loss of every element in float32, dA = scale factor dL/dA).

    ``factor`` is a 0-d float32 that the kernel reads. ``rows`` (int64 [M], contiguous) takes row m's target from
    y[rows[m]], of a Y of any number of rows, and its sample weight likewise. ``delta`` is huber's, ``pos_weight`` [C]
    that of bce_with_logits. ``sample_weight`` [M] are factors of the rows' losses and gradients. ``divisor`` (float32,
    0-d) is an output: C times the weight of the batch (``row_weights``), by which dA is divided. ``active``, a bool per
    member of A [E, M, C]: nothing is written for others.
    """
    if loss is None:
        loss = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    if da is None:
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if a.numel():
        _launch(
            a, y, loss_name, rows=rows, g=factor, pos_weight=pos_weight, sample_weight=sample_weight, divisor=divisor,
            loss=loss, da=da, scale=scale, delta=delta, active=active,
        )  # fmt: skip
    return loss, da


def elementwise_loss_fwd(
    a: Tensor, y: Tensor, loss_name: str, *, scale: float | None = None, delta: float = 1.0
) -> Tensor:
    """Launch the forward pass on [M, C], in a's dtype: every element's loss, or scale times their sum (0-d)."""
    if scale is None:
        loss = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        if a.numel():
            _launch(a, y, loss_name, loss=loss, delta=delta)
        return loss
    out = torch.empty((), dtype=a.dtype, device=a.device)
    partial = torch.empty(cdiv(a.numel(), BLOCK), dtype=torch.float32, device=a.device)
    if a.numel():
        _launch(a, y, loss_name, partial=partial, delta=delta)
    reduce_sum(partial, out, scale)
    return out


def elementwise_loss_bwd(
    dloss: Tensor,
    a: Tensor,
    y: Tensor,
    loss_name: str,
    *,
    scale: float = 1.0,
    delta: float = 1.0,
    want_da: bool = True,
    want_dy: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward pass: (dA, dY), each None unless wanted; ``dloss`` is 0-d or [M, C] with any strides."""
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if want_da else None
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device) if want_dy else None
    if a.numel():
        _launch(a, y, loss_name, g=dloss, da=da, dy=dy, scale=scale, delta=delta)
    return da, dy
