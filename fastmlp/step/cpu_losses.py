"""Losses of the CPU training step: value and dZ of the last layer together, in buffers allocated once.

Each function returns dL/dA_L, A_L the network's output, in a buffer of its own and writes the loss, a mean as
torch's default reduction, into the 0-d tensor it is given. All of them compute in float32 (float64 for float64).

    cross_entropy           -log softmax(A)[y], mean over rows            dA = (softmax(A) - onehot(y)) / M
    mse                     (A - y)^2, mean over elements                 dA = 2 (A - y) / (M C)
    l1                      |A - y|, mean over elements                   dA = sign(A - y) / (M C)
    huber                   c (A - y - c/2), mean over elements           dA = c / (M C), c = clamp(A - y, ±delta)
    bce_with_logits         sigmoid NLL of logits, mean over elements     dA = (sigmoid(A) - y) / (M C)
    softmax_squared_error   |p - onehot|^2, p = softmax(A), over rows     dA = p * (g - sum g p), g = 2 (p - onehot) / M

``cpu_row_weights`` has the means in which rows have weights. A class number out of range raises IndexError. torch finds
it while it computes the loss: a check beforehand takes longer than the loss of a small batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.arguments import check_classes
from ..base.losses import IGNORED, NO_CLASS
from .cpu_row_weights import WeightedLoss, columns_are_faster, weighted_cross_entropy, weighted_rows
from .loss_options import PLAIN, LossOptions

#: (A_L [M, C], target, 0-d loss to write) -> dA_L
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
#: An operator that torch has no function for. A call of a function, such as log-softmax, costs half as much.
_nll_loss = torch.ops.aten.nll_loss_forward.output
_softmax = torch.ops.aten._softmax.out


def loss_function(
    loss: str,
    m: int,
    c: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: Tensor | None = None,
    options: LossOptions = PLAIN,
) -> LossFunction:
    """The function for batches of ``m`` rows with ``c`` outputs in ``dtype``; ``loss`` is a name of ``FUNCTIONS``.

    dA comes multiplied by ``scale`` (0-d), before it is rounded to 16 bits.
    """
    terms = torch.empty((m, c), dtype=torch.promote_types(dtype, torch.float32), device=device)
    return _in_dtype(FUNCTIONS[loss](terms, options), terms, dtype, scale)


def weighted_loss_function(
    loss: str,
    m: int,
    c: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: Tensor | None = None,
    options: LossOptions = PLAIN,
) -> WeightedLoss:
    """``loss_function`` with sample weights."""
    terms = torch.empty((m, c), dtype=torch.promote_types(dtype, torch.float32), device=device)
    if loss == "cross_entropy":
        compute = weighted_cross_entropy(m, c, terms.dtype, device, options)
    else:
        compute = weighted_rows(loss, FUNCTIONS[loss](terms, options), terms)
    return _in_dtype(compute, terms, dtype, scale)


def _in_dtype(
    compute: Callable[..., Tensor], like: Tensor, dtype: torch.dtype, scale: Tensor | None
) -> Callable[..., Tensor]:
    """``compute``, which works in the dtype of ``like`` [M, C], for A and dA in ``dtype``; dA comes times ``scale``."""
    if like.dtype == dtype:
        return compute
    a_wide, da_narrow = torch.empty_like(like), torch.empty_like(like, dtype=dtype)
    if scale is None:
        return lambda a, *rest: da_narrow.copy_(compute(a_wide.copy_(a), *rest))
    return lambda a, *rest: da_narrow.copy_(compute(a_wide.copy_(a), *rest).mul_(scale))


def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor as a tensor, once: torch would make one of a Python number at every step."""
    return torch.full((), value, dtype=dtype, device=device)


def cross_entropy(terms: Tensor, options: LossOptions) -> LossFunction:
    """-log softmax(A)[y], mean over rows."""
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    general: WeightedLoss | None = None
    if not options.is_plain:
        with_options = weighted_cross_entropy(m, c, dtype, device, options)
        return lambda a, y, out: with_options(a, y, out, None)
    mean = _number(1 / m, dtype, device)
    log_p, da = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)
    minus_one = torch.full((m, 1), -1.0, dtype=dtype, device=device)
    total_weight = torch.empty((), dtype=dtype, device=device)
    short = columns_are_faster(m, c, dtype, device)
    by_columns = torch.empty((2, c, m), dtype=dtype, device=device).unbind() if short else None

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        nonlocal general
        if general is not None and y.is_floating_point():
            return general(a, y, out, None)
        if by_columns is None:
            torch.log_softmax(a, 1, out=log_p)
        else:
            a_t, log_p_t = by_columns
            log_p.copy_(torch.log_softmax(a_t.copy_(a.t()), 0, out=log_p_t).t())
        try:
            _nll_loss(log_p, y, None, 1, NO_CLASS, output=out, total_weight=total_weight)
            torch.exp(log_p, out=da).scatter_add_(1, y.view(m, 1), minus_one)
        except (IndexError, RuntimeError):
            # Probabilities, and labels that torch ignores unasked, end here. So no other step has to look for them.
            if not y.is_floating_point():
                check_classes(y, c, ignore_index=IGNORED if options.ignores_unasked else None)
            general = general or weighted_cross_entropy(m, c, dtype, device, options)
            return general(a, y, out, None)
        return da if m == 1 else da.mul_(mean)

    return compute


def cross_entropy_terms(e: int, m: int, c: int, da: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """-log softmax(A)[y] of e members at once: (A [e, M, C], y [e, M], losses [e] to write), dA goes into ``da``."""
    new, rows = da.new_empty, e * m
    mean, minus_one = da.new_full((), 1 / m), da.new_full((rows, 1), -1.0)
    log_p, picked, da = new((rows, c)), new((rows, 1)), da.view(rows, c)
    short = columns_are_faster(rows, c, da.dtype, da.device)
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


def softmax_squared_error(terms: Tensor, options: LossOptions) -> LossFunction:
    """|softmax(A) - onehot(y)|^2, mean over rows."""
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    mean, twice_mean = _number(1 / m, dtype, device), _number(2 / m, dtype, device)
    p, g = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, c), dtype=dtype, device=device)
    product, inner = torch.empty((m, c), dtype=dtype, device=device), torch.empty((m, 1), dtype=dtype, device=device)
    minus_one = torch.full((m, 1), -1.0, dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        _softmax(a, 1, False, out=p)
        try:
            g.copy_(p).scatter_add_(1, y.view(m, 1), minus_one)
        except RuntimeError:
            check_classes(y, c)
            raise
        torch.sum(torch.mul(g, g, out=terms), out=out, dim=(0, 1)).mul_(mean)
        g.mul_(twice_mean)
        torch.sum(torch.mul(g, p, out=product), 1, keepdim=True, out=inner)
        return g.sub_(inner).mul_(p)

    return compute


def mse(terms: Tensor, options: LossOptions) -> LossFunction:
    """(A - y)^2, mean over elements."""
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    mean, twice_mean = _number(1 / (m * c), dtype, device), _number(2 / (m * c), dtype, device)
    da = torch.empty((m, c), dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.sub(a, y, out=da)
        torch.sum(torch.mul(da, da, out=terms), out=out, dim=(0, 1)).mul_(mean)
        return da.mul_(twice_mean)

    return compute


def l1(terms: Tensor, options: LossOptions) -> LossFunction:
    """|A - y|, mean over elements."""
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    mean = _number(1 / (m * c), dtype, device)
    da = torch.empty((m, c), dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.sub(a, y, out=da)
        torch.sum(torch.abs(da, out=terms), out=out, dim=(0, 1)).mul_(mean)
        return da.sign_().mul_(mean)

    return compute


def huber(terms: Tensor, options: LossOptions) -> LossFunction:
    """Half the squared difference up to delta, linear beyond, mean over elements."""
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    mean, half = _number(1 / (m * c), dtype, device), _number(0.5, dtype, device)
    da, delta = torch.empty((m, c), dtype=dtype, device=device), options.delta

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.clamp(torch.sub(a, y, out=terms), -delta, delta, out=da)
        # c (d - c/2) = c d - c^2/2. The first form has terms of one size also where d is large.
        torch.sum(terms.addcmul_(da, half, value=-1).mul_(da), out=out, dim=(0, 1)).mul_(mean)
        return da.mul_(mean)

    return compute


def bce_with_logits(terms: Tensor, options: LossOptions) -> LossFunction:
    """Sigmoid NLL of logits, mean over elements."""
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    mean = _number(1 / (m * c), dtype, device)
    if options.pos_weight is not None:
        return _positive_bce(terms, options.pos_weight)
    da = torch.empty((m, c), dtype=dtype, device=device)
    product = torch.empty((m, c), dtype=dtype, device=device)

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        # -y log s(a) - (1 - y) log(1 - s(a)) = max(a, 0) - a y + log(1 + e^-|a|)
        torch.abs(a, out=terms).neg_().exp_().log1p_().add_(torch.clamp_min(a, 0, out=da))
        torch.sum(terms.sub_(torch.mul(a, y, out=product)), out=out, dim=(0, 1)).mul_(mean)
        return torch.sigmoid(a, out=da).sub_(y).mul_(mean)

    return compute


def _positive_bce(terms: Tensor, pos_weight: Tensor) -> LossFunction:
    """Sigmoid NLL of logits with a factor p of the terms with y, mean over elements.

    l = (1 - y) a + t log(1 + e^-a) and dA = t sigmoid(a) - p y, with t = 1 - y + p y.
    """
    (m, c), dtype, device = terms.shape, terms.dtype, terms.device
    mean, one = _number(1 / (m * c), dtype, device), _number(1.0, dtype, device)
    da, factor, positive = torch.empty((3, m, c), dtype=dtype, device=device).unbind()

    def compute(a: Tensor, y: Tensor, out: Tensor) -> Tensor:
        torch.mul(y, pos_weight, out=positive)
        torch.sub(positive, y, out=factor).add_(one)
        # log(1 + e^-a) = log(1 + e^-|a|) - min(a, 0)
        torch.abs(a, out=terms).neg_().exp_().log1p_().sub_(torch.clamp_max(a, 0, out=da)).mul_(factor)
        terms.add_(a).sub_(torch.mul(a, y, out=da))
        torch.sum(terms, out=out, dim=(0, 1)).mul_(mean)
        return torch.sigmoid(a, out=da).mul_(factor).sub_(positive).mul_(mean)

    return compute


#: The functions by the names of ``fastmlp.base.losses``: all losses that a step has. Each leaves the
#: terms of its mean in the matrix [M, C] that it is given, except cross-entropy.
FUNCTIONS: dict[str, Callable[[Tensor, LossOptions], LossFunction]] = {
    function.__name__: function for function in (cross_entropy, mse, l1, huber, bce_with_logits, softmax_squared_error)
}
