"""What `fit` takes as data, the losses that it knows, and the evaluation of a model.

A loss of classes (``base/losses.py``) is judged by the accuracy, the share of rows whose largest output is their class.
"bce" is judged by the share of the outputs on the right side of 1/2, where all targets are 0 or 1. The other losses of
values are judged by R2 = 1 - sum (a - y)^2 / sum (y - mean y)^2, over all outputs, each with its own mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import functional
from ..base.arguments import check_classes, check_tensor
from ..base.losses import LOSSES, STEP_LOSSES, Loss
from ..base.names import unknown
from ..nn import MLPEnsemble


class LabeledImages(Protocol):
    """A data set with images and labels, such as a `fastmlp.data.ImageDataset`."""

    @property
    def images(self) -> Tensor:
        """[N, features], uint8 pixels or the model's floating-point dtype."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the device of the images."""


class Rows(Protocol):
    """A data set with inputs and targets, such as a `fastmlp.data.Table`."""

    @property
    def x(self) -> Tensor:
        """[N, features] or [N, ...], uint8 pixels or the model's floating-point dtype."""

    @property
    def y(self) -> Tensor:
        """int64 [N] class numbers, or floating-point values [N, outputs] or [N]."""


Samples = LabeledImages | Rows | tuple[Tensor, Tensor]


def record(loss: str) -> Loss:
    """The record of a loss; ValueError for an unknown name."""
    if loss not in STEP_LOSSES:
        raise ValueError(unknown("loss", loss, STEP_LOSSES))
    return LOSSES[STEP_LOSSES[loss]]


def takes_values(loss: str) -> bool:
    """Whether the targets of a loss are values, not classes."""
    return record(loss).target == "values"


def loss_function(loss: str) -> Callable[..., Tensor]:
    """The function (outputs, targets, reduction="mean") of a loss."""
    function: Callable[..., Tensor] = getattr(functional, record(loss).function)
    return function


def metric_of(loss: str) -> str:
    """What a model with this loss is judged by beside the loss: "accuracy" or "r2"."""
    about = record(loss)
    return "r2" if about.target == about.input == "values" else "accuracy"


def tensors(data: Samples) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of data: a pair of tensors, or a data set with images and labels, x and y, or tensors."""
    pair: Any = data
    for names in (("images", "labels"), ("x", "y")):
        if all(hasattr(data, name) for name in names):
            pair = tuple(getattr(data, name) for name in names)
            break
    else:
        pair = getattr(data, "tensors", data)  # of a torch.utils.data.TensorDataset
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair):
        return pair[0], pair[1]
    raise TypeError(
        f"expected data as a pair of tensors (x, y), or as a data set with images and labels or x and y, got "
        f"{type(data).__name__}; convert arrays with torch.as_tensor"
    )


@torch.no_grad()
def checked(
    model: nn.Module, data: Samples, loss: str = "cross_entropy", ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """(x, y) of data that fit the model and the loss: class numbers as int64, values as [N, outputs].

    A class number may also be ``ignore_index``, but not all of them may. The check is made once, here: steps do not
    repeat it, since a check of labels on a GPU makes the host wait.
    """
    if isinstance(model, MLPEnsemble):
        raise TypeError(
            f"expected one model, got an MLPEnsemble of {model.members}; look at each of ensemble.unstack(), or train "
            "all with fastmlp.TrainStep(ensemble)"
        )
    x, y = (tensor.detach() for tensor in tensors(data))  # the data may be on a tape, which is not trained
    if x.dim() < 2:
        raise ValueError(f"expected inputs [N, features] or [N, ...], got {list(x.shape)}")
    if y.dim() == 0 or len(y) == 0 or len(x) != len(y):
        got = f"{len(x)} and {len(y) if y.dim() else 'a single number'}"
        raise ValueError(f"expected as many images as labels and at least one, got {got}")
    device = next((p.device for p in model.parameters()), x.device)
    for tensor in (x, y):
        if tensor.device != device:
            raise RuntimeError(
                f"expected data and model on the same device, got data on {tensor.device} and the model on {device}; "
                f"move the data with .to({str(device)!r})"
            )
    about = record(loss)
    with evaluation_mode(model):
        outputs = model(x[:1]).shape[1]
    if takes_values(loss):
        return x, _checked_values(y, outputs, loss, probabilities=about.input == "logits")
    return x, _checked_classes(y, outputs, loss, ignore_index)


def _checked_classes(y: Tensor, outputs: int, loss: str, ignore_index: int | None) -> Tensor:
    if y.dtype not in (torch.int64, torch.uint8) or y.dim() != 1:
        values = "; for values, take a loss of values, such as mse" if y.is_floating_point() else ""
        raise RuntimeError(
            f"expected labels for {loss} as class numbers int64 [{len(y)}], got {y.dtype} {list(y.shape)}{values}"
        )
    message = "labels must be from 0 to {last} for a model of {classes} classes, got {low} to {high}"
    check_classes(y, outputs, message, ignore_index=ignore_index)
    if ignore_index is not None and bool((y == ignore_index).all()):
        raise ValueError(f"every label is {ignore_index}, which is ignored, so no row counts; give rows with classes")
    return y.long()


def _checked_values(y: Tensor, outputs: int, loss: str, *, probabilities: bool) -> Tensor:
    shape = list(y.shape)
    y = y.unsqueeze(1) if y.dim() == 1 else y
    if not y.is_floating_point():
        raise RuntimeError(f"expected floating-point targets for {loss}, got {y.dtype}; convert them with .float()")
    if y.shape != (len(y), outputs):
        raise ValueError(
            f"expected targets [{len(y)}, {outputs}] for {loss} and a model of {outputs} outputs, got {shape}"
        )
    if probabilities and not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError(f"expected targets from 0 to 1 for {loss}, got {y.min().item():g} to {y.max().item():g}")
    return y


@overload
def evaluate(
    model: nn.Module,
    dataset: Samples,
    batch_size: int = ...,
    *,
    parameters: Mapping[str, Tensor] | None = ...,
    ignore_index: int | None = ...,
) -> tuple[float, float]: ...


@overload
def evaluate(
    model: nn.Module,
    dataset: Samples,
    batch_size: int = ...,
    *,
    loss: str,
    parameters: Mapping[str, Tensor] | None = ...,
    ignore_index: int | None = ...,
) -> tuple[float, float | None]: ...


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Samples,
    batch_size: int = 2048,
    *,
    loss: str = "cross_entropy",
    parameters: Mapping[str, Tensor] | None = None,
    ignore_index: int | None = None,
) -> tuple[float, float | None]:
    """(mean loss, metric) of ``model`` on ``dataset``, without autograd, in evaluation mode.

    The metric is the accuracy, 0 to 1, or for the losses of values mse, l1 and huber R2. It is None where the targets
    have no variance (R2), or are not all 0 or 1 (accuracy of "bce").

    ``parameters``, by name as in a state_dict, are used in place of the model's own, and in the dtypes of the latter.
    ``parameters=step.ema_state_dict()`` evaluates the moving average that a `TrainStep` keeps.

    Rows with the label ``ignore_index``, of a loss of classes, count neither for the loss nor for the accuracy.

    Raises:
        TypeError: ``dataset`` is no pair of tensors and no data set, ``model`` is an ensemble, or ``parameters`` are no
            dict of tensors.
        ValueError: an empty data set, a batch size below 1, an unknown loss, targets of another shape, or labels that
            are all ignored.
        RuntimeError: inputs or parameters do not fit the model, or are on another device.
        IndexError: a label outside [0, classes).
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    inputs, targets = checked(model, dataset, loss, ignore_index)
    forward: Callable[[Tensor], Tensor] = model
    if parameters is not None:
        own = model.state_dict()
        _check_names(own, parameters)
        cast = {name: tensor.to(own[name].dtype) for name, tensor in parameters.items()}
        forward = functools.partial(functional_call, model, cast)
    with evaluation_mode(model):
        if takes_values(loss):
            return _evaluate_values(forward, inputs, targets, batch_size, loss)
        return _evaluate_classes(forward, inputs, targets, batch_size, loss, ignore_index)


def _check_names(own: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if not isinstance(parameters, Mapping):
        raise TypeError(f"expected parameters as a dict of tensors by name, got {type(parameters).__name__}")
    for name, tensor in parameters.items():
        check_tensor(tensor, f"the parameter {name!r}")
        if name not in own or own[name].shape != tensor.shape:
            expected = f"{list(own[name].shape)}" if name in own else f"one of {', '.join(own)}"
            raise RuntimeError(
                f"the parameter {name!r} {list(tensor.shape)} does not fit the model; expected {expected}"
            )


def _evaluate_classes(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    batch_size: int,
    loss: str,
    ignore_index: int | None,
) -> tuple[float, float]:
    function = with_ignored(loss, ignore_index)
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    correct = torch.zeros((), dtype=torch.int64, device=inputs.device)
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = _widened(model(x))
        total += function(logits, y, reduction="sum")
        right = logits.argmax(1) == y
        correct += (right if ignore_index is None else right & (y != ignore_index)).sum()
    count = len(targets) if ignore_index is None else int((targets != ignore_index).sum())
    return total.item() / count, correct.item() / count


def _widened(outputs: Tensor) -> Tensor:
    """Outputs of 16 bits in float32, others as they are."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def with_ignored(loss: str, ignore_index: int | None) -> Callable[..., Tensor]:
    """The function of a loss, which leaves out the rows of an ignored label."""
    function = loss_function(loss)
    return function if ignore_index is None else functools.partial(function, ignore_index=ignore_index)


def _evaluate_values(
    model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, batch_size: int, loss: str
) -> tuple[float, float | None]:
    function = loss_function(loss)
    total, residual, variance, correct = torch.zeros(4, dtype=torch.float64, device=inputs.device).unbind()
    mean = targets.mean(0, dtype=torch.float64)
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        a, wide = model(x).double(), y.double()
        total += function(a, wide, reduction="sum")
        residual += (a - wide).square().sum()
        variance += (wide - mean).square().sum()
        correct += ((a > 0) == (wide > 0.5)).sum()
    mean_loss = total.item() / targets.numel()
    if metric_of(loss) == "accuracy":
        decided = bool(((targets == 0) | (targets == 1)).all())
        return mean_loss, correct.item() / targets.numel() if decided else None
    return mean_loss, 1 - residual.item() / variance.item() if variance.item() > 0 else None


@torch.no_grad()
def loss_of_a_guess(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: str, ignore_index: int | None = None
) -> float:
    """The loss of a guess that ignores the inputs, or that of ``model``, whichever is larger.

    The guess is equal probabilities for all classes, or the mean of the values.
    """
    function = with_ignored(loss, ignore_index)
    if ignore_index is not None:
        counts = targets != ignore_index
        inputs, targets = inputs[counts], targets[counts]
    with evaluation_mode(model):
        outputs = model(inputs).float()
    guess = torch.zeros_like(outputs)
    if takes_values(loss):
        targets = targets.float()
        if record(loss).input == "values":
            guess += targets.mean(0)
    return max(function(guess, targets).item(), function(outputs, targets).item())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
