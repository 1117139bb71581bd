"""The settings of a step as torch's schedulers see them: a torch.optim.Optimizer whose param_groups drive the step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle

from .groups import check_alike
from .optimizers import Optimizer, optimizer_of
from .values import check_setting

#: Settings of torch's optimizers that no rule has, or not every rule.
_FOREIGN = frozenset(
    ["amsgrad", "capturable", "centered", "dampening", "decoupled_weight_decay", "differentiable", "foreach", "fused"]
)


class StepOptimizer(torch.optim.Optimizer):
    """``TrainStep.optimizer``: param groups, whose values the next step takes.

    Schedulers of torch.optim.lr_scheduler take it as they take any optimizer. The values may also be assigned, as in
    ``step.optimizer.param_groups[0]["momentum"] = 0.8``; the names are those of ``TrainStep``. The step itself does the
    updates. What the optimizer keeps per parameter is in ``TrainStep.state_dict``.
    """

    def __init__(self, step: Any, groups: list[dict[str, Any]], rule: Optimizer, members: int | None = None) -> None:
        self._train_step = weakref.ref(step)
        names = rule.settings
        self._complete = False
        super().__init__(groups, {name: getattr(rule, name) for name in names})
        self._complete = True
        self._values_of = itemgetter(*names)
        self._members = members
        self._names, self._counts = names, [len(group["params"]) for group in self.param_groups]
        self._foreign = _FOREIGN.difference(names)
        #: The number that torch gives to the next handle of a hook, as it was when there were no hooks in ``_hooks``.
        self._handles = -1
        #: A copy of the groups from the last time that their values were those of the rules.
        self._taken: list[dict[str, Any]] = []
        #: The hooks that an update of torch's optimizers would call.
        self._hooks = (
            self._optimizer_step_pre_hooks,
            self._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )

    def rules_of_groups(self, rule: Optimizer) -> list[Optimizer]:
        """One rule per group, with the group's values."""
        return [self._with(rule, self._values_of(group)) for group in self.param_groups]

    def is_unchanged(self) -> bool:
        """Whether the groups are as ``changed`` found them when it last returned None, and there are no new hooks."""
        try:
            return RemovableHandle.next_id == self._handles and self.param_groups == self._taken
        except Exception:  # a value that cannot be compared, such as a tensor of several elements
            return False

    def changed(self, rules: list[Optimizer]) -> list[Optimizer] | None:
        """The rules with the groups' values, if they are others than those of ``rules``.

        Raises:
            TypeError, ValueError: a value that its name does not allow, or that must be the same in all groups.
            RuntimeError: there is a hook, which a step would not call, or another group.
        """
        if self.is_unchanged():
            return None
        groups = self.param_groups
        if RemovableHandle.next_id != self._handles or len(groups) != len(rules):
            if any(self._hooks) or len(groups) != len(rules):
                raise RuntimeError(
                    "step.optimizer has a hook or another param group, which a TrainStep does not follow; remove it, "
                    "or train with autograd and a torch.optim optimizer"
                )
            self._handles = RemovableHandle.next_id
        self._taken = []
        every = [self._changed(*of) for of in zip(groups, rules, self._counts, strict=True)]
        if not any(every):
            self._taken = [
                {**group, **vars(rule), "params": list(group["params"])}
                for group, rule in zip(groups, rules, strict=True)
            ]
            return None
        new_rules = [rule if new is None else new for new, rule in zip(every, rules, strict=True)]
        if len(new_rules) > 1:
            check_alike(new_rules)
        return new_rules

    def _changed(self, group: dict[str, Any], rule: Optimizer, count: int) -> Optimizer | None:
        """The rule with the group's values, if they are others than those of ``rule``."""
        if len(group["params"]) != count or not self._foreign.isdisjoint(group):
            raise RuntimeError(
                "the param group of step.optimizer has other parameters than the model, or a setting that a TrainStep "
                f"does not have ({', '.join(sorted(self._foreign))}); take it back, or train with autograd and "
                "torch.optim"
            )
        values, before = self._values_of(group), tuple(vars(rule).values())
        only_rate = False
        try:
            if values == before:
                return None
            only_rate = values[1:] == before[1:]  # the first one is the learning rate
        except RuntimeError:  # a tensor of several elements: the check below says what is wrong with it
            pass
        if only_rate:  # a scheduler may change it at every step
            new = rule.with_rate(check_setting("lr", values[0], self._members))
            same = new.lr == rule.lr
        else:
            new = self._with(rule, values)
            same = new == rule
        if self._members is not None:  # so that a scheduler finds what it can multiply
            group.update({name: getattr(new, name) for name in self._names})
        return None if same else new

    def _with(self, rule: Optimizer, values: tuple[Any, ...]) -> Optimizer:
        return optimizer_of(rule.name, dict(zip(self._names, values, strict=True)), self._members)

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
        """A TrainStep has the groups that it was made with; a further one is a NotImplementedError."""
        if self._complete:
            raise NotImplementedError(
                "a TrainStep keeps its param groups; pass all of them as TrainStep(model, ..., param_groups=[...])"
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
