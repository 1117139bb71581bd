"""A step's loss with its options: what they may be, and the tensors that the engines read.

Class weights and pos_weight are copied once, when a step is made. Sample weights come with every batch, and
``validation.Batches`` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.arguments import check_classes, check_cross_entropy, check_delta, check_same_device, check_tensor
from ..base.losses import IGNORED, LOSSES, STEP_LOSSES

#: The values that mean that an option is not set. -100 is what torch's losses of classes ignore unasked.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "class_weight": (None,),
    "ignore_index": (None, IGNORED),
    "label_smoothing": (0.0,),
    "pos_weight": (None,),
    "delta": (1.0,),
}


@dataclass(frozen=True, eq=False)
class LossOptions:
    """The options of one loss, checked; tensors are contiguous copies on the step's device, float32 or float64.

    Attributes:
        class_weight: [C], a factor of each class's rows; None: 1.
        ignore_index: the label whose rows count for nothing; None: see ``TrainStep``.
        label_smoothing: e in [0, 1].
        pos_weight: [C], a factor of the terms with y; None: 1.
        delta: where huber's loss becomes linear.
    """

    class_weight: Tensor | None = None
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    pos_weight: Tensor | None = None
    delta: float = 1.0

    @property
    def ignored(self) -> int:
        """The label whose rows count for nothing, where a loss has to look at every row's weight."""
        return IGNORED if self.ignore_index is None else self.ignore_index

    @property
    def weighs_labels(self) -> bool:
        """Whether rows with labels have weights of their own, without sample weights."""
        return self.class_weight is not None or self.ignore_index is not None

    @property
    def is_plain(self) -> bool:
        """Whether no option is set."""
        return self is PLAIN or self is PLAIN_OF_MEMBERS

    @property
    def ignores_unasked(self) -> bool:
        """Whether rows labelled -100 count for nothing, as in torch, where no option says so."""
        return self is not PLAIN_OF_MEMBERS


#: No option is set.
PLAIN = LossOptions()
#: No option is set, and -100 is no class.
PLAIN_OF_MEMBERS = LossOptions()


def check_labels_of_members(y: Tensor, classes: int | None, options: LossOptions) -> None:
    """On a CPU, IndexError for a label of any member that is no class; ``classes`` is None for a loss of values."""
    if classes is not None and not y.is_floating_point() and y.is_cpu:
        check_classes(y, classes, ignore_index=None if options.is_plain else options.ignored)


def loss_options(name: str, classes: int, dtypes: set[torch.dtype], like: Tensor, **options: Any) -> LossOptions:
    """The options of a step's loss ``name`` with ``classes`` outputs, checked and copied.

    Args:
        dtypes: of the parameters and of the products.
        like: a tensor on the step's device, in the dtype of the losses.
        options: by the names of ``LossOptions``.

    Raises:
        ValueError: an option that the loss does not have.
        TypeError: a weight that is no tensor, numbers that are none.
        RuntimeError: a weight of another length, dtype or device; label_smoothing outside [0, 1]; delta not above 0.
    """
    own = LOSSES[STEP_LOSSES[name]].options
    given = {option: value for option, value in options.items() if not _says_nothing(option, value)}
    for option in given:
        if option not in own:
            fits = [loss.step for loss in LOSSES.values() if option in loss.options and loss.step is not None]
            raise ValueError(
                f"{option} is an option of the loss {', '.join(map(repr, fits))}, and the loss is {name!r}; leave "
                f"{option} out, or train with autograd, as in loss(model(x), y).backward()"
            )
    # The checks of functional.cross_entropy, on a batch of one row.
    smoothing = options["label_smoothing"]
    ignore_index = options["ignore_index"]
    row = torch.empty(1, classes, dtype=like.dtype, device="meta")
    label = torch.empty(1, dtype=torch.int64, device="meta")
    check_cross_entropy(row, label, None, IGNORED if ignore_index is None else ignore_index, "mean", smoothing)
    class_weight, pos_weight = given.get("class_weight"), given.get("pos_weight")
    if class_weight is not None:
        _check_class_weight(class_weight, classes, dtypes | {like.dtype}, like)
    if pos_weight is not None:
        _check_pos_weight(pos_weight, classes, like)
    delta = check_delta(options["delta"])
    # -100 given by name is no default: on a GPU it makes the kernels count the rows.
    if not given and (ignore_index is None or "ignore_index" not in own):
        return PLAIN
    return LossOptions(
        _copied(class_weight, classes, like),
        ignore_index if "ignore_index" in own else None,
        float(smoothing),
        _copied(pos_weight, classes, like),
        delta,
    )


def _says_nothing(option: str, value: object) -> bool:
    return any(value is default or (type(value) in (int, float) and value == default) for default in DEFAULTS[option])


def _copied(weight: Tensor | None, classes: int, like: Tensor) -> Tensor | None:
    return None if weight is None else weight.detach().expand(classes).to(like.dtype, copy=True).contiguous()


def _check_class_weight(weight: object, classes: int, dtypes: set[torch.dtype], like: Tensor) -> None:
    check_tensor(weight, "class_weight")
    assert isinstance(weight, Tensor)
    if weight.dim() != 1 or weight.numel() != classes:
        raise RuntimeError(
            f"expected class_weight of shape [{classes}], one value for each class, got {list(weight.shape)}"
        )
    if weight.dtype not in dtypes:
        raise RuntimeError(
            f"expected class_weight of dtype {like.dtype}, got {weight.dtype}; convert it with .to({like.dtype})"
        )
    check_same_device((("the parameters", like), ("class_weight", weight)))


def _check_pos_weight(weight: object, classes: int, like: Tensor) -> None:
    check_tensor(weight, "pos_weight")
    assert isinstance(weight, Tensor)
    if weight.dim() > 1 or weight.numel() not in (1, classes):
        raise RuntimeError(
            f"expected pos_weight of shape [{classes}], one value for each output, got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise RuntimeError(f"expected a floating-point pos_weight, got {weight.dtype}; convert it with .float()")
    check_same_device((("the parameters", like), ("pos_weight", weight)))
