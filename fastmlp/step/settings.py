"""The settings of a step as torch's schedulers see them: a torch.optim.Optimizer whose param_groups drive the step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from .optimizers import Optimizer, optimizer_of

#: Settings of torch's optimizers that no rule has.
_FOREIGN = frozenset({"amsgrad", "capturable", "dampening", "differentiable", "foreach", "fused", "maximize"})


class StepOptimizer(torch.optim.Optimizer):
    """``TrainStep.optimizer``: one param group, whose values the next step takes.

    Schedulers of torch.optim.lr_scheduler take it as they take any optimizer. The values may also be assigned, as in
    ``step.optimizer.param_groups[0]["momentum"] = 0.8``; the names are those of ``TrainStep``. The step itself does the
    updates. What the optimizer keeps per parameter is in ``TrainStep.state_dict``.
    """

    def __init__(self, step: Any, params: Iterable[Tensor], rule: Optimizer, members: int | None = None) -> None:
        self._train_step = weakref.ref(step)
        names = rule.settings
        super().__init__(params, {name: getattr(rule, name) for name in names})
        self._values_of = itemgetter(*names)
        self._members = members
        self._names, self._count = names, len(self.param_groups[0]["params"])
        #: What an update of torch's optimizers would call, and the number of the last handle when nothing was in it.
        self._handles = -1
        self._hooks = (
            self._optimizer_step_pre_hooks,
            self._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )

    def changed(self, rule: Optimizer) -> Optimizer | None:
        """The rule with the group's values, if they are others than those of ``rule``.

        Raises:
            TypeError, ValueError: a value that its name does not allow.
            RuntimeError: there is a hook, which a step would not call, or another group.
        """
        if RemovableHandle.next_id != self._handles or len(self.param_groups) != 1:
            if any(self._hooks) or len(self.param_groups) != 1:
                raise RuntimeError(
                    "step.optimizer has a hook or a second param group, which a TrainStep does not follow; remove it, "
                    "or train with autograd and a torch.optim optimizer"
                )
            self._handles = RemovableHandle.next_id
        group = self.param_groups[0]
        if len(group["params"]) != self._count or not _FOREIGN.isdisjoint(group):
            raise RuntimeError(
                "the param group of step.optimizer has other parameters than the model, or a setting that a TrainStep "
                f"does not have ({', '.join(sorted(_FOREIGN))}); take it back, or train with autograd and torch.optim"
            )
        values = self._values_of(group)
        try:
            if values == tuple(vars(rule).values()):
                return None
        except RuntimeError:  # a tensor of several elements: the check below says what is wrong with it
            pass
        new = optimizer_of(rule.name, dict(zip(self._names, values, strict=True)), self._members)
        if self._members is not None:  # so that a scheduler finds what it can multiply
            group.update({name: getattr(new, name) for name in self._names})
        return None if new == rule else new

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """``TrainStep.update``: apply the gradients of ``TrainStep.gradients``."""
        if closure is not None:
            raise TypeError("step.optimizer takes no closure; call the TrainStep, which computes the loss itself")
        self._step().update()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and forget the gradients that wait for an update."""
        super().zero_grad(set_to_none)
        self._step().forget_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A TrainStep has one group; a further one is a NotImplementedError."""
        if self.param_groups:
            raise NotImplementedError(
                "a TrainStep has one param group; for settings per layer train with autograd and torch.optim"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> NoReturn:
        """A RuntimeError: the state is the step's."""
        raise RuntimeError(
            "step.optimizer keeps no state; save step.state_dict(), and the settings with the program that sets them"
        )

    def load_state_dict(self, state_dict: object) -> NoReturn:
        """A RuntimeError: the state is the step's."""
        raise RuntimeError("step.optimizer keeps no state; load the state of the step with step.load_state_dict(...)")

    def _step(self) -> Any:
        step = self._train_step()
        if step is None:
            raise RuntimeError("the TrainStep of this optimizer is gone; keep the step as long as its optimizer")
        return step

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is the optimizer of the copied step."""
        return getattr, (self._step(), "optimizer")
