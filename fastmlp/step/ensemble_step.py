"""EnsembleStep: what ``TrainStep(ensemble)`` is, a step of all members of an MLPEnsemble at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.arguments import check_tensor
from ..nn import MLPEnsemble
from .cpu_ensemble import TorchEnsemble
from .cpu_one_member import OneMember
from .train_step import TrainStep
from .validation import MemberBatches, member_learning_rates
from .values import check_setting


class EnsembleStep(TrainStep):
    """``TrainStep`` of an ``MLPEnsemble`` of E members; ``TrainStep(ensemble, ...)`` makes one.

    Each member is trained exactly as the same MLP would be alone, up to rounding: with a loss, a gradient norm, a loss
    scale and a number of updates of its own. Arguments, methods and errors are those of ``TrainStep``, except these:

    - ``lr``, ``momentum`` and ``weight_decay`` are a number, or one per member. ``step.lr`` returns a float where all
      members have the same, else a tuple, which ``*``, ``/``, ``+`` and ``-`` take elementwise. So those schedulers of
      torch work that compute a rate from the present or the initial one by such operations (StepLR, ExponentialLR,
      LambdaLR, LinearLR, CosineAnnealingLR, ...). ReduceLROnPlateau with several rates raises TypeError, and
      OneCycleLR and CyclicLR set one rate for all members.
    - x is [B, K], the same for all members, or [E, B, K]; y likewise [B] or [E, B] (values and probabilities: [B, C]
      or [E, B, C]). Images have to be flattened.
    - Sample weights are [B] or [E, B]; the options of the loss are the same for all members. To ignore rows labelled
      -100, pass ``ignore_index=-100``; without it, or another option of cross-entropy, -100 is no class.
    - ``epoch`` takes x [N, K] or [E, N, K], y [N] or [E, N] (values: [N, C] or [E, N, C]), sample_weight [N] or [E, N],
      order [n] or [E, n], and lr_factors [steps] or [steps, E].
    - With a ``process_group``, ``active`` is to be the same in all processes.
    - A step and an epoch return losses [E], and ``losses`` of an epoch is [steps, E].

    Attributes:
        active: bool [E], on the model's device. ``step.active[3] = False`` or ``step.active = mask`` stops members.
            They stay as they are bit for bit, with their optimizer state, and cost next to nothing. Their losses are
            NaN and their gradients 0. A member that goes on later continues where it stopped.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, MLPEnsemble):
            raise TypeError(f"EnsembleStep trains a fastmlp.MLPEnsemble, got {type(model).__name__}; use TrainStep")
        self._members: int = model.members
        device = next(model.parameters()).device
        self._active = torch.ones(self._members, dtype=torch.bool, device=device)
        super().__init__(model, *args, **kwargs)
        assert isinstance(self._batches, MemberBatches)
        self._batches.members = self._members
        # Every member's class numbers are looked at before any member changes; on a CPU the engine does that.
        self.losses = self.losses.new_zeros((0, self._members))

    def _kernels_step(self, **how: Any) -> Any:
        return super()._kernels_step(members=self._members, active=self._active, **how)

    def _torch_step(self, **how: Any) -> Any:
        return (OneMember if self._members == 1 else TorchEnsemble)(active=self._active, **how)

    @property
    def active(self) -> Tensor:
        """Which members a step trains; see the class."""
        return self._active

    @active.setter
    def active(self, mask: Any) -> None:
        if not isinstance(mask, Tensor):
            mask = torch.as_tensor(mask, device="cpu")
        if mask.dtype != torch.bool or mask.shape not in ((), self._active.shape):
            raise ValueError(
                f"expected active to be bool [{self._members}], one for each member, got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        self._active.copy_(mask)

    @property
    def lr(self) -> Any:
        """Learning rate of the next step: a float, or one per member; a list where param groups have different ones."""
        rates = [check_setting("lr", group["lr"], self._members) for group in self.optimizer.param_groups]
        return rates[0] if len(set(rates)) == 1 else rates

    @lr.setter
    def lr(self, value: Any) -> None:
        rate = check_setting("lr", value, self._members)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def __reduce__(self) -> tuple[Any, ...]:
        """As ``TrainStep``'s."""
        return *super().__reduce__(), self._active.clone()

    def __setstate__(self, state: Tensor) -> None:
        self._active.copy_(state)

    def _learning_rates(self, factors: Any, steps: int) -> Tensor:
        rates = [member_learning_rates(rule.lr, factors, steps, self._members) for rule in self._rules]
        return rates[0] if len(rates) == 1 else torch.stack(rates, -1)

    def state_dict(self) -> dict[str, Tensor]:
        """As ``TrainStep``'s: states [E, ...] by the names of the parameters, and counters float64 [E].

        Also "active", bool [E].
        """
        return super().state_dict() | {"active": self._active.clone()}

    def load_state_dict(self, state_dict: Any) -> None:
        """As ``TrainStep``'s."""
        if not isinstance(state_dict, Mapping) or "active" not in state_dict:
            return super().load_state_dict(state_dict)  # says what is missing
        check_tensor(state_dict["active"], "active")
        if state_dict["active"].shape != self._active.shape:
            raise ValueError(f"expected active of shape [{self._members}], got {list(state_dict['active'].shape)}")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "active"})
        self._active.copy_(state_dict["active"])

    def _counter(self, name: str, value: Tensor) -> Sequence[float]:
        check_tensor(value, name)
        if value.shape != (self._members,):
            raise ValueError(f"expected {name} of shape [{self._members}], got {list(value.shape)}")
        numbers: list[float] = value.tolist()
        return numbers


TrainStep._of_ensemble = EnsembleStep
