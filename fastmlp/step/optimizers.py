"""The optimizers of a training step: one class per update rule.

A rule has its settings, the names of what it keeps per parameter, its update in torch, and the row of numbers that
changes from step to step. ``kernels/optimizer.py`` reads the row and has the same update as device code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.names import unknown
from .per_member import across, least
from .values import check_setting

Tensors = list[Tensor]

#: Numbers of a step that ``kernels/optimizer.py`` reads, its ``HYPER_COLUMNS``; the last is ``max_grad_norm``.
_COLUMNS = 8
#: The weight in the warm-up, 1 - (1 + t) / (10 + t), is this number divided by 10 + t.
_EMA_NUMERATOR = 9.0


@dataclass
class Optimizer:
    """What all rules have.

    Attributes:
        lr: learning rate; it may change at any time. In an ensemble, the settings named in ``per_member.SETTINGS`` are
            a float for all members or a ``PerMember``.
        weight_decay: as the torch optimizer of this name has it.
        max_grad_norm: most that the global 2-norm of the gradients may be; None: gradients are not clipped.
        maximize: whether updates go up the gradient.
        ema_decay: of the exponential moving average of the parameters; None: there is none.
        ema_warmup: whether the decay of update t is at most (1 + t) / (10 + t).
        name: what ``TrainStep`` calls the rule.
        corrected: whether the rule itself depends on the number of updates before.
        spare: whether the update in torch works in memory beside the states.
    """

    lr: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    maximize: bool = False
    ema_decay: float | None = None
    ema_warmup: bool = False
    name: ClassVar[str]
    corrected: ClassVar[bool] = False
    spare: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup=True needs an ema_decay, such as 0.999")

    @property
    def counted(self) -> bool:
        """Whether an update depends on the number of updates before it."""
        return self.corrected or self.ema_warmup

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the tensors kept per parameter, as torch.optim names them."""
        return ()

    @property
    def kept(self) -> tuple[str, ...]:
        """``states``, and the parameters' moving average "ema" where there is one."""
        return self.states if self.ema_decay is None else (*self.states, "ema")

    @property
    def rule(self) -> str:
        """The rule's name in ``kernels/optimizer.py``, with the options that this rule alone has."""
        return self.name

    @property
    def kernel(self) -> str:
        """What ``kernels/optimizer.py`` compiles: the rule and its options."""
        options = (self.maximize, " maximize"), (self.ema_decay is not None, " ema")
        return self.rule + "".join(option for has, option in options if has)

    @property
    def is_plain_sgd(self) -> bool:
        """W -= lr dW and nothing else, so that gradient and update can be one product."""
        return False

    @property
    def numbers(self) -> tuple[float, ...]:
        """The rule's own settings as the compiled step of a CPU reads them (``fastmlp/cpu/native/rules.py``)."""
        raise NotImplementedError

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
        return self.kernel, self.states, self.max_grad_norm is None, self.counted

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The columns of ``rows``: those that change from step to step, shaped as ``lrs``, and those that follow."""
        raise NotImplementedError

    def rows(self, lrs: Tensor, count: Tensor | None) -> Tensor:
        """float32 [steps, 8], with an average [steps, 16]: settings as ``kernels/optimizer.py`` reads them.

        Args:
            lrs: float64 [steps], or [steps, E] for the members of an ensemble, which makes [steps, E, 8 or 16].
            count: float64 [steps] or [steps, E], the number of each update, from 1 on; None leaves out what depends on
                it.
        """
        changing, constants = self.columns(lrs, count)
        unused = (0.0,) * (_COLUMNS - 1 - len(changing) - len(constants))
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        if lrs.dim() == 2:
            columns = [across(value, lrs) for value in (*changing, *constants, *unused, max_norm)]
            of_members = [c.expand(lrs.shape) if isinstance(c, Tensor) else torch.full_like(lrs, c) for c in columns]
            table = torch.stack(of_members, 2)
        else:
            rest = torch.tensor((*constants, *unused, max_norm), dtype=lrs.dtype, device=lrs.device)
            table = torch.cat((torch.stack(changing, 1), rest.expand(len(lrs), -1)), 1)
        return (table if self.ema_decay is None else torch.cat((table, self._ema_columns(lrs, count)), -1)).float()

    def _ema_columns(self, lrs: Tensor, count: Tensor | None) -> Tensor:
        """The weight of the present parameters in their average, and columns that complete the row."""
        assert self.ema_decay is not None
        table = lrs.new_zeros((*lrs.shape, _COLUMNS))
        table[..., 0] = 1 - self.ema_decay
        if self.ema_warmup and count is None:
            table[..., 1] = _EMA_NUMERATOR
        elif self.ema_warmup and count is not None:
            table[..., 0].clamp_(min=_EMA_NUMERATOR / (10 + count))
        return table

    def ema_weight(self, count: Tensor) -> Any:
        """The weight at update number ``count`` (0-d); a number unless the count is on a GPU."""
        assert self.ema_decay is not None
        weight = 1 - self.ema_decay
        if not self.ema_warmup:
            return weight
        if count.is_cpu:
            return max(weight, _EMA_NUMERATOR / (10 + count.item()))
        return (_EMA_NUMERATOR / (10 + count)).clamp_(min=weight)

    def with_rate(self, lr: Any) -> Optimizer:
        """The same rule with another learning rate, which was checked."""
        other: Optimizer = object.__new__(type(self))
        vars(other).update(vars(self), lr=lr)
        return other

    @property
    def decays(self) -> tuple[float, ...]:
        """The numbers whose powers by the number of updates complete, on the device, a row made without that number."""
        return ()

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """Update ``params`` and ``states`` in place, and perhaps ``grads``; nothing is updated where ``skip`` is 1.

        Args:
            states: a list per name. A rule with ``spare`` gets two lists more: tensors like ``params``, whose values
                mean nothing, and one 0-d tensor, which is 1.
            count: 0-d float32, the number of this update.
            skip: 0-d float32, or None.
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
        super().__post_init__()
        if self.nesterov and not least(self.momentum) > 0:
            raise ValueError("nesterov=True needs optimizer='sgd' and a momentum above 0")

    @property
    def states(self) -> tuple[str, ...]:
        """The momentum buffer, with momentum."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def rule(self) -> str:
        """A rule each without momentum, with momentum, and with Nesterov's."""
        if not self.momentum:
            return "sgd"
        return "nesterov" if self.nesterov else "momentum"

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The learning rate alone changes from step to step."""
        return (lrs,), (self.weight_decay, self.momentum)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Momentum, and whether it is Nesterov's."""
        return self.momentum, float(self.nesterov)

    @property
    def is_plain_sgd(self) -> bool:
        """Without momentum, weight decay, clipping and ``maximize``."""
        return not (self.momentum or self.weight_decay or self.maximize) and self.max_grad_norm is None

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
            maximize=self.maximize,
            is_first_step=False,
            found_inf=skip,
        )


@dataclass
class Adam(Optimizer):
    """torch.optim.Adam, whose weight decay is a part of the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    name: ClassVar[str] = "adam"
    corrected: ClassVar[bool] = True
    _fused: ClassVar[Callable[..., None]] = staticmethod(torch._fused_adam_)
    _decoupled: ClassVar[bool] = False

    @property
    def states(self) -> tuple[str, ...]:
        """The first and the second moment; with amsgrad also the largest second moment."""
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else []))

    @property
    def rule(self) -> str:
        """With and without amsgrad."""
        return f"{self.name} amsgrad" if self.amsgrad else self.name

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The corrections by the count change from step to step."""
        beta1, beta2 = self.betas
        decay, constants = self._decay(lrs), (1 - beta1, beta2, 1 - beta2, self.eps)
        if count is None:
            return (decay, lrs, torch.ones_like(lrs)), constants
        return (decay, lrs / (1 - beta1**count), (1 - beta2**count) ** -0.5), constants

    def _decay(self, lrs: Tensor) -> Tensor:
        """The column of the weight decay."""
        return torch.ones_like(lrs) * across(self.weight_decay, lrs)

    @property
    def decays(self) -> tuple[float, ...]:
        """Both betas."""
        return self.betas

    @property
    def numbers(self) -> tuple[float, ...]:
        """Both betas, epsilon, amsgrad, and whether the weight decay is no part of the gradient."""
        return *self.betas, self.eps, float(self.amsgrad), float(self._decoupled)

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """torch's fused update."""
        first, second, *largest = states
        self._fused(
            params,
            grads,
            first,
            second,
            largest[0] if largest else [],
            [count] * len(grads),
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            found_inf=skip,
        )


@dataclass
class AdamW(Adam):
    """torch.optim.AdamW, whose weight decay is no part of the gradient."""

    name: ClassVar[str] = "adamw"
    _fused: ClassVar[Callable[..., None]] = staticmethod(torch._fused_adamw_)
    _decoupled: ClassVar[bool] = True

    def _decay(self, lrs: Tensor) -> Tensor:
        return 1 - lrs * across(self.weight_decay, lrs)


@dataclass
class RMSprop(Optimizer):
    """torch.optim.RMSprop."""

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    name: ClassVar[str] = "rmsprop"
    spare: ClassVar[bool] = True

    @property
    def states(self) -> tuple[str, ...]:
        """The mean of the squares; with ``centered`` that of the gradients; the momentum buffer, with momentum."""
        options = (self.centered, "grad_avg"), (self.momentum, "momentum_buffer")
        return ("square_avg", *(name for has, name in options if has))

    @property
    def rule(self) -> str:
        """A rule for each combination of momentum and ``centered``."""
        options = (self.centered, " centered"), (self.momentum, " momentum")
        return self.name + "".join(option for has, option in options if has)

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The learning rate alone changes from step to step."""
        return (lrs,), (self.weight_decay, self.alpha, 1 - self.alpha, self.eps, self.momentum)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Alpha, epsilon, momentum, and whether it is centered."""
        return self.alpha, self.eps, self.momentum, float(self.centered)

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """torch has no fused update: operators on all tensors, in place and without numbers that become tensors."""
        *kept, divisor, (one,) = states
        with _unless(skip, [params, *kept]) as goes_on:
            if not goes_on:
                return
            squares = kept[0]
            _prepare(grads, params, self.weight_decay, self.maximize)
            torch._foreach_copy_(divisor, grads)
            torch._foreach_mul_(divisor, grads)
            torch._foreach_lerp_(squares, divisor, 1 - self.alpha)
            torch._foreach_copy_(divisor, squares)
            if self.centered:
                torch._foreach_lerp_(kept[1], grads, 1 - self.alpha)
                torch._foreach_addcmul_(divisor, kept[1], kept[1], value=-1.0)
            torch._foreach_sqrt_(divisor)
            torch._foreach_add_(divisor, one, alpha=self.eps)
            if self.momentum:
                torch._foreach_add_(kept[-1], kept[-1], alpha=self.momentum - 1)
                torch._foreach_addcdiv_(kept[-1], grads, divisor)
                torch._foreach_add_(params, kept[-1], alpha=-self.lr)
            else:
                torch._foreach_addcdiv_(params, grads, divisor, value=-self.lr)


@dataclass
class Lion(Optimizer):
    """Lion: the sign of a mean of momentum and gradient. https://arxiv.org/abs/2302.06675, algorithm 2.

    The betas, 0.9 and 0.99, are those of the publication, and so is the weight decay, which is no part of the gradient.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    name: ClassVar[str] = "lion"
    spare: ClassVar[bool] = True
    #: A sign is a larger update than Adam's, so the publication advises rates 3 to 10 times smaller than AdamW's.
    usual: ClassVar[Mapping[str, Any]] = {"lr": 3e-4}

    @property
    def states(self) -> tuple[str, ...]:
        """The momentum."""
        return ("exp_avg",)

    def columns(self, lrs: Tensor, count: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The learning rate alone changes from step to step."""
        return (lrs,), (self.weight_decay, 1 - self.betas[0], 1 - self.betas[1])

    @property
    def numbers(self) -> tuple[float, ...]:
        """Both betas."""
        return self.betas

    def update(
        self, params: Tensors, grads: Tensors, states: Sequence[Tensors], count: Tensor, skip: Tensor | None
    ) -> None:
        """Operators on all tensors, in place and without numbers that become tensors."""
        momenta, signs, _ = states
        with _unless(skip, [params, momenta]) as goes_on:
            if not goes_on:
                return
            _prepare(grads, params, 0.0, self.maximize)
            torch._foreach_copy_(signs, momenta)
            torch._foreach_lerp_(signs, grads, 1 - self.betas[0])
            torch._foreach_sign_(signs)
            torch._foreach_add_(signs, grads, alpha=0.0)  # the sign of NaN is 0, and would hide it
            torch._foreach_lerp_(momenta, grads, 1 - self.betas[1])
            # One sum, because a sum with a bare sign would round to the same side at every step.
            if self.weight_decay:
                torch._foreach_add_(signs, params, alpha=self.weight_decay)
            torch._foreach_add_(params, signs, alpha=-self.lr)


def _prepare(grads: Tensors, params: Tensors, weight_decay: float, maximize: bool) -> None:
    """The sign and the weight decay of the gradients, in place."""
    if maximize:
        torch._foreach_neg_(grads)
    if weight_decay:
        torch._foreach_add_(grads, params, alpha=weight_decay)


@contextmanager
def _unless(skip: Tensor | None, tensors: Sequence[Tensors]) -> Iterator[bool]:
    """Whether to go on; what is done to the tensors meanwhile is undone where ``skip`` is 1. No GPU is waited for."""
    if skip is None or skip.is_cpu:
        yield skip is None or not skip.item()
        return
    before = [t.clone() for group in tensors for t in group]
    yield True
    for t, kept in zip(chain.from_iterable(tensors), before, strict=True):
        t.copy_(torch.where(skip != 0, kept, t))


OPTIMIZERS: dict[str, type[Optimizer]] = {rule.name: rule for rule in (SGD, Adam, AdamW, RMSprop, Lion)}
#: What an error says of a setting that another rule has.
_HINTS = {"nesterov": "nesterov=True needs optimizer='sgd' and a momentum above 0"}


def optimizer_of(name: str, settings: Mapping[str, Any], members: int | None = None) -> Optimizer:
    """The rule of that name with the settings that it has; the other ones must have their defaults.

    ``betas`` may be None, which is the rule's default. For an ensemble of ``members``, the settings that may differ
    between members are a number or one per member.

    Raises:
        ValueError: an unknown rule, a setting outside its range, or a setting of another rule.
        TypeError: a setting that is no number, or an optimizer that is no name.
    """
    if not isinstance(name, str):
        raise TypeError(_no_name(name))
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS, ", or train with autograd and another optimizer"))
    rule = OPTIMIZERS[name]
    own = {field.name for field in fields(rule)}
    given = {setting: value for setting, value in settings.items() if value is not None or setting != "betas"}
    values = {setting: check_setting(setting, value, members) for setting, value in given.items()}
    for setting, value in values.items():
        if setting not in own:
            owners = {
                other: field.default
                for other in OPTIMIZERS
                for field in fields(OPTIMIZERS[other])
                if field.name == setting
            }
            if value not in owners.values():
                hint = (
                    f"{setting}={value!r} is not a setting of optimizer {name!r}, but of {', '.join(owners)}; leave it "
                    f"out, or choose another optimizer; {name!r} has {', '.join(field.name for field in fields(rule))}"
                )
                raise ValueError(_HINTS.get(setting, hint))
    return rule(**{setting: value for setting, value in values.items() if setting in own})


def only_rates_differ(rules: Sequence[Optimizer], others: Sequence[Optimizer]) -> bool:
    """Whether rules of the same names have the same settings, except for their learning rates."""
    return all(
        [*vars(rule).values()][1:] == [*vars(other).values()][1:]  # the first one is the learning rate
        for rule, other in zip(rules, others, strict=True)
    )


def _no_name(optimizer: object) -> str:
    """What to say of an optimizer that is given as torch's class or object."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    name = kind.__name__.lower()
    advice = "train with autograd and that optimizer"
    if kind.__module__.startswith("torch.optim") and name in OPTIMIZERS:
        advice = f"pass optimizer={name!r} with its settings, or {advice}"
    return f"expected the name of an optimizer, one of {', '.join(OPTIMIZERS)}, got {kind.__name__}; {advice}"
