"""Param groups: parameters of one rule that have learning rates and weight decays of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .optimizers import Optimizer
from .values import check_setting

#: The settings that differ between groups.
OWN = ("lr", "weight_decay")


@dataclass
class Groups:
    """The groups of the parameters that an engine trains.

    Attributes:
        rules: one per group, equal but for the settings of ``OWN``.
        numbers: the group of each trained parameter, weight before bias of each layer.
    """

    rules: list[Optimizer]
    numbers: list[int]

    def rows(self, lrs: Tensor, count: Tensor | None) -> Tensor:
        """``Optimizer.rows`` of each group: float32 [steps, G, columns] or [steps, E, G, columns].

        ``lrs`` is [steps, G], or with members [steps, E, G].
        """
        return torch.stack([rule.rows(lrs[..., i], count) for i, rule in enumerate(self.rules)], -2)


def grouped(
    param_groups: Iterable[Mapping[str, Any]] | None, named: Mapping[str, Tensor], members: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The groups as torch.optim takes them, and the number of each parameter's group.

    Parameters that no group names are the first group, if there are any, with the settings of the step.

    Args:
        param_groups: of each group "params", a name, a pattern of names as in fnmatch, a parameter or a list of these,
            and perhaps settings of ``OWN``.
        named: all parameters of the model.
        members: of an ensemble, whose groups may have a number per member.

    Raises:
        TypeError: what is no group, no parameter or no number.
        ValueError: another setting, a parameter that the model does not have, or one in two groups.
    """
    given = [] if param_groups is None else list(param_groups)
    numbers: dict[str, int] = {}
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(given):
        if not isinstance(group, Mapping):
            raise TypeError(
                f"expected param_groups to be a list of dicts, got {group!r} of type {type(group).__name__}"
            )
        foreign = [key for key in group if key not in ("params", *OWN)]
        if foreign or "params" not in group:
            raise ValueError(
                f"expected a param group to have 'params' and perhaps {' or '.join(map(repr, OWN))}, got "
                f"{', '.join(map(repr, group)) or 'nothing'}; every other setting is the same for all groups; "
                "for groups that differ in others, train with autograd and torch.optim"
            )
        for name in _names(group["params"], named):
            if name in numbers:
                raise ValueError(f"{name} is in param groups {numbers[name]} and {i}; name each parameter once")
            numbers[name] = i
        own = {key: check_setting(key, group[key], members) for key in OWN if key in group}
        groups.append({"params": [named[name] for name, number in numbers.items() if number == i], **own})
    rest = [name for name in named if name not in numbers]
    if rest or not groups:
        groups.insert(0, {"params": [named[name] for name in rest]})
        numbers = dict.fromkeys(rest, 0) | {name: i + 1 for name, i in numbers.items()}
    return groups, numbers


def by_names(param_groups: Iterable[Mapping[str, Any]], named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The groups with the names of their parameters in place of parameters and patterns; errors as `grouped`."""
    param_groups = list(param_groups)
    grouped(param_groups, named)
    return [{**group, "params": list(_names(group["params"], named))} for group in param_groups]


def _names(params: object, named: Mapping[str, Tensor]) -> Iterator[str]:
    """The names of a group's parameters."""
    entries = [params] if isinstance(params, str | Tensor) or not isinstance(params, Iterable) else list(params)
    if not entries:
        raise ValueError("expected a param group to have parameters, got none")
    for entry in entries:
        if isinstance(entry, str):
            found = [name for name in named if fnmatchcase(name, entry)]
            if not found:
                raise ValueError(f"no parameter of the model is named {entry!r}; the names are {', '.join(named)}")
        elif isinstance(entry, Tensor):
            found = [name for name, parameter in named.items() if parameter is entry]
            if not found:
                raise ValueError(
                    f"a param group has a tensor {list(entry.shape)} that is no parameter of the model; pass "
                    "parameters of the model or their names"
                )
        else:
            raise TypeError(
                f"expected a param group's params to be parameters or their names, got {entry!r} of type "
                f"{type(entry).__name__}"
            )
        yield from found


def check_alike(rules: Sequence[Optimizer]) -> None:
    """ValueError unless the rules differ in the settings of ``OWN`` alone."""
    for i, rule in enumerate(rules):
        for name, value in vars(rule).items():
            if name not in OWN and value != vars(rules[0])[name]:
                raise ValueError(
                    f"param groups 0 and {i} have {name}={vars(rules[0])[name]!r} and {value!r}; groups of a TrainStep "
                    f"differ in {' and '.join(OWN)} only"
                )
