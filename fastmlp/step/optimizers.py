"""The optimizers of a training step: one class per update rule.

A rule has its settings, the names of what it keeps per parameter, its update in torch, and the row of numbers that
changes from step to step. ``kernels/optimizer.py`` reads the row and has the same update as device code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.names import unknown
from .per_member import SETTINGS, PerMember, across, least

Tensors = list[Tensor]

#: Numbers of a step that ``kernels/optimizer.py`` reads, its ``HYPER_COLUMNS``; the last is ``max_grad_norm``.
_COLUMNS = 8


@dataclass
class Optimizer:
    """What all rules have.

    Attributes:
        lr: learning rate; it may change at any time. In an ensemble, the settings named in ``per_member.SETTINGS`` are
            a float for all members or a ``PerMember``.
        weight_decay: as the torch optimizer of this name has it.
        max_grad_norm: most that the global 2-norm of the gradients may be; None: gradients are not clipped.
        name: what ``TrainStep`` calls the rule.
        counted: whether an update depends on the number of updates before it.
    """

    lr: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    name: ClassVar[str]
    counted: ClassVar[bool] = False

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the tensors kept per parameter, as torch.optim names them."""
        return ()

    @property
    def kernel(self) -> str:
        """The rule's name in ``kernels/optimizer.py``."""
        raise NotImplementedError

    @property
    def is_plain_sgd(self) -> bool:
        """W -= lr dW and nothing else, so that gradient and update can be one product."""
        return False

    #: What `fastmlp.fit` and ``fastmlp train`` take for settings that nobody gives; "lr" is absent where it depends on
    #: the model's activation. The other settings have the defaults above.
    usual: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of all settings."""
        return tuple(field.name for field in fields(self))

    @property
    def structure(self) -> tuple[object, ...]:
        """What every engine is built for; all other settings may change from step to step."""
        return self.kernel, self.states, self.max_grad_norm is None

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The columns of ``rows``: those that change from step to step, shaped as ``lrs``, and those that follow."""
        raise NotImplementedError

    def rows(self, lrs: Tensor, count: Tensor | None) -> Tensor:
        """float32 [steps, 8]: every setting of each step, as ``kernels/optimizer.py`` reads them.

        Args:
            lrs: float64 [steps], or [steps, E] for the members of an ensemble, which makes [steps, E, 8].
            count: float64 [steps] or [steps, E], the number of each update, from 1 on; None leaves out what depends on
                it.
        """
        changing, constants = self.columns(lrs, count)
        unused = (0.0,) * (_COLUMNS - 1 - len(changing) - len(constants))
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        if lrs.dim() == 2:
            columns = [across(value, lrs) for value in (*changing, *constants, *unused, max_norm)]
            of_members = [c.expand(lrs.shape) if isinstance(c, Tensor) else torch.full_like(lrs, c) for c in columns]
            return torch.stack(of_members, 2).float()
        rest = torch.tensor((*constants, *unused, max_norm), dtype=lrs.dtype, device=lrs.device)
        return torch.cat((torch.stack(changing, 1), rest.expand(len(lrs), -1)), 1).float()

    @property
    def decays(self) -> tuple[float, ...]:
        """The numbers whose powers of the count complete a row that was made without it, on the device."""
        return ()

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """Update ``params`` and ``states`` (a list per name) in place; nothing changes where ``skip`` (0-d) is 1.

        ``count`` (0-d float32) is the number of this update.
        """
        raise NotImplementedError


@dataclass
class SGD(Optimizer):
    """torch.optim.SGD without dampening."""

    momentum: float = 0.0
    nesterov: bool = False
    name: ClassVar[str] = "sgd"
    usual: ClassVar[Mapping[str, Any]] = {"momentum": 0.9, "nesterov": True}

    def __post_init__(self) -> None:
        if self.nesterov and not least(self.momentum) > 0:
            raise ValueError("nesterov=True needs optimizer='sgd' and a momentum above 0")

    @property
    def states(self) -> tuple[str, ...]:
        """The momentum buffer, with momentum."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def kernel(self) -> str:
        """A rule each without momentum, with momentum, and with Nesterov's."""
        if not self.momentum:
            return "sgd"
        return "nesterov" if self.nesterov else "momentum"

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The learning rate alone changes from step to step."""
        return (lrs,), (self.weight_decay, self.momentum)

    @property
    def is_plain_sgd(self) -> bool:
        """Without momentum, weight decay and clipping."""
        return not self.momentum and not self.weight_decay and self.max_grad_norm is None

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """torch's fused update."""
        torch._fused_sgd_(
            params,
            grads,
            states[0] if states else [],
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            is_first_step=False,
            found_inf=skip,
        )


@dataclass
class AdamW(Optimizer):
    """torch.optim.AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    name: ClassVar[str] = "adamw"
    counted: ClassVar[bool] = True

    @property
    def states(self) -> tuple[str, ...]:
        """The first and the second moment."""
        return ("exp_avg", "exp_avg_sq")

    @property
    def kernel(self) -> str:
        """There is one rule."""
        return "adamw"

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """Weight decay and the corrections by the count change from step to step."""
        beta1, beta2 = self.betas
        decay = 1 - lrs * across(self.weight_decay, lrs)
        constants = 1 - beta1, beta2, 1 - beta2, self.eps
        if count is None:
            return (decay, lrs, torch.ones_like(lrs)), constants
        return (decay, lrs / (1 - beta1**count), (1 - beta2**count) ** -0.5), constants

    @property
    def decays(self) -> tuple[float, ...]:
        """Both betas."""
        return self.betas

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """torch's fused update."""
        first, second = states
        torch._fused_adamw_(
            params,
            grads,
            first,
            second,
            [],
            [count] * len(grads),
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )


OPTIMIZERS: dict[str, type[Optimizer]] = {rule.name: rule for rule in (SGD, AdamW)}
#: What an error says of a setting that another rule has.
_HINTS = {
    "momentum": "momentum is SGD's setting; AdamW has betas=(beta1, beta2)",
    "nesterov": "nesterov=True needs optimizer='sgd' and a momentum above 0",
}


def optimizer_of(name: str, settings: Mapping[str, Any], members: int | None = None) -> Optimizer:
    """The rule of that name with the settings that it has; the other ones must have their defaults.

    For an ensemble of ``members``, the settings that may differ between members are a number or one per member.

    Raises:
        ValueError: an unknown rule, a setting outside its range, or a setting of another rule.
        TypeError: a setting that is no number, or an optimizer that is no name.
    """
    if not isinstance(name, str):
        raise TypeError(_no_name(name))
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    rule = OPTIMIZERS[name]
    own = {field.name for field in fields(rule)}
    defaults = {field.name: field.default for other in OPTIMIZERS.values() for field in fields(other)}
    values = {setting: check_setting(setting, value, members) for setting, value in settings.items()}
    for setting, value in values.items():
        if setting not in own and value != defaults[setting]:
            raise ValueError(_HINTS.get(setting, f"{setting}={value!r} is not a setting of optimizer {name!r}"))
    return rule(**{setting: value for setting, value in values.items() if setting in own})


def _no_name(optimizer: object) -> str:
    """What to say of an optimizer that is given as torch's class or object."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    name = kind.__name__.lower()
    advice = "train with autograd and that optimizer"
    if kind.__module__.startswith("torch.optim") and name in OPTIMIZERS:
        advice = f"pass optimizer={name!r} with its settings, or {advice}"
    return f"expected the name of an optimizer, one of {', '.join(OPTIMIZERS)}, got {kind.__name__}; {advice}"


#: What each setting has to be, and the test of a float for it. NaN passes none of the tests.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a learning rate of at least 0, got lr={}", lambda v: 0 <= v < math.inf),
    "momentum": ("a momentum in [0, 1), got {}", lambda v: 0 <= v < 1),
    "weight_decay": ("a weight_decay of at least 0, got {}", lambda v: 0 <= v < math.inf),
    "eps": ("an eps of at least 0, got {}", lambda v: 0 <= v < math.inf),
    "max_grad_norm": ("a max_grad_norm above 0 or None, got {}", lambda v: v > 0),
}


def check_setting(setting: str, value: Any, members: int | None = None) -> Any:
    """The value as Python numbers, if it can be what the setting's name says, whichever rule has the setting.

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
    if setting == "nesterov":
        if not isinstance(value, bool | int):
            raise TypeError(f"expected nesterov to be a bool, got {value!r} of type {type(value).__name__}")
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
    if setting == "max_grad_norm" and value is None:
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
