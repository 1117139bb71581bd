"""Losses of the CPU training step: value and dZ of the last layer together, in buffers allocated once.

Each function returns dL/dA_L, A_L the network's output, in a buffer of its own and writes the loss, a mean as
torch's default reduction, into the 0-d tensor it is given. All of them compute in float32 (float64 for float64).

    cross_entropy           -log softmax(A)[y], mean over rows            dA = (softmax(A) - onehot(y)) / M
    mse                     (A - y)^2, mean over elements                 dA = 2 (A - y) / (M C)
    l1                      |A - y|, mean over elements                   dA = sign(A - y) / (M C)
    bce_with_logits         sigmoid NLL of logits, mean over elements     dA = (sigmoid(A) - y) / (M C)
    softmax_squared_error   |p - onehot|^2, p = softmax(A), over rows     dA = p * (g - sum g p), g = 2 (p - onehot) / M

A class number out of range raises IndexError. torch finds it while it computes the loss: a check beforehand takes
longer than the loss of a small batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.arguments import check_classes
from ..base.losses import NO_CLASS
from ..ops.torch_losses import vector_width

#: (A_L [M, C], target, 0-d loss to write) -> dA_L
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Operators that torch has no function for; where it has one, as for log-softmax, calling it costs half as much.
_nll_loss = torch.ops.aten.nll_loss_forward.output
_softmax = torch.ops.aten._softmax.out


def loss_function(
    loss: str, m: int, c: int, dtype: torch.dtype, device: torch.device, scale: Tensor | None = None
) -> LossFunction:
    """The function for batches of ``m`` rows with ``c`` outputs in ``dtype``; ``loss`` is a name of ``FUNCTIONS``.

    dA comes multiplied by ``scale`` (0-d), before it is rounded to 16 bits.
    """
    wide = torch.promote_types(dtype, torch.float32)
    compute = FUNCTIONS[loss](m, c, wide, device)
    if wide == dtype:
        return compute
    a_wide, da_narrow = torch.empty((m, c), dtype=wide, device=device), torch.empty((m, c), dtype=dtype, device=device)
    if scale is None:
        return lambda a, y, out: da_narrow.copy_(compute(a_wide.copy_(a), y, out))
    return lambda a, y, out: da_narrow.copy_(compute(a_wide.copy_(a), y, out).mul_(scale))


def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor as a tensor, once: torch would make one of a Python number at every step."""
    return torch.full((), value, dtype=dtype, device=device)


def cross_entropy(m: int, c: int, dtype: torch.dtype, device: torch.device) -> LossFunction:
    """-log softmax(A)[y], mean over rows."""
    mean = _number(1 / m, dtype, device)
    log_p, da = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)
    minus_one = torch.full((m, 1), -1.0, dtype=dtype, device=device)
    total_weight = torch.empty((), dtype=dtype, device=device)
    # torch vectorizes log-softmax along rows that fill a vector register, and across the rows of a transposed matrix.
    short = device.type == "cpu" and c < vector_width(dtype) and m >= 512
    by_columns = torch.empty((2, c, m), dtype=dtype, device=device).unbind() if short else None

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        if by_columns is None:
            torch.log_softmax(a, 1, out=log_p)
        else:
            a_t, log_p_t = by_columns
            log_p.copy_(torch.log_softmax(a_t.copy_(a.t()), 0, out=log_p_t).t())
        try:
            _nll_loss(log_p, y, None, 1, NO_CLASS, output=out, total_weight=total_weight)
            torch.exp(log_p, out=da).scatter_add_(1, y.view(m, 1), minus_one)
        except (IndexError, RuntimeError):
            check_classes(y, c)
            raise
        return da if m == 1 else da.mul_(mean)

    return compute


def cross_entropy_terms(e: int, m: int, c: int, da: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """-log softmax(A)[y] of e members at once: (A [e, M, C], y [e, M], losses [e] to write), dA goes into ``da``."""
    new, rows = da.new_empty, e * m
    mean, minus_one = da.new_full((), 1 / m), da.new_full((rows, 1), -1.0)
    log_p, picked, da = new((rows, c)), new((rows, 1)), da.view(rows, c)
    short = da.device.type == "cpu" and c < vector_width(da.dtype) and rows >= 512
    by_columns = new((2, c, rows)).unbind() if short else None

    def compute(a: Tensor, y: Tensor, out: Tensor) -> None:
        a, y = a.view(rows, c), y.view(rows, 1)
        if by_columns is None:
            torch.log_softmax(a, 1, out=log_p)
        else:
            a_t, log_p_t = by_columns
            log_p.copy_(torch.log_softmax(a_t.copy_(a.t()), 0, out=log_p_t).t())
        torch.gather(log_p, 1, y, out=picked)
        torch.mean(picked.view(e, m), 1, out=out).neg_()
        torch.exp(log_p, out=da).scatter_add_(1, y, minus_one).mul_(mean)

    return compute


def softmax_squared_error(m: int, c: int, dtype: torch.dtype, device: torch.device) -> LossFunction:
    """|softmax(A) - onehot(y)|^2, mean over rows."""
    mean, twice_mean = _number(1 / m, dtype, device), _number(2 / m, dtype, device)
    p, g = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)
    square, inner = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, 1), dtype=dtype, device=device)
    minus_one = torch.full((m, 1), -1.0, dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        _softmax(a, 1, False, out=p)
        try:
            g.copy_(p).scatter_add_(1, y.view(m, 1), minus_one)
        except RuntimeError:
            check_classes(y, c)
            raise
        torch.sum(torch.mul(g, g, out=square), out=out, dim=(0, 1)).mul_(mean)
        g.mul_(twice_mean)
        torch.sum(torch.mul(g, p, out=square), 1, keepdim=True, out=inner)
        return g.sub_(inner).mul_(p)

    return compute


def mse(m: int, c: int, dtype: torch.dtype, device: torch.device) -> LossFunction:
    """(A - y)^2, mean over elements."""
    mean, twice_mean = _number(1 / (m * c), dtype, device), _number(2 / (m * c), dtype, device)
    da, square = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.sub(a, y, out=da)
        torch.sum(torch.mul(da, da, out=square), out=out, dim=(0, 1)).mul_(mean)
        return da.mul_(twice_mean)

    return compute


def l1(m: int, c: int, dtype: torch.dtype, device: torch.device) -> LossFunction:
    """|A - y|, mean over elements."""
    mean = _number(1 / (m * c), dtype, device)
    da, magnitude = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.sub(a, y, out=da)
        torch.sum(torch.abs(da, out=magnitude), out=out, dim=(0, 1)).mul_(mean)
        return da.sign_().mul_(mean)

    return compute


def bce_with_logits(m: int, c: int, dtype: torch.dtype, device: torch.device) -> LossFunction:
    """Sigmoid NLL of logits, mean over elements."""
    mean = _number(1 / (m * c), dtype, device)
    da, term = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)
    product = torch.empty((m, c), dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        # -y log s(a) - (1 - y) log(1 - s(a)) = max(a, 0) - a y + log(1 + e^-|a|)
        torch.abs(a, out=term).neg_().exp_().log1p_().add_(torch.clamp_min(a, 0, out=da))
        torch.sum(term.sub_(torch.mul(a, y, out=product)), out=out, dim=(0, 1)).mul_(mean)
        return torch.sigmoid(a, out=da).sub_(y).mul_(mean)

    return compute


#: The functions by the names of ``fastmlp.base.losses``: all losses that a step has.
FUNCTIONS: dict[str, Callable[[int, int, torch.dtype, torch.device], LossFunction]] = {
    function.__name__: function for function in (cross_entropy, mse, l1, bce_with_logits, softmax_squared_error)
}
