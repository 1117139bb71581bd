"""Losses as modules, and the function behind them; ``fastmlp.functional`` has all losses as functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd.cross_entropy import SoftmaxCrossEntropy, cross_entropy

__all__ = ["CrossEntropyLoss", "SoftmaxCrossEntropy", "cross_entropy"]

torch.fx.wrap("cross_entropy")  # as in fastmlp.functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on the fused operations; arguments, shapes and errors as ``cross_entropy``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [C], [N, C] or [N, C, d1, ...]."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
