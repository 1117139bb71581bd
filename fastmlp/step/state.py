"""The engine of a step, the engine's state by the names of parameters, and how both follow a model that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import functorch_active
from ..base.arguments import check_tensor
from ..base.losses import STEP_LOSSES
from .binding import Binding
from .cpu_native import Again
from .cpu_step import TorchStep
from .groups import Groups
from .loss_options import LossOptions
from .optimizers import Optimizer, only_rates_differ
from .settings import StepOptimizer

if TYPE_CHECKING:
    from .data_parallel import DataParallel
    from .triton_step import TritonStep


class StatefulStep:
    """What ``TrainStep`` does between steps: it follows its model and settings, and saves and loads its state.

    Attributes:
        _engine: runs the steps that `_binding` and `_rules`, one rule per param group, describe.
        _again: repeats the last step, if no method but a step was called since. None: there is no shorter way.
        _is_repeated: whether a batch and all parameters have the properties that they had in that step.
        _parked: optimizer state of parameters that are frozen now, by name.
        _ema_waits: whether the average has still to begin with the parameters.
        _has_gradients, _lost_gradients: whether gradients wait for ``update``, and whether a change has lost them.
    """

    model: Any
    loss: str
    dtype: torch.dtype
    device: torch.device
    backend: str
    optimizer: StepOptimizer
    _engine: Any
    _again: Again | None
    _is_repeated: Callable[..., bool]
    _binding: Binding
    _rules: list[Optimizer]
    _group_of: dict[str, int]
    _options: LossOptions
    _parallel: DataParallel | None
    _on_device: AbstractContextManager[object]
    _cuda_graph: bool
    _parked: dict[str, Tensor]
    _ema_waits: bool
    _has_gradients: bool
    _lost_gradients: bool

    @property
    def rule(self) -> Optimizer:
        """The rule of the first param group."""
        return self._rules[0]

    def state_dict(self) -> dict[str, Tensor]:
        """What a run needs besides the model's own state_dict to go on exactly as if it had not stopped.

        Copies, by name. For each trained parameter NAME: the optimizer's states ("NAME.momentum_buffer" with momentum,
        "NAME.exp_avg" and "NAME.exp_avg_sq" with AdamW), and "NAME.master" in float32 where the parameter has 16 bits.
        Also "step" (updates so far) where the update depends on it, as AdamW's does, and for float16 products
        "loss_scale" and "loss_scale_good_steps"; with ``ema_decay`` "NAME.ema". Only tensors, so that safetensors can
        store them; the same for both backends. A parameter that was trained and is frozen now has its states too.
        """
        self._follow()
        if self._ema_waits:
            self._begin_ema()
        counters = self._engine.counters().items()
        state = {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in counters}
        own = self._parameter_state()
        frozen = self._frozen_state(own)
        parked = {name: tensor for name, tensor in self._parked.items() if name in frozen}
        return state | {name: tensor.clone() for name, tensor in (own | parked).items()}

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The moving average of the parameters, as a state_dict of the model; copies, float32 or wider.

        A frozen parameter has the average of the time before, or itself. To evaluate the average:

            fastmlp.train.evaluate(step.model, (x_test, y_test), parameters=step.ema_state_dict())

        Raises:
            RuntimeError: the step keeps no average.
        """
        self._follow()
        if self.rule.ema_decay is None:
            raise RuntimeError("this TrainStep keeps no average of the parameters; make it with ema_decay=0.999")
        if self._ema_waits:
            self._begin_ema()
        kept = self._parked | self._parameter_state()
        return {
            name: kept.get(f"{name}.ema", parameter).detach().clone()
            for name, parameter in self.model.state_dict().items()
        }

    def _begin_ema(self) -> None:
        """The average becomes the parameters as they are; it waits until an update has followed."""
        state = self._engine.parameter_state()
        with torch.no_grad():
            for average, parameter in zip(state["ema"], state.get("master", self._binding.parameters), strict=True):
                average.copy_(parameter)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take up a state that ``state_dict`` returned; load the model's own first.

        Raises:
            ValueError: names or shapes are not those of this step (another optimizer, another model); nothing has
                changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"expected the dict that state_dict() returned, got {type(state_dict).__name__}")
        self._follow()
        own, counters = self._parameter_state(), self._engine.counters()
        expected, frozen = own.keys() | counters.keys(), self._frozen_state(own)
        missing, unknown = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected - frozen.keys())
        if missing or unknown:
            raise ValueError(
                f"the state does not fit this TrainStep ({self.rule.name}, {self.dtype}): missing "
                f"{', '.join(missing) or 'nothing'}; unexpected {', '.join(unknown) or 'nothing'}"
            )
        values = {name: self._counter(name, state_dict[name]) for name in counters}
        parked = {name: state_dict[name] for name in frozen if name in state_dict}
        for name, shape in ({name: tensor.shape for name, tensor in own.items()} | frozen).items():
            if name not in state_dict:
                continue
            check_tensor(state_dict[name], name)
            if state_dict[name].shape != shape:
                raise ValueError(f"expected {name} of shape {list(shape)}, got {list(state_dict[name].shape)}")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        self._engine.set_counters(values)
        self._parked = {name: tensor.clone() for name, tensor in parked.items()}
        self._ema_waits = False
        self.forget_gradients()

    def _parameter_state(self) -> dict[str, Tensor]:
        """The engine's tensors by name, live."""
        return {
            f"{name}.{kind}": tensor
            for kind, tensors in self._engine.parameter_state().items()
            for name, tensor in zip(self._binding.trained, tensors, strict=True)
        }

    def _frozen_state(self, own: dict[str, Tensor]) -> dict[str, torch.Size]:
        """The shapes of the states that frozen parameters may have, by the names that `_parameter_state` gives."""
        kinds = {name.rpartition(".")[2] for name in own}
        frozen = [(name, p.shape) for name, p in self.model.named_parameters() if name not in self._binding.trained]
        return {f"{name}.{kind}": shape for name, shape in frozen for kind in kinds}

    def _counter(self, name: str, value: Tensor) -> Any:
        """A counter of a state, as ``set_counters`` of the engine takes it."""
        check_tensor(value, name)
        if value.numel() != 1 or not value.isfinite().all():
            raise ValueError(f"expected {name} to be one finite number, got {value}")
        return float(value)

    def forget_gradients(self) -> None:
        """Drop the gradients that wait for ``update``."""
        if self._has_gradients or self._lost_gradients:
            self._has_gradients = self._lost_gradients = False

    def _follow(self) -> None:
        """Take up what changed of the model and the settings since the last call, or raise an error."""
        if functorch_active():
            raise RuntimeError(
                "a TrainStep works in place, which a transform of torch.func (vmap, grad, jvp, functionalize, ...) "
                "cannot follow; call it outside of the transform"
            )
        if self._again is not None:
            self._again = None
        rules, binding = self.optimizer.changed(self._rules), self._binding
        if not binding.holds():
            binding = binding.rebound()
        elif rules is None:
            return
        elif only_rates_differ(rules, self._rules):  # a scheduler may do this at every step
            for rule, new in zip(self._rules, rules, strict=True):
                rule.lr = new.lr
            self._engine.rates_changed()
            return
        structure = self._engine.structure
        if binding.kind != self._binding.kind or (
            rules is not None and list(map(structure, rules)) != list(map(structure, self._rules))
        ):
            with torch.inference_mode(False), torch.no_grad():  # later steps write to what is made here
                self._rebuild(binding, self._rules if rules is None else rules)
        elif rules is not None:
            for rule, new in zip(self._rules, rules, strict=True):
                vars(rule).update(vars(new))
            self._engine.settings_changed()
        self._binding = binding
        self._take_up_dropout(binding)

    def _rebuild(self, binding: Binding, rules: list[Optimizer]) -> None:
        """A new engine, with the state of the old one as far as both have it."""
        state, counters = self._parked | self._parameter_state(), self._engine.counters()
        if self._ema_waits:  # there is no average yet
            state = {name: tensor for name, tensor in state.items() if not name.endswith(".ema")}
        thawed = [name for name in binding.trained if name not in self._binding.trained]
        updates = float(torch.as_tensor(counters.get("step", 0.0), device="cpu").max())
        if thawed and updates and self.rule.corrected:
            raise RuntimeError(
                f"{', '.join(thawed)} cannot be thawed after {updates:.0f} updates: {self.rule.name} counts the "
                "updates of all parameters together; make a new TrainStep"
            )
        engine = self._new_engine(binding, rules)
        self._lost_gradients |= self._has_gradients
        self._engine, self._binding, self._rules, self._has_gradients = engine, binding, rules, False
        if rules[0].ema_decay is not None:
            self._ema_waits = not any(name.endswith(".ema") for name in state)
            self._begin_ema()
        own = self._parameter_state()
        self._parked = {name: tensor for name, tensor in state.items() if name not in own}
        for name, tensor in own.items():
            if name in state:
                tensor.copy_(state[name])
        engine.parameter_state()  # lets the masters follow parameters that were written to while they were frozen
        engine.set_counters(counters)

    def _new_engine(self, binding: Binding, rules: list[Optimizer]) -> Any:
        groups = None if len(rules) == 1 else Groups(rules, [self._group_of[name] for name in binding.trained])
        how = {"layers": binding.layers, "rule": rules[0], "loss": STEP_LOSSES[self.loss], "dtype": self.dtype}
        how |= {"groups": groups, "options": self._options, "parallel": self._parallel}
        with self._on_device:
            return self._kernels_step(**how) if self.backend == "triton" else self._torch_step(**how)

    def _kernels_step(self, **how: Any) -> TritonStep:
        from .triton_step import TritonStep

        return TritonStep(cuda_graph=self._cuda_graph, **how)

    def _torch_step(self, **how: Any) -> Any:
        return TorchStep(**how)

    def _take_up_dropout(self, binding: Binding) -> None:
        """Have the engine drop what the model drops now. Each process of a group has masks of its own."""
        dropout, engine = binding.dropout, self._engine
        if dropout is not None and self._parallel is not None:
            dropout = dropout._replace(stream=self._parallel.rank)
            before = engine.dropout
            if before is not None and before.state is dropout.state and before[1:] == dropout[1:]:
                return
        engine.dropout = dropout
