"""The losses: one record each, which is all that fastmlp knows of them outside the kernels and the reference.

Two public names say "bce". ``functional.bce_loss`` takes probabilities; its loss is "binary_cross_entropy" everywhere
inside. ``TrainStep(loss="bce")`` takes logits; its loss is "bce_with_logits" everywhere inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "NO_CLASS", "STEP_LOSSES", "Loss", "takes_classes"]


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss of a network's output A [M, C] and a target.

    Attributes:
        function: its function in ``fastmlp.functional``.
        kernel: the file of its kernel, and of its operations in ``fastmlp.ops``.
        input: what A is: any "values", "logits", or "probabilities", which need a sigmoid or a softmax at the end.
        target: what a step takes: "classes" (class numbers [M]) or "values" (as A). The functions of losses of classes
            take both.
        over: what a mean divides by.
        torch: torch's function (A, target, reduction=...); None where torch has none.
        step: its name in ``TrainStep``; None where a step does not have it.
    """

    function: str
    kernel: Literal["cross_entropy", "elementwise_loss", "softmax_squared_error"]
    input: Literal["values", "logits", "probabilities"]
    target: Literal["classes", "values"]
    over: Literal["rows", "elements"]
    torch: Callable[..., Tensor] | None
    step: str | None

    def count(self, a: Tensor) -> int:
        """What the mean over A divides by."""
        return a.numel() if self.over == "elements" else math.prod(a.shape[:-1])


#: Every loss by name, in the order of the documentation.
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        "cross_entropy", "cross_entropy", "logits", "classes", "rows", F.cross_entropy, "cross_entropy"
    ),
    "mse": Loss("mse_loss", "elementwise_loss", "values", "values", "elements", F.mse_loss, "mse"),
    "l1": Loss("l1_loss", "elementwise_loss", "values", "values", "elements", F.l1_loss, "l1"),
    "binary_cross_entropy": Loss(
        "bce_loss", "elementwise_loss", "probabilities", "values", "elements", F.binary_cross_entropy, None
    ),
    "bce_with_logits": Loss(
        "bce_with_logits",
        "elementwise_loss",
        "logits",
        "values",
        "elements",
        F.binary_cross_entropy_with_logits,
        "bce",
    ),
    "nllm": Loss("multiclass_nll", "elementwise_loss", "probabilities", "values", "rows", None, None),
    "softmax_squared_error": Loss(
        "softmax_squared_error", "softmax_squared_error", "logits", "classes", "rows", None, "softmax_squared_error"
    ),
}
#: The names that ``TrainStep`` takes, and the losses that they mean.
STEP_LOSSES = {loss.step: name for name, loss in LOSSES.items() if loss.step is not None}
#: The label that the losses of a step ignore: no user writes it, so that every label out of range is found.
NO_CLASS = -(1 << 63)


def takes_classes(loss: str) -> bool:
    """Whether the target of a step is int64 class numbers [M]; else it is values like the output, [M, C]."""
    return LOSSES[loss].target == "classes"
