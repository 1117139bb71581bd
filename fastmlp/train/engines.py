"""The engines of `fastmlp.train.fit`: each runs a stretch of training steps.

An engine of `fit` is not the engine of a `TrainStep` (`fastmlp.step`), which executes one step on one backend. The
engine "step" of `fit` calls a `TrainStep`, and the engine "autograd" calls autograd and torch.optim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.losses import STEP_LOSSES
from ..base.names import unknown
from ..nn import MLP
from ..step import TrainStep
from ..step.loss_scale import LossScale
from ..step.parameters import Copies
from .scores import loss_function

OPTIMIZERS = ("sgd",)


class Engine(Protocol):
    """Runs training steps, which update the model's parameters in place.

    An engine may also have ``step_losses``, a tensor of the loss of each step of the last ``epoch``.
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

    Args:
        model: an MLP.
        loss: a name that `TrainStep` takes.
        settings: optimizer, lr, momentum, weight_decay and nesterov, as `AutogradEngine`.

    Raises:
        TypeError: another model.
        ValueError: as `AutogradEngine`, or layers with hooks.
    """

    def __init__(self, model: nn.Module, *, loss: str = "cross_entropy", **settings: Any) -> None:
        check_hyperparameters(**settings)
        self.step = TrainStep(model, loss=loss, **settings)  # type: ignore[arg-type]

    @property
    def step_losses(self) -> Tensor:
        """The loss of each step of the last `epoch`, on the device."""
        return self.step.losses

    def epoch(
        self, images: Tensor, labels: Tensor, batch_size: int, order: Tensor, lr_factors: Sequence[float]
    ) -> Tensor:
        """As `Engine.epoch`."""
        return self.step.epoch(images, labels, batch_size, order, lr_factors)


class AutogradEngine:
    """Forward, ``loss.backward()`` and ``torch.optim.SGD``: the steps as ordinary PyTorch code writes them.

    Parameters of 16 bits have float32 masters (``fastmlp.step.parameters``). float16 also scales the loss
    (``fastmlp.step.loss_scale``).

    Args:
        model: maps [B, features] to logits [B, classes], or to values [B, outputs].
        optimizer: "sgd".
        lr: base learning rate, above 0.
        momentum: in [0, 1).
        weight_decay: at least 0; this factor times the parameter is added to the gradient.
        nesterov: Nesterov's momentum; needs momentum above 0.
        loss: a name of ``fastmlp.train.scores.FIT_LOSSES``.

    Raises:
        ValueError: a value outside its range, an unknown optimizer or loss, or nothing to train in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "sgd",
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        loss: str = "cross_entropy",
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        check_hyperparameters(optimizer=optimizer, **settings)  # type: ignore[arg-type]
        self.model = model
        self.lr = lr
        self.loss = loss_function(loss)
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("the model has no parameter that requires a gradient; there is nothing to train")
        half = any(p.dtype == torch.float16 for p in self.params)
        self.loss_scale = LossScale(self.params[0].device) if half else None
        self.has_masters = any(p.dtype.itemsize < 4 for p in self.params)
        self.masters = [Copies(p, p.dtype).master for p in self.params] if self.has_masters else self.params
        fused = all(p.device.type in ("cpu", "cuda") for p in self.params)
        self.optimizer = torch.optim.SGD(self.masters, fused=fused, **settings)  # type: ignore[arg-type]

    def epoch(
        self, images: Tensor, labels: Tensor, batch_size: int, order: Tensor, lr_factors: Sequence[float]
    ) -> Tensor:
        """As `Engine.epoch`."""
        total = torch.zeros((), dtype=torch.float32, device=images.device)
        for rows, factor in zip(order.split(batch_size), lr_factors, strict=True):
            loss = self.loss(self.model(images.index_select(0, rows)), labels.index_select(0, rows))
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
            self.optimizer.step()
            return
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        if self.loss_scale is not None:
            self.loss_scale.check([m.grad for m in self.masters if m.grad is not None], scaled=True)
            self.loss_scale.adjust()
            if self.loss_scale.overflow:
                return
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)


ENGINES: Mapping[str, Callable[..., Engine]] = {"step": StepEngine, "autograd": AutogradEngine}
"""Every engine of `fit` by name: (model, *, optimizer, loss, lr, momentum, weight_decay, nesterov) -> `Engine`."""


def engine_for(model: nn.Module, loss: str = "cross_entropy") -> str:
    """The name of the fastest engine: "step" for an MLP with a loss that a step has, else "autograd"."""
    return "step" if isinstance(model, MLP) and loss in STEP_LOSSES else "autograd"


def check_hyperparameters(
    *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False, optimizer: str = "sgd"
) -> None:
    """ValueError for an unknown optimizer, or a learning rate, momentum or weight decay outside its range."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", optimizer, OPTIMIZERS))
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a finite number above 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum above 0, got momentum 0")
