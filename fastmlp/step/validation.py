"""What a step accepts: a model, a loss, batches and data. Every error is the one that torch would raise."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.arguments import check_batch, check_classes, check_rows, check_same_device, check_tensor, readable_rows
from ..base.losses import LOSSES, STEP_LOSSES, takes_classes
from ..base.names import unknown
from ..base.signature import comparison
from ..nn import MLPEnsemble
from ..nn.mlp import MLP, is_parallel
from .in_memory import check_not_faking, check_readable, fake_mode, in_memory
from .loss_options import PLAIN, LossOptions


def check_is_mlp(model: nn.Module) -> None:
    """TypeError for a model that is no MLP and no MLPEnsemble, with what to do instead."""
    if isinstance(model, (MLP, MLPEnsemble)):
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
        raise ValueError(unknown("loss", loss, STEP_LOSSES, ", or train with autograd and another loss"))


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


def host_sees_labels(device: torch.device) -> bool:
    """Whether the host can look at labels without waiting."""
    return device.type == "cpu"


def _no(x: Tensor, y: Tensor) -> bool:
    return False


class Batches:
    """Checks batches for steps with one model, loss and dtype.

    Args:
        ends: features of the model's input and output.
        loss: a name of ``LOSSES``; ``name`` is what messages call it.
        inputs: dtypes of X that the step takes.
        like: a tensor on the step's device.
        options: of the loss.
    """

    def __init__(
        self,
        ends: tuple[int, int],
        loss: str,
        name: str,
        dtype: torch.dtype,
        own: torch.dtype,
        like: Tensor,
        options: LossOptions = PLAIN,
    ) -> None:
        (self._features, self._classes), self._name, self._dtype = ends, name, dtype
        self._takes_classes, self._like, self._device = takes_classes(loss), like, like.device
        self._is_plain = options.is_plain
        self._takes_probabilities = "probabilities" in LOSSES[loss].options
        self._ignored = options.ignored if "ignore_index" in LOSSES[loss].options else None
        #: The label that is no class.
        self._no_class = self._ignored
        #: Whether a batch is like the last one that was accepted as it was. Then it is accepted too, up to its class
        #: numbers, which are looked at if `_looks`.
        self._is_accepted: Callable[[Tensor, Tensor], bool] = _no
        #: Whether the last batch was such a batch.
        self.repeats = False
        self._looks = False
        self._inputs = {dtype, own, torch.uint8}
        if dtype.itemsize == 2:
            self._inputs |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}

    def checked(self, x: Tensor, y: Tensor, *, in_range: bool) -> tuple[Tensor, Tensor]:
        """X flattened to [B, K] and Y, both off the tape, class numbers as int64.

        With ``in_range``, class numbers on a CPU are compared with the number of classes.
        """
        may_train = fake_mode() is None and not torch.is_inference_mode_enabled()
        self.repeats = may_train and self._is_accepted(x, y)
        if not self.repeats:
            taken = self._taken(x, y)
            as_it_was = taken[0] is x and taken[1] is y
            self._is_accepted = comparison(taken) if as_it_was and x.__class__ is y.__class__ is Tensor else _no
            x, y = taken
        if in_range and self._looks:
            check_classes(y, self._classes, ignore_index=self._no_class)
        return x, y

    def _taken(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """X and Y as ``checked`` returns them, class numbers of any value; sets `_looks`."""
        check_batch(x, self._features)
        check_tensor(y, "the target")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("a step cannot train inside torch.inference_mode(); leave it, or use torch.no_grad()")
        check_not_faking(self._like)
        x, y = in_memory(x), in_memory(y)
        x = x.flatten(1) if x.dim() > 2 else x
        if x.shape[1] != self._features:
            raise RuntimeError(
                f"expected an input with {self._features} features, got {x.shape[1]}; reshape the input or build "
                f"the model with sizes[0]={x.shape[1]}"
            )
        check_readable(x, "input", self._like)
        if x.dtype not in self._inputs:
            raise RuntimeError(
                f"expected an input of dtype {self._dtype} or uint8 pixels, got {x.dtype}; convert it with "
                f".to({self._dtype})"
            )
        if y.dim() == 0 or x.shape[0] != y.shape[0]:
            raise ValueError(
                f"expected as many targets as inputs, got inputs {list(x.shape)} and targets {list(y.shape)}"
            )
        check_readable(y, "target", self._like)
        if not x.device == y.device == self._device:
            check_same_device((("the parameters", self._like), ("the input", x), ("the target", y)))
        if y.dtype == torch.uint8 and self._takes_classes:  # torch's losses take these labels too
            y = y.long()
        self._check_targets(y, x.shape[0])
        self._looks = self._takes_classes and y.dim() == 1 and len(y) > 0 and host_sees_labels(self._device)
        return x, y

    def _check_targets(self, y: Tensor, rows: int) -> None:
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
            if y.is_floating_point() and self._takes_probabilities:
                self._check_probabilities(y, rows)
                return
            raise RuntimeError(f"expected class numbers of shape [{rows}], got {list(y.shape)}")
        if y.dtype != torch.int64:
            raise RuntimeError(f"expected class numbers of dtype int64, got {y.dtype}; convert them with .long()")

    def _check_probabilities(self, y: Tensor, rows: int) -> None:
        if y.shape != (rows, self._classes):
            raise RuntimeError(
                f"expected class numbers of shape [{rows}] or probabilities of shape [{rows}, {self._classes}], got "
                f"{list(y.shape)} in {y.dtype}"
            )
        if self._ignored is not None and self._ignored >= 0:
            raise RuntimeError(
                f"ignore_index is for class numbers, got probabilities in a step with ignore_index={self._ignored}; "
                "leave it out, or give those rows a sample weight of 0"
            )

    def checked_weight(self, weight: Tensor, rows: int) -> Tensor:
        """Sample weights [rows] off the tape. On a CPU their values are checked too."""
        check_tensor(weight, "sample_weight")
        if weight.shape != (rows,):
            raise RuntimeError(f"expected sample_weight of shape [{rows}], one for each row, got {list(weight.shape)}")
        if not weight.is_floating_point():
            raise RuntimeError(f"expected a floating-point sample_weight, got {weight.dtype}; use .float()")
        check_readable(weight, "sample_weight", self._like)
        if weight.device != self._device:
            check_same_device((("the parameters", self._like), ("sample_weight", weight)))
        if rows and self._device.type == "cpu":
            dtype = self._like.dtype  # in which the step computes with them
            least, most = (float(value) for value in torch.aminmax(weight.detach().to(dtype)))
            if not (least >= 0 and most < math.inf):
                raise ValueError(
                    f"expected finite sample weights of at least 0, got values from {least:g} to {most:g} in {dtype}"
                )
            if most == 0:
                raise ValueError(
                    f"every sample weight is 0 in {dtype}, so the weighted mean has no value; leave the batch out, or "
                    "divide the weights by the largest one"
                )
        return in_memory(weight)

    def check_weighed(self, weight: Tensor, order: Tensor, batch_size: int) -> None:
        """On a CPU, ValueError for a batch of an epoch whose sample weights are all 0."""
        if self._device.type != "cpu" or not order.shape[0]:
            return
        padding = -order.shape[0] % batch_size
        used = torch.nn.functional.pad(weight[order].to(self._like.dtype), (0, padding)).view(-1, batch_size)
        empty = (used == 0).all(1)
        if empty.any():
            raise ValueError(
                f"every sample weight of batch {int(empty.nonzero()[0])} is 0, so its weighted mean has no value; "
                "leave these rows out of order"
            )

    def checked_order(self, order: Tensor | None, images: Tensor) -> Tensor:
        """``order``, or all rows of the images in order."""
        if order is None:
            return torch.arange(images.shape[0], device=self._device)
        check_tensor(order, "order")
        if order.dtype != torch.int64 or order.dim() != 1:
            raise RuntimeError(f"expected order to be int64 [n], got {order.dtype} {list(order.shape)}")
        check_readable(order, "order", self._like)
        check_same_device((("the images", images), ("order", order)))
        return in_memory(order)

    def readable(self, order: Tensor, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """``order`` with rows that exist, and which steps have others; on a CPU such a row is an IndexError."""
        if self._device.type == "cpu" or images.shape[0] == 0:
            check_rows(order, images.shape[0])
            return order, None
        return readable_rows(order, images.shape[0], batch_size)


def learning_rates(lrs: Sequence[float], factors: Sequence[float] | None, steps: int) -> Tensor:
    """float64 on the host: ``lrs`` times each factor, [steps] for one of them, else [steps, len(lrs)]."""
    if len(lrs) > 1:
        every = torch.tensor(lrs, dtype=torch.float64, device="cpu")
        return learning_rates([1.0], factors, steps)[:, None] * every
    (lr,) = lrs
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


class MemberBatches(Batches):
    """``Batches`` for the members of an ensemble: each of X and Y is the same for all, or has the members first."""

    members: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._is_plain:
            self._no_class = None

    def _taken(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """X [B, K] or [E, B, K], and Y [B, ...] or [E, B, ...]; as ``Batches``."""
        check_tensor(x, "the input")
        check_tensor(y, "the target")
        of_classes = self._takes_classes and not (self._takes_probabilities and y.is_floating_point())
        e, dims = self.members, 1 if of_classes else 2
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != e):
            raise RuntimeError(
                f"expected an input of shape [batch, {self._features}], the same for all members, or [{e}, batch, "
                f"{self._features}], got {list(x.shape)}; flatten images with x.flatten(1)"
            )
        if y.dim() not in (dims, dims + 1) or (y.dim() > dims and y.shape[0] != e):
            shape = "batch" if dims == 1 else f"batch, {self._classes}"
            raise RuntimeError(
                f"expected targets of shape [{shape}], the same for all members, or [{e}, {shape}], got {list(y.shape)}"
            )
        rows = y.shape[-dims]
        if x.shape[-2] != rows:
            raise ValueError(
                f"expected as many targets as inputs, got inputs {list(x.shape)} and targets {list(y.shape)}"
            )
        # All else is checked as for an MLP: the batches of all members have one dtype and device.
        first = x if x.dim() == 2 else x[0], y if y.dim() == dims else y[0]
        _, converted = super()._taken(*first)
        x, y = in_memory(x), in_memory(y)
        return x, y if y.dtype == converted.dtype else y.to(converted.dtype)

    def checked_weight(self, weight: Tensor, rows: int) -> Tensor:
        """Sample weights [rows], the same for all members, or [E, rows]."""
        check_tensor(weight, "sample_weight")
        if weight.dim() != 2:
            return super().checked_weight(weight, rows)
        if weight.shape[0] != self.members:
            raise RuntimeError(
                f"expected sample_weight of shape [{rows}], or [{self.members}, {rows}] for {self.members} members, "
                f"got {list(weight.shape)}"
            )
        for of_member in weight.unbind():
            super().checked_weight(of_member, rows)
        return in_memory(weight)

    def check_weighed(self, weight: Tensor, order: Tensor, batch_size: int) -> None:
        """On a CPU, ValueError for a batch of a member whose sample weights are all 0."""
        if weight.dim() == order.dim() == 1:
            super().check_weighed(weight, order, batch_size)
        elif self._device.type == "cpu":
            for of_member, own in zip(
                weight.expand(self.members, -1).unbind(), order.expand(self.members, -1).unbind(), strict=True
            ):
                super().check_weighed(of_member, own, batch_size)

    def checked_order(self, order: Tensor | None, images: Tensor) -> Tensor:
        """``order`` [n] or [E, n], or all rows of the images in order."""
        rows = images[0] if images.dim() == 3 else images
        if order is None or not isinstance(order, Tensor) or order.dim() != 2 or order.dtype != torch.int64:
            return super().checked_order(order, rows)
        if order.shape[0] != self.members:
            raise RuntimeError(
                f"expected order to be int64 [n], or [{self.members}, n] for {self.members} members, got "
                f"{list(order.shape)}"
            )
        check_readable(order, "order", self._like)
        check_same_device((("the images", images), ("order", order)))
        return in_memory(order)

    def readable(self, order: Tensor, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """``order`` with rows that exist, and bool [steps] or [steps, E], which have others."""
        rows = images[0] if images.dim() == 3 else images
        if order.dim() == 1:
            order, outside = super().readable(order, rows, batch_size)
            return order, None if outside is None else outside.unsqueeze(1)
        if self._device.type == "cpu" or rows.shape[0] == 0:
            return super().readable(order, rows, batch_size)
        own = [readable_rows(of_member, rows.shape[0], batch_size) for of_member in order.unbind()]
        return torch.stack([rows for rows, _ in own]), torch.stack([outside for _, outside in own], 1)


def member_learning_rates(lr: float, factors: object, steps: int, members: int) -> Tensor:
    """float64 [steps, E] on the host: ``lr``, a number or one per member, times each factor, [steps] or [steps, E]."""
    rates = torch.tensor(lr, dtype=torch.float64, device="cpu")
    if factors is None:
        return rates.expand(steps, members)
    try:
        tensor = torch.as_tensor(factors, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected lr_factors to be {steps} numbers, one for each step, or {steps} times {members}, got {factors!r}"
        ) from error
    if tensor.shape not in ((steps,), (steps, members)):
        raise ValueError(
            f"expected lr_factors of shape [{steps}], one for each step, or [{steps}, {members}], got "
            f"{list(tensor.shape)}"
        )
    good = tensor.isfinite() & (tensor >= 0)
    if not good.all():
        bad = good.logical_not().nonzero()[0].tolist()
        raise ValueError(f"expected finite lr_factors of at least 0, got {tensor[tuple(bad)].item()} for step {bad[0]}")
    return (tensor if tensor.dim() == 2 else tensor.unsqueeze(1)) * rates.expand(members)
