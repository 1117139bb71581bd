"""What an error says of an argument that a ``TrainStep`` does not have, whether torch.optim has it or not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields

import torch

from ..base.names import did_you_mean
from .optimizers import OPTIMIZERS


def refusal(name: str, value: object, optimizer: object, known: Iterable[str]) -> str:
    """The message of a TypeError for an argument ``name`` that is not among the ``known`` ones."""
    of_torch = torch_classes_with(name)
    own = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else None
    if not of_torch or own is None:
        known = tuple(known)
        return f"unexpected keyword argument {name!r}; expected one of {', '.join(known)}{did_you_mean(name, known)}"
    same_rule = [kind for kind in of_torch if kind.casefold() == own.name]
    owners = [f"torch.optim.{kind}" for kind in same_rule or of_torch]
    return (
        f"{name}={value!r} is a setting of {', '.join(owners)}, and not of fastmlp's {own.name!r}, which has "
        f"{', '.join(field.name for field in fields(own))}; leave {name} out, or train with autograd and "
        f"{owners[0] if len(owners) == 1 else 'one of these'}"
    )


def torch_classes_with(setting: str) -> list[str]:
    """Names of torch.optim's optimizers that have this setting."""
    kinds = {name: kind for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    return [
        name
        for name, kind in sorted(kinds.items())
        if issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and setting in list(inspect.signature(kind).parameters)[1:]  # the first one is the parameters
    ]
