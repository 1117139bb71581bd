"""What a trained model gets wrong: the confusion matrix, and the mistakes of which it is most sure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError
from .scores import Samples, checked, evaluation_mode, takes_values
from .tensor_file import read_tensors, write_tensors

FORMAT = "fastmlp evaluation"
#: Mistakes that are kept.
MOST = 30


@dataclass
class Judged:
    """The classes that a model finds in some data.

    Attributes:
        split: which data: "test" or "validation".
        confusion: int64 [C, C]: rows of class i that the model takes for class j.
        inputs: [k, features] of the worst mistakes, the worst first: those that give their own class the least
            probability.
        labels, predicted: int64 [k], their own classes and those that the model takes them for.
        probability: float32 [k], what the model gives to the latter.
    """

    split: str
    confusion: Tensor
    inputs: Tensor
    labels: Tensor
    predicted: Tensor
    probability: Tensor


@torch.no_grad()
def judge(
    model: nn.Module,
    data: Samples,
    split: str,
    loss: str,
    batch_size: int = 2048,
    *,
    ignore_index: int | None = None,
) -> Judged | None:
    """Look at the model's classes of the data; None for a loss of values. Errors as `fastmlp.train.evaluate`."""
    if takes_values(loss):
        return None
    x, y = checked(model, data, loss, ignore_index)
    if ignore_index is not None:
        x, y = x[y != ignore_index], y[y != ignore_index]
    with evaluation_mode(model):
        outputs = torch.cat([model(rows).float() for rows in x.split(batch_size)])
    classes, predicted = outputs.shape[1], outputs.argmax(1)
    confusion = torch.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes)
    wrong = (predicted != y).nonzero().flatten()
    logs = outputs[wrong].log_softmax(1)
    # A stable sort, so that the order of equals is the same on every device.
    worst = logs.gather(1, y[wrong, None]).flatten().sort(stable=True).indices[:MOST]
    rows = wrong[worst]
    probability = logs[worst].gather(1, predicted[rows, None]).flatten().exp()
    return Judged(split, confusion, x[rows].flatten(1), y[rows], predicted[rows], probability)


def save_judged(path: Path, judged: Judged) -> None:
    """Write it to one file, which is replaced as a whole; OSError if it cannot be written."""
    tensors = {name: value for name, value in vars(judged).items() if isinstance(value, Tensor)}
    write_tensors(path, tensors, {"format": FORMAT, "split": judged.split})


def load_judged(path: Path) -> Judged:
    """What `save_judged` wrote; FileNotFoundError, OSError or CheckpointError (a damaged file)."""
    tensors, about = read_tensors(path, FORMAT)
    try:
        return Judged(about["split"], **tensors)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
