"""The state of a run: what `fit` needs to go on as if the run had not stopped, and its file.

The file (`tensor_file.py`) has everything: the model, the optimizer, the best parameters so far, the place in the order
of the rows, and the history. One file changes as a whole, so the parts of a state always belong together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError
from .results import EpochResult, History
from .tensor_file import read_tensors, write_tensors

FORMAT = "fastmlp run state"
FORMAT_VERSION = 1

#: Settings that a resumed run may have larger than the run.
EXTENDED = ("epochs", "patience")
#: Attributes of a state that are in the header of its file.
_TEXTS = ("settings", "highest_loss", "step", "loss_sum", "seconds", "choices", "extra")
#: Rows of the data that `fingerprint` reads.
_ROWS = 4096


@dataclass
class RunState:
    """What `fit` gives to ``checkpoint`` and takes as ``resume``. The tensors may be those that the run works on.

    Attributes:
        model: the model's state_dict.
        engine: the engine's state, such as ``TrainStep.state_dict()``.
        order: state of the generator of the order, before the first unfinished epoch.
        history: the finished epochs.
        settings: the arguments of `fit` that make the run what it is, and the fingerprint of the data.
        highest_loss: the loss that counts as exploded.
        best: parameters of the best epoch where they are not the model's: with validation data, or with an average.
        step: steps of the unfinished epoch that are done; 0 between epochs.
        loss_sum, seconds: the sum of the losses of these steps' rows, and the time that they took.
        choices: what `fastmlp.cpu` chose by measuring, which is a part of the result.
        extra: what the caller keeps beside the state, in JSON's types.
    """

    model: dict[str, Tensor]
    engine: dict[str, Tensor]
    order: Tensor
    history: History
    settings: dict[str, Any]
    highest_loss: float
    best: dict[str, Tensor] | None = None
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    choices: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history.epochs)

    def check(self, settings: Mapping[str, Any], model: nn.Module) -> None:
        """ValueError unless a run with these settings and this model can go on from here."""
        before_all = _plain(self.settings)
        for name, value in _plain(settings).items():
            before = before_all.get(name)
            if name != "model" and not extends(name, value, before) and value != before:
                raise ValueError(_different(name, value, before))
        own = {name: (list(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
        theirs = {name: (list(tensor.shape), tensor.dtype) for name, tensor in self.model.items()}
        for name in (*own, *theirs):
            if own.get(name) != theirs.get(name):
                have, had = (f"{of[name][0]} {of[name][1]}" if name in of else "nothing" for of in (own, theirs))
                raise ValueError(f"the run to resume is of another model: {name} is {have}, and was {had}")
        now, was = settings.get("model"), before_all.get("model")
        if now != was:
            raise ValueError(f"the run to resume is of another model: it is {now}, and was {was}")


def extends(name: str, value: object, before: object) -> bool:
    """Whether a setting is at least that of the run, and so extends it. None is no limit."""
    if name not in EXTENDED or before is None or value is None:
        return name in EXTENDED and value is None
    return isinstance(value, int) and isinstance(before, int) and value >= before


def _different(name: str, value: object, before: object) -> str:
    if name in ("data", "validation") and value is not None and before is not None:
        kind = "training" if name == "data" else name
        return f"the {kind} data are not those of the run to resume: other rows, or rows in another order"
    if name == "validation":
        return f"the run to resume was given validation data: {before is not None}, and now: {value is not None}"
    if name in EXTENDED and before is not None:
        return f"{name}={value} is less than the {before} of the run to resume"
    return f"{name}={value!r} differs from the {before!r} of the run to resume"


def fingerprint(x: Tensor, y: Tensor) -> str:
    """A text, from 4,096 rows and all y, that other data or the same rows in another order hardly ever have."""
    rows = torch.arange(0, len(x), -(-len(x) // _ROWS), device=x.device)
    crc = 0
    for tensor in (x[rows], y):
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc) if flat.numel() else crc
    return f"{list(x.shape)} {x.dtype}, {list(y.shape)} {y.dtype}, {crc:08x}"


def save_state(path: str | os.PathLike[str], state: RunState) -> None:
    """Write the state to one file, which is replaced as a whole.

    Raises:
        OSError: the file cannot be written; it is then the old one or the whole new one.
    """
    names = [f.name for f in dataclasses.fields(EpochResult)]
    rows = [
        [math.nan if value is None else value for value in vars(result).values()] for result in state.history.epochs
    ]
    tensors = {
        "order": state.order,
        "history": torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, len(names)),
    }
    for part in ("model", "engine", "best"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in (getattr(state, part) or {}).items()}
    rest = {name: getattr(state, name) for name in _TEXTS} | {"settings": _plain(state.settings)}
    rest |= {"history": names, "loss": state.history.loss}
    write_tensors(path, tensors, {"format": FORMAT, "format_version": str(FORMAT_VERSION), "state": json.dumps(rest)})


def load_state(path: str | os.PathLike[str]) -> RunState:
    """The state that `save_state` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read, or is no regular file.
        CheckpointError: the file is damaged, or of a newer format (a RuntimeError).
    """
    tensors, about = read_tensors(path, FORMAT)
    if about.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{os.fspath(path)} has format version {about.get('format_version')}, this fastmlp reads {FORMAT_VERSION}; "
            "if a newer fastmlp wrote it, upgrade"
        )
    try:
        rest = json.loads(about["state"])
        names, loss = rest.pop("history"), rest.pop("loss")
        results = [_result(dict(zip(names, row, strict=True))) for row in tensors["history"].tolist()]
        rest |= {part: _part(tensors, part) for part in ("model", "engine", "best")}
        state = RunState(order=tensors["order"], history=History(results, loss), **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged: {type(error).__name__}: {error}") from error
    state.best = state.best or None
    return state


def _result(values: dict[str, float]) -> EpochResult:
    """The result of an epoch from numbers, of which NaN stands for None."""
    found: dict[str, Any] = {name: None if math.isnan(value) else value for name, value in values.items()}
    return EpochResult(**{**found, "epoch": int(found["epoch"])})


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: a tuple is a list, and what JSON does not have is a text."""

    def told(value: object) -> object:
        return value.tolist() if isinstance(value, Tensor) else repr(value)

    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=told))
    return plain
