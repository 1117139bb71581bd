"""What a step accepts: a model, a loss, batches and data. Every error is the one that torch would raise."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base.arguments import check_batch, check_classes, check_rows, check_same_device, check_tensor, readable_rows
from ..base.losses import LOSSES, STEP_LOSSES, takes_classes
from ..base.names import unknown
from ..nn import MLP, is_parallel


def check_is_mlp(model: nn.Module) -> None:
    """TypeError for a model that is no MLP, with what to do instead."""
    if isinstance(model, MLP):
        return
    advice = "convert a torch module with fastmlp.MLP.from_torch(module), which shares its parameters"
    if is_parallel(model):
        advice = (
            "a step does not call it; train the MLP itself with TrainStep(mlp, process_group="
            "torch.distributed.group.WORLD), which adds up the gradients of all processes, or train with autograd"
        )
    raise TypeError(f"TrainStep trains a fastmlp.MLP, got {type(model).__name__}; {advice}")


def check_loss(loss: object) -> None:
    """ValueError for an unknown name of a loss, TypeError for a loss that is no name."""
    if not isinstance(loss, str):
        shown = getattr(loss, "__name__", type(loss).__name__)
        plain = _plain(shown)
        known = next((r.step for r in LOSSES.values() if r.torch is loss or _plain(r.function) == plain), None)
        advice = "train with autograd, as in loss(model(x), y).backward()"
        if known is not None:
            advice = f"pass loss={known!r}, or {advice}"
        raise TypeError(f"expected the name of a loss, one of {', '.join(STEP_LOSSES)}, got {shown}; {advice}")
    if loss not in STEP_LOSSES:
        raise ValueError(unknown("loss", loss, STEP_LOSSES))


def _plain(name: str) -> str:
    """The name of a loss's function or module as one word: "mse" for mse_loss and MSELoss."""
    return name.lower().replace("_", "").removesuffix("loss")


def check_dtype(dtype: object) -> None:
    """TypeError for a dtype that nothing computes in."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected dtype to be a torch.dtype such as torch.bfloat16, got {dtype!r}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"expected dtype float32, float64, float16 or bfloat16, got {dtype}")


def check_batch_size(batch_size: object) -> int:
    """The batch size as an int; ValueError or TypeError unless it is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__"):
        raise ValueError(f"expected a batch_size of at least 1, a whole number, got {batch_size!r}")
    number = operator.index(batch_size)
    if number < 1:
        raise ValueError(f"expected a batch_size of at least 1, a whole number, got {batch_size!r}")
    return number


class Batches:
    """Checks batches for steps with one model, loss and dtype.

    Args:
        ends: features of the model's input and output.
        loss: a name of ``LOSSES``; ``name`` is what messages call it.
        inputs: dtypes of X that the step takes.
        like: a tensor on the step's device.
    """

    def __init__(
        self, ends: tuple[int, int], loss: str, name: str, dtype: torch.dtype, own: torch.dtype, like: Tensor
    ) -> None:
        (self._features, self._classes), self._name, self._dtype = ends, name, dtype
        self._takes_classes, self._like, self._device = takes_classes(loss), like, like.device
        self._inputs = {dtype, own, torch.uint8}
        if dtype.itemsize == 2:
            self._inputs |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}

    def checked(self, x: Tensor, y: Tensor, *, in_range: bool) -> tuple[Tensor, Tensor]:
        """X flattened to [B, K] and Y, both off the tape, class numbers as int64.

        With ``in_range``, class numbers on a CPU are compared with the number of classes.
        """
        check_batch(x, self._features)
        check_tensor(y, "the target")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step cannot train inside torch.inference_mode(); leave it, or use torch.no_grad()")
        x = x.detach() if x.requires_grad else x
        y = y.detach() if y.requires_grad else y
        x = x.flatten(1) if x.dim() > 2 else x
        if x.shape[1] != self._features:
            raise RuntimeError(
                f"expected an input with {self._features} features, got {x.shape[1]}; reshape the input or build "
                f"the model with sizes[0]={x.shape[1]}"
            )
        if x.dtype not in self._inputs:
            raise RuntimeError(
                f"expected an input of dtype {self._dtype} or uint8 pixels, got {x.dtype}; convert it with "
                f".to({self._dtype})"
            )
        if y.dim() == 0 or x.shape[0] != y.shape[0]:
            raise ValueError(
                f"expected as many targets as inputs, got inputs {list(x.shape)} and targets {list(y.shape)}"
            )
        if not x.device == y.device == self._device:
            check_same_device((("the parameters", self._like), ("the input", x), ("the target", y)))
        if y.dtype == torch.uint8 and self._takes_classes:  # torch's losses take these labels too
            y = y.long()
        self._check_targets(y, x.shape[0], in_range=in_range)
        return x, y

    def _check_targets(self, y: Tensor, rows: int, *, in_range: bool) -> None:
        if not self._takes_classes:
            if y.shape != (rows, self._classes):
                raise RuntimeError(
                    f"expected targets of shape [{rows}, {self._classes}] for {self._name}, got {list(y.shape)}"
                )
            if not y.is_floating_point():
                raise RuntimeError(
                    f"expected floating-point targets for {self._name}, got {y.dtype}; convert them with .float()"
                )
            return
        if y.dim() != 1:
            raise RuntimeError(f"expected class numbers of shape [{rows}], got {list(y.shape)}")
        if y.dtype != torch.int64:
            raise RuntimeError(f"expected class numbers of dtype int64, got {y.dtype}; convert them with .long()")
        if rows and in_range and self._device.type == "cpu":
            check_classes(y, self._classes)

    def checked_order(self, order: Tensor | None, images: Tensor) -> Tensor:
        """``order``, or all rows of the images in order."""
        if order is None:
            return torch.arange(images.shape[0], device=self._device)
        check_tensor(order, "order")
        if order.dtype != torch.int64 or order.dim() != 1:
            raise RuntimeError(f"expected order to be int64 [n], got {order.dtype} {list(order.shape)}")
        check_same_device((("the images", images), ("order", order)))
        return order

    def readable(self, order: Tensor, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """``order`` with rows that exist, and which steps have others; on a CPU such a row is an IndexError."""
        if self._device.type == "cpu" or images.shape[0] == 0:
            check_rows(order, images.shape[0])
            return order, None
        return readable_rows(order, images.shape[0], batch_size)


def learning_rates(lr: float, factors: Sequence[float] | None, steps: int) -> Tensor:
    """float64 [steps] on the host: ``lr`` times each factor."""
    if factors is None:
        return torch.full((steps,), lr, dtype=torch.float64, device="cpu")
    try:
        tensor = torch.as_tensor(factors, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected lr_factors to be {steps} numbers, one for each step, got {factors!r}") from error
    if tensor.shape != (steps,):
        raise ValueError(f"expected {steps} lr_factors, one for each step, got {tensor.numel()}")
    good = tensor.isfinite() & (tensor >= 0)
    if not good.all():
        bad = int(good.logical_not().nonzero()[0])
        raise ValueError(f"expected finite lr_factors of at least 0, got {tensor[bad].item()} for step {bad}")
    return tensor * lr
