"""Losses of the CPU training step in which rows have weights: class weights, ignored labels, sample weights.

The loss is sum_m s_m w_m l_m / sum_m s_m w_m, with the sample weight s_m (1 without), and w_m as torch has it: for
labels the class weight of the label, 0 where the label is ignored; for all other targets 1. The functions work as those
of ``cpu_losses``, and take the sample weights [M] or None last.

Cross-entropy, with class weights v, label smoothing e, and D the divisor above:

    labels           l = -(1-e) v_y log p_y - (e/C) sum_c v_c log p_c       dA = (mass p - q - onehot hot) / D
                     hot = (1-e) s v_y, q_c = (e/C) s v_c, mass = hot + sum q; all are 0 where the label is ignored
    probabilities    l = -sum_c q_c log p_c, q_c = ((1-e) t_c + e/C) v_c    dA = s (p sum q - q) / sum s
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.arguments import check_classes
from ..base.losses import LOSSES
from ..ops.torch_losses import vector_width
from .loss_options import LossOptions

#: (A_L [M, C], target, 0-d loss to write, sample weights [M] or None) -> dA_L
WeightedLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
_nll_loss = torch.ops.aten.nll_loss_forward.output


def columns_are_faster(m: int, c: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether log-softmax should run along the columns of a transposed matrix.

    torch vectorizes log-softmax along rows that fill a vector register, and across the rows of a transposed matrix.
    """
    return device.type == "cpu" and c < vector_width(dtype) and m >= 512


def weighted_cross_entropy(
    m: int, c: int, dtype: torch.dtype, device: torch.device, options: LossOptions
) -> WeightedLoss:
    """Cross-entropy with all options, of labels [M] or probabilities [M, C]."""
    of_labels: WeightedLoss | None = None
    of_probabilities: WeightedLoss | None = None

    def compute(a: Tensor, y: Tensor, out: Tensor, weight: Tensor | None) -> Tensor:
        nonlocal of_labels, of_probabilities
        if y.is_floating_point():
            of_probabilities = of_probabilities or _of_probabilities(m, c, dtype, device, options)
            return of_probabilities(a, y, out, weight)
        of_labels = of_labels or _of_labels(m, c, dtype, device, options)
        return of_labels(a, y, out, weight)

    return compute


def _log_softmax(m: int, c: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A -> log p, in a buffer."""
    log_p = torch.empty((m, c), dtype=dtype, device=device)
    if not columns_are_faster(m, c, dtype, device):
        return lambda a: torch.log_softmax(a, 1, out=log_p)
    a_t, log_p_t = torch.empty((2, c, m), dtype=dtype, device=device).unbind()
    return lambda a: log_p.copy_(torch.log_softmax(a_t.copy_(a.t()), 0, out=log_p_t).t())


def _of_labels(m: int, c: int, dtype: torch.dtype, device: torch.device, options: LossOptions) -> WeightedLoss:
    """The formula of labels."""
    smoothing, per_class, ignored = options.label_smoothing, options.class_weight, options.ignored
    log_softmax, da = _log_softmax(m, c, dtype, device), torch.empty((m, c), dtype=dtype, device=device)
    rows, hot, share, mass, smooth = torch.empty((5, m), dtype=dtype, device=device).unbind()
    total = torch.empty((), dtype=dtype, device=device)
    numbers = torch.tensor((1 - smoothing, 0.0), dtype=dtype, device=device)
    confidence, ignored_label = numbers[0], torch.full((), ignored, dtype=torch.int64, device=device)
    labels = torch.empty(m, dtype=torch.int64, device=device)
    skipped = torch.empty(m, dtype=torch.bool, device=device)
    spread = torch.full((c,), smoothing / c, dtype=dtype, device=device)  # q_c for s = 1
    if per_class is not None:
        spread.mul_(per_class)
    spread_mass = spread.sum()

    def compute(a: Tensor, y: Tensor, out: Tensor, weight: Tensor | None) -> Tensor:
        log_p = log_softmax(a)
        try:
            _nll_loss(log_p, y, None, 0, ignored, output=rows, total_weight=total)
        except (IndexError, RuntimeError):
            check_classes(y, c, ignore_index=ignored)
            raise
        torch.eq(y, ignored_label, out=skipped)
        labels.copy_(y).masked_fill_(skipped, 0)
        (share.fill_(1.0) if weight is None else share.copy_(weight)).masked_fill_(skipped, 0.0)
        if per_class is None:
            hot.copy_(share)
        else:
            torch.index_select(per_class, 0, labels, out=hot).mul_(share)
        torch.sum(hot, 0, out=total)
        rows.mul_(hot)
        if smoothing:
            # An ignored row's log p may be -inf, and 0 times -inf is NaN.
            torch.mv(log_p, spread, out=smooth).mul_(share).masked_fill_(skipped, 0.0)
            rows.mul_(confidence).sub_(smooth)
        torch.sum(rows, 0, out=out).div_(total)
        # Where all rows are ignored, D is 0 and the loss NaN. torch's gradient is 0 then.
        hot.div_(total).masked_fill_(skipped, 0.0)
        if smoothing:
            share.div_(total).masked_fill_(skipped, 0.0)
            torch.mul(share, spread_mass, out=mass).add_(hot.mul_(confidence))
        torch.exp(log_p, out=da).mul_((mass if smoothing else hot).unsqueeze(1))
        if smoothing:
            da.addcmul_(share.unsqueeze(1), spread, value=-1)
        return da.scatter_add_(1, labels.unsqueeze(1), hot.neg_().unsqueeze(1))

    return compute


def _of_probabilities(m: int, c: int, dtype: torch.dtype, device: torch.device, options: LossOptions) -> WeightedLoss:
    """The formula of probabilities."""
    smoothing, per_class = options.label_smoothing, options.class_weight
    log_softmax = _log_softmax(m, c, dtype, device)
    da, q = torch.empty((2, m, c), dtype=dtype, device=device).unbind()
    rows, share, mass = torch.empty((3, m), dtype=dtype, device=device).unbind()
    total = torch.empty((), dtype=dtype, device=device)
    confidence, spread, mean = torch.tensor((1 - smoothing, smoothing / c, 1 / m), dtype=dtype, device=device).unbind()

    def compute(a: Tensor, y: Tensor, out: Tensor, weight: Tensor | None) -> Tensor:
        log_p = log_softmax(a)
        q.copy_(y)
        if smoothing:
            q.mul_(confidence).add_(spread)
        if per_class is not None:
            q.mul_(per_class)
        if weight is None:
            share.copy_(mean)
        else:
            torch.sum(share.copy_(weight), 0, out=total)
            share.div_(total)
        torch.sum(torch.mul(q, log_p, out=da), 1, out=rows)
        torch.sum(rows.mul_(share), 0, out=out).neg_()
        torch.sum(q, 1, out=mass)
        return torch.exp(log_p, out=da).mul_(mass.unsqueeze(1)).sub_(q).mul_(share.unsqueeze(1))

    return compute


def weighted_rows(
    loss: str,
    plain: Callable[[Tensor, Tensor, Tensor], Tensor],
    terms: Tensor,
) -> WeightedLoss:
    """``plain`` with sample weights: row m counts as M s_m / sum s rows do.

    ``plain`` leaves the terms of its mean in ``terms`` [M, C].
    """
    m, c = terms.shape
    share, total = terms.new_empty((m, 1)), terms.new_empty(())
    count = m if LOSSES[loss].over == "rows" else m * c
    rows, mean = terms.new_tensor((m, 1 / count)).unbind()

    def compute(a: Tensor, y: Tensor, out: Tensor, weight: Tensor | None) -> Tensor:
        da = plain(a, y, out)
        if weight is None:
            return da
        torch.sum(share.copy_(weight.unsqueeze(1)), (0, 1), out=total)
        share.div_(total).mul_(rows)
        torch.sum(terms.mul_(share), (0, 1), out=out).mul_(mean)
        return da.mul_(share)

    return compute
