"""The members of a sweep, the rows that each trains on, and the groups that are trained together."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...step.optimizers import Optimizer
from ..engines import usual_rule
from ..loop import CHECK_EVERY
from ..split import fold as divided_by_fold
from ..split import held_out

#: The axes of a sweep, in the order of the members: the first one changes slowest.
AXES = ("sizes", "activation", "lr", "momentum", "weight_decay", "dropout", "seed", "fold")
#: The axes that are settings; the other ones repeat a setting.
SETTINGS = AXES[:6]
#: Most members of a group that nobody gave a size for, so that an interrupted sweep does not lose everything.
MOST_MEMBERS = 1024
#: Rows of all members of a group that are evaluated together, and rows of one member at least and at most.
EVALUATED, FEWEST, MOST_ROWS = 1 << 15, 64, 2048


@dataclass(frozen=True)
class Member:
    """One network of a sweep.

    Attributes:
        number: its place in the sweep, from 0.
        sizes, activation: of the MLP.
        lr, momentum, weight_decay: of its optimizer; momentum is None for an optimizer that has none.
        dropout: of its hidden layers.
        seed: of its starting weights, its order of the rows, and its division of the rows.
        fold: its part of the rows that validates it, from 0; None without folds.
    """

    number: int
    sizes: tuple[int, ...]
    activation: str
    lr: float
    momentum: float | None
    weight_decay: float
    dropout: float
    seed: int
    fold: int | None

    @property
    def setting(self) -> tuple[Any, ...]:
        """What members that differ in seed and fold only have in common."""
        return tuple(getattr(self, name) for name in SETTINGS)

    @property
    def division(self) -> tuple[int, int | None]:
        """What its training rows depend on."""
        return self.seed, self.fold

    def as_dict(self) -> dict[str, Any]:
        """The attributes in JSON's types."""
        return {"number": self.number, **{name: getattr(self, name) for name in AXES}, "sizes": list(self.sizes)}


def members_of(axes: Mapping[str, Sequence[Any]], lr_of: Callable[[tuple[int, ...], str], float]) -> list[Member]:
    """The product of the axes, in their order. An empty ``axes["lr"]`` means the rate ``lr_of(sizes, activation)``."""
    found: list[Member] = []
    for sizes, activation in itertools.product(axes["sizes"], axes["activation"]):
        rates = axes["lr"] or (lr_of(sizes, activation),)
        for rest in itertools.product(rates, *(axes[name] for name in AXES[3:])):
            found.append(Member(len(found), sizes, activation, *rest))
    return found


@dataclass(frozen=True)
class Data:
    """The rows that members train on and are validated by.

    Attributes:
        x: [N, features], on the device.
        y: int64 [N], or values [N, outputs], on the same device.
        share: of the rows to hold out, as `held_out`; None with folds.
        folds: the number of parts, as `fastmlp.train.split.fold`; None without folds.
        prepare: from the training rows of x, the function from rows of x to inputs, such as a standardization; None
            where the rows of x are inputs.
        weight: floating-point [N], the weight of each row in the training; None: all rows count alike.
    """

    x: Tensor
    y: Tensor
    share: float | None = None
    folds: int | None = None
    prepare: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    weight: Tensor | None = None

    def divided(self, seed: int, fold: int | None) -> tuple[Tensor, Tensor]:
        """(training rows, validation rows) of a member, ascending, on the CPU; ValueError if one part has none."""
        if self.folds is None:
            assert self.share is not None
            return held_out(self.y, self.share, seed)
        assert fold is not None
        return divided_by_fold(self.y, self.folds, fold, seed)

    def trained(self, fold: int | None) -> int:
        """The number of training rows of a member, which is the same for every seed."""
        if self.folds is None or fold is None:
            return len(self.divided(0, None)[0])
        return len(self.y) - len(range(fold, len(self.y), self.folds))


@dataclass(frozen=True)
class Training:
    """What all members have in common; the names are those of `fastmlp.fit`.

    Attributes:
        settings: of the optimizer that are no axes, as far as they are given.
        options: further arguments of `TrainStep`.
    """

    epochs: int
    batch_size: int
    optimizer: str
    loss: str
    schedule: str
    warmup: float
    dtype: torch.dtype
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, member: Member) -> Optimizer:
        """The optimizer of a member.

        Raises:
            ValueError: a setting that the optimizer does not have, or outside its range.
        """
        settings = {"momentum": member.momentum, "weight_decay": member.weight_decay, **self.settings}
        return usual_rule(lr=member.lr, optimizer=self.optimizer, **settings)


def grouped(
    members: Sequence[Member], data: Data, training: Training, room: float, most: int = MOST_MEMBERS, parts: int = 1
) -> list[list[int]]:
    """The numbers of the members of each group, which are trained as one ensemble.

    A group has members of one shape, activation and dropout, all with momentum or all without, and with the same number
    of training rows. Members with the same training rows are side by side, since they share the inputs.

    Args:
        room: bytes that a group may take.
        most: members of a group.
        parts: the number of processes, each of which should get a group.
    """
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    trained = {fold: data.trained(fold) for fold in dict.fromkeys(member.fold for member in members)}
    for member in members:
        structure = training.rule(member).structure
        kind = member.sizes, member.activation, member.dropout, structure, trained[member.fold]
        kinds.setdefault(kind, []).append(member)
    groups: list[list[int]] = []
    for alike in kinds.values():
        alike.sort(key=lambda member: (member.seed, member.fold or 0, member.number))
        limit = min(most, -(-len(alike) // parts))
        each = member_bytes(alike[0], data, training)
        group: list[int] = []
        divisions: set[object] = set()
        for member in alike:
            taken = (len(group) + 1) * each + len(divisions | {member.division}) * division_bytes(data, training)
            if group and (len(group) == limit or taken > room):
                groups.append(group)
                group, divisions = [], set()
            group.append(member.number)
            divisions.add(member.division)
        groups.append(group)
    return groups


def member_bytes(member: Member, data: Data, training: Training) -> int:
    """An estimate of what a member takes: parameters, optimizer states, and the buffers of a step."""
    sizes, item = member.sizes, training.dtype.itemsize
    wide = max(4, item)
    parameters = sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes))
    # The parameters, their best values so far, and masters of 16 bits; gradients, and on a GPU partial sums of them.
    of_parameters = 2 * item + (wide if item < 4 else 0) + wide * len(training.rule(member).kept)
    of_parameters += wide * (5 if data.x.is_cuda else 1)
    rows = min(training.batch_size, len(data.y))
    step = rows * item * (2 * sizes[0] + 3 * sum(sizes[1:])) + 16 * rows * CHECK_EVERY
    evaluation = FEWEST * 2 * sum(sizes) * item
    return parameters * of_parameters + step + evaluation


def division_bytes(data: Data, training: Training) -> int:
    """What the rows of one division take that other divisions do not share: row numbers, and prepared inputs."""
    numbers = 32 * len(data.y)
    if data.prepare is None:
        return numbers
    return numbers + data.x.numel() * training.dtype.itemsize + data.y.numel() * data.y.element_size()


def free_bytes(device: torch.device) -> float:
    """The free memory of a device; of the CPU, what the system and the process's control group have left."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    left = [_available()]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return float(max(0, min(left)))


def _available() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 << 30
