"""The update of a step on a GPU that needs all gradients first, for clipping or float16's loss scale: two launches.

    1  before_update   clipping's factor, whether float16 skips the step, the next loss scale, AdamW's corrections
    1  reduce_update   the update

Nothing waits for the device: which steps were skipped, only the device knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.before_update import LossScaleState, before_update
from ..kernels.configs import cdiv
from ..kernels.layout import SEGMENT, Layout
from ..kernels.reduce_update import reduce_update
from .loss_scale import BACKOFF, GROWTH, GROWTH_STEPS, LEAST, LossScale
from .optimizers import Optimizer


class LateUpdate:
    """Updates the parameters of a layout from flat gradients. ``row`` is the shape of a step's settings.

    With members every number is one per member, and ``active`` says which of them are updated.

    Attributes:
        squares: with clipping, the sum of the squares of each segment of the gradients; whoever makes them writes it.
        overflow: with a loss scale, the flag that whoever makes the gradients raises.
        count: the number of updates, where the rule counts and steps may be skipped.
    """

    def __init__(
        self,
        layout: Layout,
        rule: Optimizer,
        states: list[Tensor],
        loss_scale: LossScale | None,
        row: tuple[int, ...],
        active: Tensor | None = None,
    ) -> None:
        self._layout, self._rule, self._states, self._loss_scale = layout, rule, states, loss_scale
        self._active = active
        device = layout.params[0].device
        of = () if layout.members is None else (layout.members,)
        self._factor = torch.empty(of, dtype=torch.float32, device=device)
        self.squares: Tensor | None = None
        if rule.max_grad_norm is not None:
            blocks = cdiv(layout.total // SEGMENT, 16) * 16
            self.squares = torch.zeros((*of, blocks), dtype=torch.float32, device=device)
        self.overflow: Tensor | None = None
        self.count: Tensor | None = None
        self._skip: Tensor | None = None
        self._state: LossScaleState | None = None
        self._row: Tensor | None = None
        self._decays: Tensor | None = None
        if loss_scale is not None:
            self.overflow, self._skip = (torch.zeros(of, dtype=torch.int32, device=device) for _ in range(2))
            numbers = loss_scale.scale, loss_scale.inverse, loss_scale.good_steps, self.overflow, self._skip
            self._state = LossScaleState(*numbers, GROWTH_STEPS, GROWTH, BACKOFF, LEAST)
            if rule.counted:
                self.count = torch.zeros(of, dtype=torch.int32, device=device)
                self._row = torch.empty((*of, *row), dtype=torch.float32, device=device)
                if rule.decays:
                    self._decays = torch.empty(len(rule.decays), dtype=torch.float64, device=device)
                self.settings_changed()

    def settings_changed(self) -> None:
        """Take up the rule's settings that a row of ``Optimizer.rows`` does not have."""
        if self._decays is not None:
            decays = torch.tensor(self._rule.decays, dtype=torch.float64, device="cpu")
            self._decays.copy_(decays.pin_memory() if self._decays.is_cuda else decays, non_blocking=True)

    def examine(self, grads: Tensor, row: Tensor) -> None:
        """Write ``squares`` and raise ``overflow`` for gradients that anybody may have written to."""
        squares, overflow = self.squares, self.overflow
        reduce_update(
            self._layout, grads, 1, "none", row, squares=squares, overflow=overflow, active=self._active
        )  # fmt: skip

    def apply(self, slices: Tensor, row: Tensor, *, scaled: bool) -> None:
        """Update by the sum of gradients over ``slices`` [S, total]; ``scaled``: still multiplied by the loss scale."""
        optimizer = self._rule.kernel
        before_update(
            optimizer,
            row,
            self._factor,
            squares=self.squares,
            loss_scale=self._state,
            scaled=scaled,
            count=self.count,
            decays=self._decays,
            counted_row=self._row,
            active=self._active,
        )
        reduce_update(
            self._layout,
            slices,
            slices.shape[0],
            optimizer,
            row if self._row is None else self._row,
            states=self._states,
            unscale=self._factor,
            skip=self._skip,
            active=self._active,
        )
