"""Which unit of machine code computes the loss of a batch, by the options, the targets and the sample weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from ..base.losses import takes_classes
from .loss_options import LossOptions


class LossUnits:
    """The units of one loss and its options.

    Attributes:
        usual: the unit for targets of the dtype ``target`` without sample weights.
        ignoring: the unit for labels of which some are ignored unasked; None where no label is ignored unasked.
        per_class: factors of the classes; None: 1.
    """

    def __init__(self, loss: str, options: LossOptions, dtype: torch.dtype) -> None:
        self._dtype, self._is_entropy, classes = dtype, loss == "cross_entropy", takes_classes(loss)
        self.target = torch.int64 if classes else dtype
        self.per_class = options.class_weight if classes else options.pos_weight
        ignored = options.ignored if self._is_entropy else 0
        self._weighted = cpu.LossUnit(f"row_weights.{loss}", classes, ignored)
        self.usual, self.ignoring = cpu.LossUnit(f"losses.{loss}", classes), None
        if options.pos_weight is not None:
            self.usual = self._weighted = cpu.LossUnit("row_weights.positive_bce", False)
        elif self._is_entropy and not options.is_plain:
            self.usual = self._weighted
        elif self._is_entropy and options.ignores_unasked:
            self.ignoring = self._weighted
        self._probabilities = cpu.LossUnit("row_weights.probabilities", False)

    def of(self, y: Tensor, weight: Tensor | None) -> cpu.LossUnit | None:
        """The unit for these targets and sample weights; None: the machine code has none."""
        if y.dtype is self.target:
            return self.usual if weight is None else self._weighted
        return self._probabilities if self._is_entropy and y.dtype is self._dtype else None
