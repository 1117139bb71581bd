"""The loss scale of float16: one rule for every engine, and no wait for a GPU.

float16 loses gradients below 6e-8. Losses are therefore multiplied by a scale before the backward pass, and gradients
divided by it. A step whose gradients overflow is skipped and halves the scale; 2,000 good steps in a row double it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: The gradient of a mean over one row, times this, is still below float16's largest number, 65,504.
START = 2.0**15
#: After so many good steps in a row the scale is multiplied by GROWTH, after an overflow by BACKOFF; LEAST bounds it.
GROWTH_STEPS, GROWTH, BACKOFF, LEAST = 2000, 2.0, 0.5, 1.0


class LossScale:
    """A scale on ``device`` that follows the overflows of gradients.

    ``check`` and ``adjust`` are torch's operations. ``kernels/before_update.py`` does the same in the step on a GPU.

    With ``members`` each member has a scale of its own, and all tensors are [E]. Only kernels move those.

    Attributes:
        scale: 0-d float32, at least 1: the factor of the loss.
        inverse: 0-d float32: the factor of the gradients.
        overflow: 0-d float32: 1 where the gradients last checked had an infinity or NaN, else 0.
        good_steps: 0-d int32: steps without overflow since the scale last moved.
    """

    def __init__(self, device: torch.device, members: int | None = None) -> None:
        shape = () if members is None else (members,)
        self.scale = torch.full(shape, START, dtype=torch.float32, device=device)
        self.inverse, self.overflow = 1 / self.scale, torch.zeros_like(self.scale)
        self.good_steps = torch.zeros(shape, dtype=torch.int32, device=device)
        self._one = torch.ones_like(self.scale)

    def check(self, grads: Sequence[Tensor], *, scaled: bool) -> None:
        """Set ``overflow``, after dividing the gradients by the scale in place if they come ``scaled``."""
        self.overflow.zero_()
        factor = self.inverse if scaled else self._one
        torch._amp_foreach_non_finite_check_and_unscale_(list(grads), self.overflow, factor)

    def adjust(self) -> None:
        """Move the scale by the overflow that ``check`` found."""
        torch._amp_update_scale_(self.scale, self.good_steps, self.overflow, GROWTH, BACKOFF, GROWTH_STEPS)
        torch.reciprocal(self.scale.clamp_(min=LEAST), out=self.inverse)

    def counters(self) -> dict[str, Any]:
        """The scale, and the good steps since it last moved, by their names in a step's state; lists with members."""
        return {"loss_scale": self.scale.tolist(), "loss_scale_good_steps": self.good_steps.double().tolist()}

    def set_counters(self, counters: dict[str, Any]) -> None:
        """What ``counters`` returned."""
        for tensor, name in ((self.scale, "loss_scale"), (self.good_steps, "loss_scale_good_steps")):
            tensor.copy_(torch.tensor(counters[name], device="cpu"))
        torch.reciprocal(self.scale, out=self.inverse)
