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


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss of a network's output A [M, C] and a target.

    Attributes:
        function: its function in ``fastmlp.functional``.
        torch: torch's function (A, target, reduction=...); None where torch has none.
        step: its name in ``TrainStep``; None where a step does not have it.
        kernel: the file of its kernel, and of its operations in ``fastmlp.ops``.
        input: what A is: any "values", "logits", or "probabilities", which need a sigmoid or a softmax at the end.
        target: what a step takes: "values" (as A) or "classes" (class numbers [M]). The functions of losses of classes
            take both.
        over: what a mean divides by.
        dtype: of the loss where A and the target have different ones: the promoted one, or that of one operand as
            torch has it; "equal" where torch refuses them outside autocast.
        broadcasts: whether torch's function broadcasts, and so raises another error for shapes that do not fit.
        options: what ``TrainStep`` can set of it; "probabilities" is a target [M, C] in place of class numbers.
    """

    function: str
    torch: Callable[..., Tensor] | None
    step: str | None
    kernel: Literal["cross_entropy", "elementwise_loss", "softmax_squared_error"] = "elementwise_loss"
    input: Literal["values", "logits", "probabilities"] = "values"
    target: Literal["classes", "values"] = "values"
    over: Literal["rows", "elements"] = "elements"
    dtype: Literal["promoted", "input", "target", "equal"] = "promoted"
    broadcasts: bool = False
    options: tuple[str, ...] = ()

    def count(self, a: Tensor) -> int:
        """What the mean over A divides by."""
        return a.numel() if self.over == "elements" else math.prod(a.shape[:-1])


#: Every loss by name, in the order of the documentation.
LOSSES = {
    "cross_entropy": Loss(
        "cross_entropy",
        F.cross_entropy,
        "cross_entropy",
        "cross_entropy",
        "logits",
        "classes",
        "rows",
        options=("class_weight", "ignore_index", "label_smoothing", "probabilities"),
    ),
    "mse": Loss("mse_loss", F.mse_loss, "mse", broadcasts=True),
    "l1": Loss("l1_loss", F.l1_loss, "l1", broadcasts=True),
    "huber": Loss("huber_loss", F.huber_loss, "huber", dtype="input", broadcasts=True, options=("delta",)),
    "binary_cross_entropy": Loss("bce_loss", F.binary_cross_entropy, None, input="probabilities", dtype="equal"),
    "bce_with_logits": Loss(
        "bce_with_logits",
        F.binary_cross_entropy_with_logits,
        "bce",
        input="logits",
        dtype="target",
        options=("pos_weight",),
    ),
    "nllm": Loss("multiclass_nll", None, None, input="probabilities", over="rows"),
    "softmax_squared_error": Loss(
        "softmax_squared_error", None, "softmax_squared_error", "softmax_squared_error", "logits", "classes", "rows"
    ),
}
#: The names that ``TrainStep`` takes, and the losses that they mean.
STEP_LOSSES = {loss.step: name for name, loss in LOSSES.items() if loss.step is not None}
#: A label that no user writes: a loss that ignores this label finds every label out of range.
NO_CLASS = -(1 << 63)
#: The label that torch's cross-entropy ignores by default.
IGNORED = -100


def takes_classes(loss: str) -> bool:
    """Whether the target of a step is int64 class numbers [M]; else it is values like the output, [M, C]."""
    return LOSSES[loss].target == "classes"
