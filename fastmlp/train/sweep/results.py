"""What a sweep found: the file of each group, the ranking of the settings, and the rows of the tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoint import CheckpointError
from ..scores import metric_of, takes_values
from ..tensor_file import read_tensors, write_tensors
from .group import Result
from .plan import SETTINGS, Member

FORMAT = "fastmlp sweep group"


@dataclass(frozen=True)
class Standing:
    """A setting's place: the scores of its members, which differ in seed and fold, without those that diverged.

    Attributes:
        setting: by the names of ``plan.SETTINGS``.
        members: how many there are, with those that diverged.
        diverged: how many diverged.
        mean, deviation: of the scores; the deviation is that of a sample. None without a score, or with one.
        worst, best: score.
        loss: mean validation loss.
    """

    setting: dict[str, Any]
    members: int
    diverged: int
    mean: float | None
    deviation: float | None
    worst: float | None
    best: float | None
    loss: float | None

    def as_dict(self) -> dict[str, Any]:
        """The attributes in JSON's types."""
        return dataclasses.asdict(self)


def score_name(loss: str) -> str:
    """What ranks the settings: the accuracy for a loss of classes, the loss itself for a loss of values."""
    return "validation_loss" if takes_values(loss) else "validation_accuracy"


def score_of(result: Result, loss: str) -> float | None:
    """The score of a member; None for a member that diverged."""
    if result.diverged is not None:
        return None
    return result.validation_loss if takes_values(loss) else result.validation_metric


def _order(result: Result, member: Member, loss: str) -> tuple[float, float, int]:
    """The place of a member that has a score: the better score, then the lower loss, then the lower number."""
    score, validation = score_of(result, loss), result.validation_loss
    assert score is not None
    assert validation is not None
    return (score if takes_values(loss) else -score), validation, member.number


def bests(members: Sequence[Member], results: Sequence[Result], loss: str) -> dict[tuple[Any, ...], int]:
    """By setting, the place in the list of the best member that has a score."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, (member, result) in enumerate(zip(members, results, strict=True)):
        if score_of(result, loss) is not None:
            places.setdefault(member.setting, []).append(place)
    return {
        setting: min(found, key=lambda place: _order(results[place], members[place], loss))
        for setting, found in places.items()
    }


def ranked(members: Sequence[Member], results: Sequence[Result], loss: str) -> list[Standing]:
    """The settings, best first: by the number of members that diverged, then by the mean score, then by the loss."""
    of_setting: dict[tuple[Any, ...], list[Result]] = {}
    for member, result in zip(members, results, strict=True):
        of_setting.setdefault(member.setting, []).append(result)
    sign = 1 if takes_values(loss) else -1
    standings = []
    for setting, found in of_setting.items():
        good = [result for result in found if score_of(result, loss) is not None]
        scores = [score for score in (score_of(result, loss) for result in good) if score is not None]
        losses = [result.validation_loss for result in good if result.validation_loss is not None]
        ordered = sorted(scores, key=lambda score: sign * score)
        about = dict(zip(SETTINGS, setting, strict=True))
        standings.append(
            Standing(
                {**about, "sizes": list(about["sizes"])},
                len(found),
                len(found) - len(good),
                statistics.fmean(scores) if scores else None,
                statistics.stdev(scores) if len(scores) > 1 else None,
                ordered[-1] if ordered else None,
                ordered[0] if ordered else None,
                statistics.fmean(losses) if losses else None,
            )
        )

    def order(standing: Standing) -> tuple[float, float, float]:
        if standing.mean is None or standing.loss is None:
            return math.inf, math.inf, math.inf
        return standing.diverged, sign * standing.mean, standing.loss

    return sorted(standings, key=order)


def as_row(member: Member, result: Result, loss: str) -> dict[str, Any]:
    """A member and its result, as the tables have them."""
    return {
        **member.as_dict(),
        "validation_loss": result.validation_loss,
        f"validation_{metric_of(loss)}": result.validation_metric,
        "train_loss": result.train_loss,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "diverged": result.diverged,
    }


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table with a header; sizes as 784-512-10, and nothing where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow("-".join(map(str, value)) if isinstance(value, list) else value for value in row.values())
    return text.getvalue()


def save_group(
    path: str | os.PathLike[str],
    members: Sequence[Member],
    results: Sequence[Result],
    parameters: Mapping[str, Tensor],
    loss: str,
    seconds: float,
) -> None:
    """Write what a group gave to one file, which is replaced as a whole.

    Of the parameters [E, ...], the file has those of each setting's best member, since no other member can be the best
    of the sweep.

    Raises:
        OSError: the file cannot be written; there is no file then, or the one before.
    """
    places = bests(members, results, loss).values()
    tensors = {
        f"{members[place].number}.{name}": value[place] for name, value in parameters.items() for place in places
    }
    about = {
        "members": [member.as_dict() for member in members],
        "results": [dataclasses.asdict(result) for result in results],
        "seconds": seconds,
    }
    write_tensors(path, tensors, {"format": FORMAT, "group": json.dumps(about)})


def load_group(
    path: str | os.PathLike[str], members: Sequence[Member]
) -> tuple[list[Result], dict[int, dict[str, Tensor]], float]:
    """(results, parameters by number of the member, seconds) of a group of these members.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        CheckpointError: the file is damaged, or of other members (a RuntimeError).
    """
    tensors, about = read_tensors(path, FORMAT)
    try:
        group = json.loads(about["group"])
        theirs, results = group["members"], [Result(**result) for result in group["results"]]
        seconds = float(group["seconds"])
        parameters: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            parameters.setdefault(int(number), {})[rest] = tensor
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged: {type(error).__name__}: {error}") from error
    theirs = [{"dropout": 0.0, **member} for member in theirs]  # a sweep of an older fastmlp had none
    if theirs != [member.as_dict() for member in members] or len(results) != len(members):
        raise CheckpointError(f"{os.fspath(path)} has members of another sweep")
    return results, parameters, seconds
