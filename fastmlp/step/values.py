"""What the settings of a rule may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from .per_member import SETTINGS, PerMember

_BOOLS = frozenset({"nesterov", "maximize", "amsgrad", "centered", "ema_warmup"})
#: What each setting has to be, and the test of a float for it. NaN passes none of the tests.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a learning rate of at least 0, got lr={}", lambda v: 0 <= v < math.inf),
    "momentum": ("a momentum in [0, 1), got {}", lambda v: 0 <= v < 1),
    "weight_decay": ("a weight_decay of at least 0, got {}", lambda v: 0 <= v < math.inf),
    "ema_decay": ("an ema_decay in [0, 1] or None, got {}", lambda v: 0 <= v <= 1),
    "alpha": ("an alpha in [0, 1), got {}", lambda v: 0 <= v < 1),
    "eps": ("an eps of at least 0, got {}", lambda v: 0 <= v < math.inf),
    "max_grad_norm": ("a max_grad_norm above 0 or None, got {}", lambda v: v > 0),
}


def check_setting(setting: str, value: Any, members: int | None = None) -> Any:
    """The value as a Python number or numbers, if the setting may have it, whichever rule has the setting.

    A 0-d tensor on the CPU counts as its number. A setting of an ensemble that is one number per member comes back as
    a ``PerMember``, or as one number where all are equal.
    """
    if members is not None and setting in SETTINGS and not isinstance(value, Real | str) and hasattr(value, "__len__"):
        if isinstance(value, Tensor):
            value = value.tolist() if value.dim() else value
        if not isinstance(value, Tensor):
            if len(value) != members:
                raise ValueError(f"expected {setting} to be a number or {members}, one per member, got {len(value)}")
            each = PerMember(check_setting(setting, number) for number in value)
            return each[0] if len(set(each)) == 1 else each
    if setting in _BOOLS:
        if not isinstance(value, bool | int):
            raise TypeError(f"expected {setting} to be a bool, got {value!r} of type {type(value).__name__}")
        return bool(value)
    if setting == "betas":
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"expected betas=(beta1, beta2), got {value!r} of type {type(value).__name__}")
        if len(value) != 2:
            raise ValueError(f"expected betas=(beta1, beta2), got {len(value)} values: {value}")
        numbers = tuple(_number(name, beta) for name, beta in zip(("beta1", "beta2"), value, strict=True))
        if not all(0 <= beta < 1 for beta in numbers):
            raise ValueError(f"expected betas in [0, 1), got {value}")
        return numbers
    if setting in ("max_grad_norm", "ema_decay") and value is None:
        return None
    number = _number(setting, value)
    text, holds = _RANGES[setting]
    if not holds(number):
        raise ValueError(f"expected {text.format(number)}")
    return number


def _number(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        if value.dim() or not value.is_cpu or value.is_complex():
            raise ValueError(
                f"expected {name} to be a number or a 0-d tensor on the CPU, got a tensor {list(value.shape)} of "
                f"{value.dtype} on {value.device}"
            )
        return float(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number, got {value!r} of type {type(value).__name__}")
    return float(value)
