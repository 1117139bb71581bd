"""The engines of `fastmlp.train.fit`: each runs a stretch of training steps.

An engine of `fit` is not the engine of a `TrainStep` (`fastmlp.step`), which executes one step on one backend. The
engine "step" of `fit` calls a `TrainStep`, and the engine "autograd" calls autograd and torch.optim.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn import MLP
from ..step import TrainStep
from ..step.foreign import refusal
from ..step.loss_scale import LossScale
from ..step.optimizers import OPTIMIZERS, Optimizer, optimizer_of
from ..step.parameters import Copies
from ..step.train_step import arguments
from ..step.values import check_setting
from .scores import loss_function
from .weights import weighted_mean


class Engine(Protocol):
    """Runs training steps, which update the model's parameters in place.

    An engine may also have ``step_losses``, a tensor of the loss of each step of the last ``epoch``, and ``average()``,
    which returns parameters by name for `fit` to judge and keep in place of the model's, or None. An engine of a run
    that can be resumed has ``state_dict()``, which returns tensors by name, and ``load_state_dict(state)``. An engine
    whose ``epoch`` has an argument ``sample_weight`` takes weights of the rows [N].
    """

    def epoch(
        self, images: Tensor, labels: Tensor, batch_size: int, order: Tensor, lr_factors: Sequence[float]
    ) -> Tensor:
        """One step for each ``batch_size`` entries of ``order`` (the last batch may be smaller).

        Args:
            images: [N, features] on the model's device.
            labels: int64 [N], or values [N, outputs], on the same device.
            batch_size: rows per step.
            order: int64 [n] on the same device, row numbers of images and labels in the order of use.
            lr_factors: the factor of the base learning rate for each step.

        Returns:
            The mean loss over the n rows, each at the parameters of its step: 0-d float32 on the device, so that the
            caller decides when to wait for it. NaN or infinite if the loss of any step was.
        """


class StepEngine:
    """``fastmlp.TrainStep``: gather, forward, loss, backward and update as one operation, without the tape.

    With ``process_group``, all its processes are given the same rows, and divide each batch.

    Args:
        model: an MLP.
        loss: a name that `TrainStep` takes.
        settings: the optimizer's name and its settings, and further options, as `TrainStep` takes them; the learning
            rate is above 0.

    Raises:
        TypeError: another model.
        ValueError: a setting outside its range, or layers with hooks.
    """

    def __init__(self, model: nn.Module, *, loss: str = "cross_entropy", **settings: Any) -> None:
        checked_rule(**{name: value for name, value in settings.items() if name not in step_options()})
        self.step = TrainStep(model, loss=loss, **settings)  # type: ignore[arg-type]
        group = settings.get("process_group")
        #: (the number of this process, the number of processes)
        self.share = (0, 1) if group is None else (group.rank(), group.size())

    def state_dict(self) -> dict[str, Tensor]:
        """``TrainStep.state_dict``."""
        return self.step.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """``TrainStep.load_state_dict``."""
        self.step.load_state_dict(state)

    @property
    def step_losses(self) -> Tensor:
        """The loss of each step of the last `epoch`, on the device."""
        return self.step.losses

    def average(self) -> dict[str, Tensor] | None:
        """The moving average of the parameters; None without ``ema_decay``."""
        return None if self.step.rule.ema_decay is None else self.step.ema_state_dict()

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lr_factors: Sequence[float],
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """As `Engine.epoch`; ``sample_weight`` [N] are weights of the rows of the data."""
        rank, count = self.share
        if count > 1:
            check_shares(batch_size, len(order), count)
            full = len(order) - len(order) % batch_size
            whole, last = order[:full].view(-1, batch_size), order[full:]
            order, batch_size = torch.cat((whole[:, rank::count].flatten(), last[rank::count])), batch_size // count
        return self.step.epoch(images, labels, batch_size, order, lr_factors, sample_weight)


def check_shares(batch_size: int, rows: int, count: int) -> None:
    """ValueError unless ``count`` processes can divide each whole batch evenly, and each has a row of the last one."""
    if batch_size % count:
        raise ValueError(
            f"batches of {batch_size} rows cannot be divided among {count} processes; choose a batch_size that is a "
            f"multiple of {count}, such as {-(-batch_size // count) * count}"
        )
    if 0 < rows % batch_size < count:
        raise ValueError(
            f"the last batch of {rows} rows in batches of {batch_size} has {rows % batch_size}, fewer than the {count} "
            "processes; choose another batch_size"
        )


class AutogradEngine:
    """Forward, ``loss.backward()`` and an optimizer of torch.optim: the steps as ordinary PyTorch code writes them.

    Parameters of 16 bits have float32 masters (``fastmlp.step.parameters``). float16 also scales the loss
    (``fastmlp.step.loss_scale``).

    Args:
        model: maps [B, features] to logits [B, classes], or to values [B, outputs].
        optimizer: a name that `TrainStep` takes, of an optimizer that torch.optim has too; default "sgd".
        lr: base learning rate, above 0.
        loss: a name of ``fastmlp.base.losses.STEP_LOSSES``.
        settings: of the optimizer, by `TrainStep`'s names and with its defaults.

    Raises:
        TypeError: a setting that no optimizer has.
        ValueError: a value outside its range, an unknown optimizer or loss, or nothing to train in the model.
    """

    def __init__(
        self, model: nn.Module, *, optimizer: str = "sgd", lr: float, loss: str = "cross_entropy", **settings: Any
    ) -> None:
        rule = checked_rule(optimizer=optimizer, lr=lr, **settings)
        self.model = model
        self.lr = lr
        self.loss = loss_function(loss)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.params = tuple(named), list[Tensor](named.values())
        if not self.params:
            raise ValueError("the model has no parameter that requires a gradient; there is nothing to train")
        half = any(p.dtype == torch.float16 for p in self.params)
        self.loss_scale = LossScale(self.params[0].device) if half else None
        self.has_masters = any(p.dtype.itemsize < 4 for p in self.params)
        self.copies = [Copies(p, p.dtype) for p in self.params] if self.has_masters else []
        self.masters = [c.master for c in self.copies] if self.has_masters else self.params
        self.max_grad_norm = rule.max_grad_norm
        self.optimizer = _torch_optimizer(rule, self.masters)

    def state_dict(self) -> dict[str, Tensor]:
        """What the optimizer keeps per parameter, as ``TrainStep.state_dict`` names it; masters, and the loss scale."""
        state = {
            f"{name}.{key}": value.clone()
            for name, master in zip(self.names, self.masters, strict=True)
            for key, value in self.optimizer.state[master].items()
            if isinstance(value, Tensor)
        }
        if self.has_masters:
            state |= {f"{name}.master": master.clone() for name, master in zip(self.names, self.masters, strict=True)}
        counters = {} if self.loss_scale is None else self.loss_scale.counters()
        return state | {
            name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in counters.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned, after the model's own; ValueError for a state of other parameters."""
        rest = dict(state)
        kept: dict[int, dict[str, Tensor]] = {}
        try:
            for number, (name, master) in enumerate(zip(self.names, self.masters, strict=True)):
                if self.has_masters:
                    master.copy_(rest.pop(f"{name}.master"))
                keys = [key for key in rest if key.rpartition(".")[0] == name]
                kept[number] = {key.rpartition(".")[2]: rest.pop(key) for key in keys}
            if self.loss_scale is not None:
                self.loss_scale.set_counters({name: rest.pop(name).item() for name in self.loss_scale.counters()})
        except KeyError as error:
            raise ValueError(f"the state does not fit this engine: missing {error.args[0]}") from error
        if rest:
            raise ValueError(f"the state does not fit this engine: unexpected {', '.join(rest)}")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lr_factors: Sequence[float],
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """As `Engine.epoch`; ``sample_weight`` [N] are weights of the rows of the data."""
        for copies in self.copies:
            copies.follow()  # anybody may have written to the parameters since the last epoch
        total = torch.zeros((), dtype=torch.float32, device=images.device)
        for rows, factor in zip(order.split(batch_size), lr_factors, strict=True):
            outputs, targets = self.model(images.index_select(0, rows)), labels.index_select(0, rows)
            if sample_weight is None:
                loss = self.loss(outputs, targets)
            else:
                losses = self.loss(outputs, targets, reduction="none")
                loss = weighted_mean(losses, sample_weight.index_select(0, rows))
            for param in self.params:
                param.grad = None
            (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()
            self._update(self.lr * factor)
            total.add_(loss.detach(), alpha=len(rows))
        return total / len(order)

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.has_masters:
            self._clip()
            self.optimizer.step()
            return
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        if self.loss_scale is not None:
            self.loss_scale.check([m.grad for m in self.masters if m.grad is not None], scaled=True)
            self.loss_scale.adjust()
            if self.loss_scale.overflow:
                return
        self._clip()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        for copies in self.copies:
            copies.published()

    def _clip(self) -> None:
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)


def torch_optimizer_class(name: str) -> type[torch.optim.Optimizer] | None:
    """torch.optim's class of the rule of this name; None where it has none."""
    kinds = (getattr(torch.optim, attribute) for attribute in dir(torch.optim) if attribute.casefold() == name)
    return next((kind for kind in kinds if isinstance(kind, type)), None)


def _torch_optimizer(rule: Optimizer, params: list[Tensor]) -> torch.optim.Optimizer:
    """torch's optimizer with the settings of the rule; ValueError where torch.optim has none of this name."""
    kind = torch_optimizer_class(rule.name)
    if kind is None:
        raise ValueError(f"torch.optim has no {rule.name}, so it needs engine 'step', and a fastmlp.MLP")
    known = inspect.signature(kind).parameters
    settings = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    for field in dataclasses.fields(rule):
        if field.name not in known and settings.pop(field.name) != field.default and field.name != "max_grad_norm":
            raise ValueError(f"torch.optim.{kind.__name__} has no {field.name}, so it needs engine 'step'")
    if "fused" in known:
        settings["fused"] = all(p.device.type in ("cpu", "cuda") for p in params)
    return kind(params, **settings)


ENGINES: Mapping[str, Callable[..., Engine]] = {"step": StepEngine, "autograd": AutogradEngine}
"""Every engine of `fit` by name: (model, *, optimizer, loss, lr, and settings of the optimizer) -> `Engine`."""


def engine_for(model: nn.Module) -> str:
    """The name of the fastest engine: "step" for an MLP, else "autograd"."""
    return "step" if isinstance(model, MLP) else "autograd"


@functools.cache
def step_options() -> Mapping[str, inspect.Parameter]:
    """The arguments of `TrainStep` that are no settings of an optimizer, and that `fit` has no arguments for."""
    of_rules = {field.name for rule in OPTIMIZERS.values() for field in dataclasses.fields(rule)}
    others = {"model", "optimizer", "loss"} | of_rules
    return {name: parameter for name, parameter in arguments().items() if name not in others}


def checked_rule(*, lr: float, optimizer: str = "sgd", **settings: Any) -> Optimizer:
    """The rule of ``fastmlp.step.optimizers`` with these settings.

    Raises:
        TypeError: a setting that no optimizer has, or that is no number.
        ValueError: an unknown optimizer, a setting of another optimizer, or one outside its range.
    """
    _check_names(optimizer, settings)
    if not isinstance(lr, (int, float)):
        lr = check_setting("lr", lr)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a finite number above 0, got {lr}")
    momentum, weight_decay = settings.get("momentum"), settings.get("weight_decay")
    if isinstance(momentum, (int, float)) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if isinstance(weight_decay, (int, float)) and not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
    if optimizer == "sgd" and settings.get("nesterov") and not momentum:
        raise ValueError(f"nesterov needs a momentum above 0, got momentum {momentum or 0}")
    return optimizer_of(optimizer, {"lr": lr, **settings})


def _check_names(optimizer: str, settings: Mapping[str, Any]) -> None:
    """TypeError unless each is a setting of some optimizer."""
    known = {field.name: None for rule in OPTIMIZERS.values() for field in dataclasses.fields(rule)}
    for name, value in settings.items():
        if name not in known:
            raise TypeError(refusal(name, value, optimizer, {**known, **step_options()}))


def usual_rule(*, lr: float, optimizer: str = "sgd", **settings: Any) -> Optimizer:
    """As `checked_rule`; a setting that is None, or not given, is what the rule's ``usual`` says, or its default.

    Nesterov's momentum is off when momentum is 0.
    """
    _check_names(optimizer, settings)
    if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
        given = {name: value for name, value in settings.items() if value is not None}
        settings = {**OPTIMIZERS[optimizer].usual, **given}
        settings.pop("lr", None)
        if settings.get("nesterov") and settings.get("momentum") == 0:
            settings["nesterov"] = False
    return checked_rule(lr=lr, optimizer=optimizer, **settings)
