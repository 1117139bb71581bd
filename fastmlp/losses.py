"""Losses as modules, and the function behind them; ``fastmlp.functional`` has all losses as functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd.cross_entropy import SoftmaxCrossEntropy, cross_entropy
from .autograd.elementwise import bce_with_logits, huber_loss, l1_loss, mse_loss

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "MSELoss",
    "SoftmaxCrossEntropy",
    "cross_entropy",
]

torch.fx.wrap("cross_entropy")  # as in fastmlp.functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on the fused operations; arguments, shapes and errors as ``cross_entropy``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [C], [N, C] or [N, C, d1, ...]."""
        return cross_entropy(
            input,
            target,
            # A module finds its buffers itself only after everything else.
            self._buffers["weight"] if "weight" in self._buffers else self.weight,  # noqa: SIM401
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(torch.nn.MSELoss):
    """torch.nn.MSELoss on the fused operations; shapes, dtypes and errors as ``functional.mse_loss``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of values and targets of one shape."""
        return mse_loss(input, target, self.reduction)


class L1Loss(torch.nn.L1Loss):
    """torch.nn.L1Loss on the fused operations; shapes, dtypes and errors as ``functional.l1_loss``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of values and targets of one shape."""
        return l1_loss(input, target, self.reduction)


class HuberLoss(torch.nn.HuberLoss):
    """torch.nn.HuberLoss on the fused operations; shapes, dtypes and errors as ``functional.huber_loss``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of values and targets of one shape."""
        return huber_loss(input, target, self.reduction, self.delta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss on the fused operations; arguments and errors as ``functional.bce_with_logits``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and targets of one shape."""
        return bce_with_logits(input, target, self.weight, self.pos_weight, self.reduction)
