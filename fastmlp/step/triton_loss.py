"""The loss in a step on the kernels: how much each row counts, and dZ of the last layer by the loss's own kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.losses import IGNORED, LOSSES, NO_CLASS
from ..kernels import cross_entropy, cross_entropy_of_members, elementwise_loss, softmax_squared_error
from .loss_options import LossOptions
from .validation import host_sees_labels


class RowWeights(NamedTuple):
    """How much the rows of a batch count.

    Attributes:
        sample: sample weights of the rows, or of all rows of the data that are gathered; None: 1. With members they are
            those of all members, or have an axis of members in front.
        ignored: the label whose rows count for nothing; ``NO_CLASS``, which no row has, where there is none.
        divisor: float32, 0-d or [E], where the weight of the batch goes, by which its sums are divided; None: all rows
            count alike, and the sums are divided by their number.
    """

    sample: Tensor | None
    ignored: int
    divisor: Tensor | None


#: All rows count alike.
_ALIKE = RowWeights(None, NO_CLASS, None)


class StepLoss:
    """A loss with its options, as launches of kernels. dZ comes multiplied by ``factor`` (0-d)."""

    def __init__(self, name: str, options: LossOptions, factor: Tensor | None, device: torch.device) -> None:
        self.name, self.options, self._factor = name, options, factor
        # Whether to look for labels that are ignored unasked, because a plain step would count their rows.
        self._looks = name == "cross_entropy" and host_sees_labels(device)
        self._rows_are_alike = not (options.weighs_labels or self._looks)

    def weights(self, y: Tensor, sample: Tensor | None, divisor: Tensor) -> RowWeights:
        """How much the rows of a batch count, and where the weight of the batch goes."""
        if sample is not None:
            return RowWeights(sample, self.options.ignored, divisor)
        if self._rows_are_alike or y.is_floating_point():
            return _ALIKE
        if self.options.weighs_labels or bool((y == IGNORED).any()):
            return RowWeights(None, self.options.ignored, divisor)
        return _ALIKE

    def of_cross_entropy(self, m: int, rows: Tensor | None, weights: RowWeights) -> dict[str, Any]:
        """What the kernels of cross-entropy take besides tensors of the network."""
        options = self.options
        return {
            "ignore_index": weights.ignored,
            "smoothing": options.label_smoothing,
            **self._common(m, rows, weights),
        }

    def _common(self, count: int, rows: Tensor | None, weights: RowWeights) -> dict[str, Any]:
        return {
            "scale": 1 / count if weights.divisor is None else 1.0,
            "factor": self._factor,
            "sample_weight": weights.sample,
            "divisor": weights.divisor,
            "rows": rows,
        }

    def gradient(
        self,
        a: Tensor,
        y: Tensor,
        rows: Tensor | None,
        weights: RowWeights,
        loss_rows: Tensor,
        dz: Tensor,
        active: Tensor | None = None,
    ) -> None:
        """DZ from the network's output A [M, C] or [E, M, C], and the loss of every row or element."""
        options = self.options
        if self.name == "cross_entropy":
            common = {**self.of_cross_entropy(a.shape[-2], rows, weights), "loss": loss_rows, "dz": dz}
            if a.dim() == 3:
                cross_entropy_of_members(a, y, weight=options.class_weight, active=active, **common)
            else:
                cross_entropy(a, y, weight=options.class_weight, **common)
            return
        count = LOSSES[self.name].count(a) // (a.shape[0] if a.dim() == 3 else 1)
        common = {**self._common(count, rows, weights), "active": active}
        if self.name == "softmax_squared_error":
            softmax_squared_error(a, y, loss=loss_rows, dz=dz, **common)
        else:
            of_values = {"delta": options.delta, "pos_weight": options.pos_weight}
            elementwise_loss(a, y, self.name, loss=loss_rows.view(a.shape), da=dz, **of_values, **common)
