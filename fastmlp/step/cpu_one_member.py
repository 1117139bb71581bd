"""The training step of an ensemble of one member on plain torch: the step of an MLP on views of its tensors.

An MLP's step multiplies with what ``fastmlp.cpu`` chose for it, activations fused into products, and makes fewer calls
than the pieces of ``cpu_ensemble``. One member therefore takes the time of an MLP and has its bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from math import nan
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..base.losses import takes_classes
from .cpu_dropout import StepDropout, advance
from .cpu_native import NativeStep
from .cpu_step import TorchStep
from .groups import Groups
from .loss_options import PLAIN, PLAIN_OF_MEMBERS, LossOptions, check_labels_of_members
from .optimizers import Optimizer

if TYPE_CHECKING:
    from .data_parallel import DataParallel


class OneMember:
    """Forward, backward and update with the interface of ``cpu_ensemble.TorchEnsemble``.

    Class numbers are looked at before anything changes: by the loss itself, or here where rows have weights.

    Args:
        layers: modules with parameters [1, N, K] and [1, N].
        active: bool [1], read at every step.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        rule: Optimizer,
        loss: str,
        dtype: Any,
        active: Tensor,
        options: LossOptions = PLAIN,
        groups: Groups | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        views: list[Any] = [_View(layer) for layer in layers]
        self._options = PLAIN_OF_MEMBERS if options.is_plain else options
        self.rule, self.active = rule, active
        #: Whether the member is active, read from the tensor's memory, which is faster than to ask the tensor.
        self._is_active: Any = active
        if active.is_cpu:
            self._is_active = ctypes.c_bool.from_address(active.data_ptr())
        self._mlp = TorchStep(views, rule, loss, dtype, groups=groups, options=self._options, parallel=parallel)
        self._classes = views[-1].out_features if takes_classes(loss) else None

    structure = staticmethod(TorchStep.structure)

    @property
    def dropout(self) -> StepDropout | None:
        """What a pass drops; it may be assigned between steps."""
        return self._mlp.dropout

    @dropout.setter
    def dropout(self, dropout: StepDropout | None) -> None:
        self._mlp.dropout = dropout

    def step(self, x: Tensor, y: Tensor, out: Tensor, weight: Tensor | None = None) -> None:
        """One step on x [M, K] or [1, M, K] (float or uint8) and targets; writes the loss into ``out`` [1].

        ``weight`` are sample weights [M] or [1, M].
        """
        if not self._is_active:
            self._pass_by(out)
            return
        planned = self._mlp._planned(x.shape[-2])
        if weight is None and planned.__class__ is NativeStep and planned.made(x, y, out):
            return
        x, y = x if x.dim() == 2 else x[0], self._targets(y)
        if weight is not None or not self._options.is_plain:
            self._look_at(y)
        planned(x, y, out[0], None, _row(weight))

    def gradients(
        self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False, weight: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients of the trained masters, in the order of the parameters; parameters stay as they are."""
        grads = self._mlp.optimizer.grads
        if self._is_active:
            x, y = x if x.dim() == 2 else x[0], self._targets(y)
            self._look_at(y)
            grads = self._mlp.gradients(x, y, out[0], accumulate=accumulate, weight=_row(weight))
        else:
            self._pass_by(out)
            if not accumulate:
                for grad in grads:
                    grad.zero_()
        return [grad.unsqueeze(0) for grad in grads]

    def update(self) -> None:
        """Apply the optimizer to what ``gradients`` left."""
        if self._is_active:
            self._mlp.update()

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Tensor,
        losses: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Steps over ``order`` [n] or [1, n], with learning rates [steps, 1] or [steps, 1, G]; losses are [steps, 1].

        ``weight`` are sample weights [N] or [1, N] of all rows. The class numbers have been looked at.
        """
        if not self._is_active:
            for loss in losses:
                self._pass_by(loss)
            return
        images = images if images.dim() == 2 else images[0]
        rows = order if order.dim() == 1 else order[0]
        of_steps, rates, weight = losses[:, 0], lrs.squeeze(1), _row(weight)
        self._mlp.epoch(images, self._targets(labels), batch_size, rows, rates, of_steps, weight)

    def _targets(self, y: Tensor) -> Tensor:
        """Y without the axis of members."""
        return y[0] if y.dim() > (2 if y.is_floating_point() else 1) else y

    def _look_at(self, y: Tensor) -> None:
        check_labels_of_members(y, self._classes, self._options)

    def _pass_by(self, out: Tensor) -> None:
        """A pass in which the member is not active."""
        out.fill_(nan)
        if self.dropout is not None:
            advance(self.dropout)

    def settings_changed(self) -> None:
        """Take up the rule's settings; those of its ``structure`` are as they were."""
        self._mlp.settings_changed()

    def rates_changed(self) -> None:
        """Take up other learning rates; the other settings are as they were."""
        self._mlp.rates_changed()

    def updated(self) -> None:
        """Take the versions of the parameters for those of this engine's last update."""
        self._mlp.updated()

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each trained parameter, live: optimizer state, and masters of 16 bits."""
        return {name: [t.unsqueeze(0) for t in tensors] for name, tensors in self._mlp.parameter_state().items()}

    def counters(self) -> dict[str, list[float]]:
        """The member's number of updates, if the rule counts; float16's loss scale and good steps."""
        return {name: [number] for name, number in self._mlp.counters().items()}

    def set_counters(self, counters: dict[str, list[float]]) -> None:
        """What ``counters`` returned; call it after ``parameter_state`` was written to."""
        self._mlp.set_counters({name: number for name, (number,) in counters.items()})


class _View:
    """The member's part of a layer, as ``nn.Linear`` has it; it has the parameters' version counters too."""

    def __init__(self, module: Any) -> None:
        self.activation: str = module.activation
        self.weight, self.bias = _part(module.weight), None if module.bias is None else _part(module.bias)
        self.out_features, self.in_features = self.weight.shape

    def parameters(self) -> Iterator[Tensor]:
        """The weight and the bias."""
        yield self.weight
        if self.bias is not None:
            yield self.bias


def _part(parameter: Tensor) -> Tensor:
    return parameter.detach()[0].requires_grad_(parameter.requires_grad)


def _row(weight: Tensor | None) -> Tensor | None:
    return weight[0] if weight is not None and weight.dim() > 1 else weight
