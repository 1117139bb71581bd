"""Training and evaluation of a classifier on data that lives on the device.

The data set is two tensors on the model's device, images as uint8, and is never copied as a whole. An epoch is a
permutation of the row numbers from a seeded generator, and each step gathers its rows. The loss accumulates on the
device. The host reads the loss every `CHECK_EVERY` steps and then finds a loss that is not finite.

An engine of `fastmlp.train.engines` runs a stretch of steps, and `fit` does everything else.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.arguments import check_classes
from ..base.names import unknown
from ..losses import cross_entropy
from .engines import ENGINES, Engine, check_hyperparameters, engine_for
from .schedules import Schedule, lr_factor

CHECK_EVERY = 100
"""Steps between two readings of the loss by the host, each of which waits for the device."""

EXPLODED = 100
"""How many times the loss of a guess, or of the starting parameters, a loss may be at the end of an epoch."""

_GUESS_ROWS = 2048


class LabeledImages(Protocol):
    """What `fit` and `evaluate` need of a data set, such as a `fastmlp.data.ImageDataset`."""

    @property
    def images(self) -> Tensor:
        """[N, features], uint8 pixels or the model's floating-point dtype."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the device of the images."""


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    Attributes:
        epoch: 1 for the first.
        train_loss: mean over the epoch's rows, each at the parameters of its step.
        test_loss: mean cross-entropy on the test data after the epoch; None without test data.
        test_accuracy: share of the test data classified rightly after the epoch, 0 to 1; None without test data.
        seconds: time of the training steps, without evaluation.
        images_per_second: training rows per second of this time.
    """

    epoch: int
    train_loss: float
    test_loss: float | None
    test_accuracy: float | None
    seconds: float
    images_per_second: float


@dataclass
class History:
    """The results of a run, epoch by epoch; ``seconds`` and ``images_per_second`` count training steps only."""

    epochs: list[EpochResult] = field(default_factory=list)

    @property
    def last(self) -> EpochResult:
        """The latest epoch's result; IndexError before the first."""
        return self.epochs[-1]

    @property
    def seconds(self) -> float:
        """Time of all training steps."""
        return sum(result.seconds for result in self.epochs)

    @property
    def images_per_second(self) -> float:
        """Training rows of all epochs per second of training."""
        return sum(result.images_per_second * result.seconds for result in self.epochs) / self.seconds

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dict per epoch with the fields of `EpochResult`, ready for JSON."""
        return [dataclasses.asdict(result) for result in self.epochs]


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``step`` of ``steps`` in ``epoch`` of ``epochs`` (all from 1), and the latest mean loss."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float


class DivergenceError(RuntimeError):
    """The loss or a parameter became NaN or infinite, or the loss exploded.

    A loss has exploded if it is more than `EXPLODED` times the loss of a guess (log C for C classes) and that of the
    starting parameters, at the end of an epoch, on the training data and on the test data. Saturated units keep such a
    loss finite.

    The model has the parameters of the end of the last good epoch, or of the start if there is none.

    Attributes:
        epoch: the epoch of the error, 1 for the first.
        steps: (first, last) step of the epoch, from 1, between which the error happened.
        history: the good epochs before.
    """

    def __init__(self, message: str, epoch: int, steps: tuple[int, int], history: History) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.steps = steps
        self.history = history


def fit(
    model: nn.Module,
    train: LabeledImages,
    test: LabeledImages | None = None,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: str = "sgd",
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    schedule: str | Schedule = "linear",
    warmup: float = 0.05,
    seed: int = 0,
    engine: str | Engine = "auto",
    on_epoch: Callable[[EpochResult], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> History:
    """Train ``model`` in place with softmax cross-entropy; evaluate it after every epoch.

    The same seed, model and data give the same run. The order of the rows comes from a generator of the CPU that only
    `fit` uses, so the order is the same on every device, and global random state is not touched.

    Args:
        model: maps images [B, features] to logits [B, classes]; on the device of the data.
        train: training data, at least one row; the last batch of an epoch may be smaller.
        test: data to evaluate on after each epoch; default: no evaluation.
        epochs: at least 1.
        batch_size: rows per step, at least 1.
        optimizer: "sgd".
        lr: base learning rate, above 0.
        momentum: in [0, 1).
        weight_decay: at least 0.
        nesterov: Nesterov's momentum; without effect when momentum is 0.
        schedule: "constant", "linear", "cosine", or a function; see `fastmlp.train.schedules`.
        warmup: share of all steps to warm up in, [0, 1); "constant" has no warm-up.
        seed: of the order of the rows.
        engine: what runs the steps: "step" (`fastmlp.TrainStep`, for MLPs), "autograd", "auto" ("step" for a
            fastmlp.MLP, "autograd" for any other module), or a ready `fastmlp.train.engines.Engine`. A ready engine has
            its own optimizer, so the arguments about the optimizer have no effect.
        on_epoch: called with the result after each epoch, when the model has the parameters of this epoch.
        on_progress: called every `CHECK_EVERY` steps and at the end of each epoch.

    Raises:
        ValueError: an argument outside its range, an unknown name, or no training data.
        RuntimeError: images and model do not fit, or are on two devices.
        IndexError: a label outside [0, classes).
        TypeError: engine "step" for a model that is not an MLP.
        DivergenceError: the loss or a parameter became NaN or infinite, or the loss exploded (a RuntimeError).
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    check_hyperparameters(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=False)
    for dataset in (train,) if test is None else (train, test):
        _check_data(model, dataset)
    n = len(train.labels)
    steps = -(-n // batch_size)
    factor = lr_factor(schedule, epochs * steps, warmup)
    runner: Engine
    if isinstance(engine, str):
        engine = engine_for(model) if engine == "auto" else engine
        if engine not in ENGINES:
            raise ValueError(unknown("engine", engine, ("auto", *ENGINES)))
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        runner = ENGINES[engine](model, optimizer=optimizer, nesterov=nesterov and momentum > 0, **settings)
    else:
        runner = engine

    generator = torch.Generator().manual_seed(seed)
    history = History()
    good = _snapshot(model)
    highest_loss = EXPLODED * _loss_of_a_guess(model, train)

    def factors(epoch: int, first: int, last: int) -> list[float]:
        return [factor((epoch - 1) * steps + step) for step in range(first, last)]

    def stop(what: str, epoch: int, first: int, last: int) -> DivergenceError:
        model.load_state_dict(good)
        highest = lr * max(factors(epoch, first, last))
        where = f"at step {last}" if last == first + 1 else f"between steps {first + 1} and {last}"
        return DivergenceError(
            f"training diverged: {what} in epoch {epoch}, {where} of {steps}, at learning rates up to {highest:.4g}; "
            f"expected finite numbers. Try a learning rate of {lr / 10:.2g} or smaller",
            epoch,
            (first + 1, last),
            history,
        )

    for epoch in range(1, epochs + 1):
        order = torch.randperm(n, generator=generator, device="cpu").to(train.images.device)
        model.train()
        loss_sum = 0.0
        start = time.perf_counter()
        for first in range(0, steps, CHECK_EVERY):
            last = min(first + CHECK_EVERY, steps)
            rows = order[first * batch_size : last * batch_size]
            loss = runner.epoch(train.images, train.labels, batch_size, rows, factors(epoch, first, last)).item()
            if not math.isfinite(loss):
                raise stop(f"the loss became {loss}", epoch, *_first_bad_step(runner, first, last))
            loss_sum += loss * len(rows)
            if on_progress is not None:
                on_progress(Progress(epoch, epochs, last, steps, loss))
        # No loss shows the update of the last step yet.
        if not _all_finite(model):
            raise stop("a parameter became NaN or infinite", epoch, first, last)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = (None, None) if test is None else evaluate(model, test)
        if test_loss is not None and not math.isfinite(test_loss):
            raise stop(f"the loss on the test data became {test_loss}", epoch, first, last)
        if min(loss, loss if test_loss is None else test_loss) > highest_loss:
            raise stop(f"the loss became {loss:.3g}, {EXPLODED} times that of a guess or more", epoch, first, last)
        history.epochs.append(EpochResult(epoch, loss_sum / n, test_loss, test_accuracy, seconds, n / seconds))
        good = _snapshot(model)
        if on_epoch is not None:
            on_epoch(history.last)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, dataset: LabeledImages, batch_size: int = 2048) -> tuple[float, float]:
    """(mean cross-entropy, accuracy 0 to 1) of ``model`` on ``dataset``, without autograd, in evaluation mode.

    Raises:
        ValueError: an empty data set, or a batch size below 1.
        RuntimeError: images and model do not fit, or are on two devices.
        IndexError: a label outside [0, classes).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_data(model, dataset)
    images, labels = dataset.images, dataset.labels
    loss = torch.zeros((), dtype=torch.float32, device=images.device)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    with _evaluation_mode(model):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(x)
            loss += cross_entropy(logits.float(), y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
    return loss.item() / len(labels), correct.item() / len(labels)


@torch.no_grad()
def _check_data(model: nn.Module, dataset: LabeledImages) -> None:
    """Check once what no step checks, since a check of labels on a GPU makes the host wait."""
    images, labels = dataset.images, dataset.labels
    if len(labels) == 0 or len(images) != len(labels):
        raise ValueError(f"expected as many images as labels and at least one, got {len(images)} and {len(labels)}")
    device = next((p.device for p in model.parameters()), images.device)
    if images.device != device:
        raise RuntimeError(
            f"expected data and model on the same device, got data on {images.device} and the model on {device}; "
            f"move the data with .to({str(device)!r})"
        )
    with _evaluation_mode(model):
        classes = model(images[:1]).shape[1]
    message = "labels must be from 0 to {last} for a model of {classes} classes, got {low} to {high}"
    check_classes(labels, classes, message)


def _loss_of_a_guess(model: nn.Module, dataset: LabeledImages) -> float:
    """The loss of equal probabilities for all classes, or that of ``model``, whichever is larger."""
    images, labels = dataset.images[:_GUESS_ROWS], dataset.labels[:_GUESS_ROWS]
    with torch.no_grad(), _evaluation_mode(model):
        logits = model(images).float()
        return max(math.log(logits.shape[1]), cross_entropy(logits, labels).item())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _first_bad_step(engine: Engine, first: int, last: int) -> tuple[int, int]:
    """(step, step + 1) of the first loss in the stretch that is not finite; the stretch if no loss was kept."""
    losses = getattr(engine, "step_losses", None)
    bad = [] if losses is None else losses.isfinite().logical_not().nonzero().flatten().tolist()
    return (first + bad[0], first + bad[0] + 1) if bad else (first, last)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _all_finite(model: nn.Module) -> bool:
    flags = [p.detach().isfinite().all() for p in model.parameters()]
    return not flags or bool(torch.stack(flags).all().item())
