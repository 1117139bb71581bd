"""What a training run reports: results by epoch, progress, and the error of a run that diverges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

EXPLODED = 100
"""How many times the loss of a guess, or of the starting parameters, a loss may be at the end of an epoch."""


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    Attributes:
        epoch: 1 for the first.
        train_loss: mean over the epoch's rows, each at the parameters of its step.
        test_loss: mean loss on the test data after the epoch; None without test data. With validation data, only the
            best epoch has results on the test data, from the end of the run.
        test_accuracy: share of the test data classified rightly after the epoch, 0 to 1; None for losses of values.
        seconds: time of the training steps, without evaluation.
        images_per_second: training rows per second of this time.
        test_r2: of losses of values, the explained share of the targets' variance; None for losses of classes.
        validation_loss, validation_accuracy, validation_r2: the same of the validation data, after every epoch.
    """

    epoch: int
    train_loss: float
    test_loss: float | None
    test_accuracy: float | None
    seconds: float
    images_per_second: float
    test_r2: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_r2: float | None = None


@dataclass
class History:
    """The results of a run, epoch by epoch; ``seconds`` and ``images_per_second`` count training steps only.

    Attributes:
        epochs: the results, in order.
        loss: what the losses are, a name as `fit` takes.
    """

    epochs: list[EpochResult] = field(default_factory=list)
    loss: str = "cross_entropy"

    @property
    def last(self) -> EpochResult:
        """The latest epoch's result; IndexError before the first."""
        return self.epochs[-1]

    @property
    def best(self) -> EpochResult:
        """The epoch of the least validation loss, the first of equals; without validation data, the latest epoch."""
        judged = [result for result in self.epochs if result.validation_loss is not None]
        return min(judged, key=lambda result: result.validation_loss or 0.0) if judged else self.last

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
