"""What an engine was built from, and whether the model still is that.

A step works on the model's own tensors and calls none of its modules. So each step first asks whether the modules still
compute what the engine computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from ..base.arguments import check_members, check_network, check_same_device
from ..base.memory import sharing
from ..base.signature import guards
from ..nn import MLPEnsemble
from ..nn.mlp import MLP, _has_hooks, _only_computes
from .cpu_dropout import StepDropout

_FORWARD, _ENSEMBLE_FORWARD = MLP.forward, MLPEnsemble.forward
#: How many handles of hooks this file has made. They are no reason to look for new hooks.
_probes = 0


class Binding:
    """A model as an engine needs it.

    Attributes:
        layers: the model's layers.
        trained: names of the parameters that require a gradient, weight before bias of each layer.
        parameters: the parameters of these names.
        all: every parameter of the layers.
        ends: features of the model's input and output.
        kind: what an engine is built for: the names of the trained parameters, and the activations.
        dropout: what a step drops; None in evaluation mode and without dropout.

    Raises:
        ValueError: the model computes something else than its layers' parameters say, or has nothing to train.
        RuntimeError: parameters of different dtypes, devices or sizes, or not contiguous.
    """

    def __init__(self, model: MLP | MLPEnsemble) -> None:
        self._model, self._attributes, self._class = model, model.__dict__, type(model)
        self._list, self._container = model.layers, model.layers.__dict__
        self.layers = model._linears()
        self._handles = -1
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise RuntimeError(
                "the model was made in torch.inference_mode(), so nothing can train it; make the model outside of it"
            )
        _check_model(model, self._has_hooks())
        named = [
            (f"layers.{i}.{name}", parameter)
            for i, layer in enumerate(self.layers)
            for name in ("weight", "bias")
            if (parameter := layer._parameters[name]) is not None
        ]
        _check_parameters(named)
        check_same_device(named)
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        activations = [layer.activation for layer in self.layers]
        if isinstance(model, MLPEnsemble):
            check_members(weights, biases, activations, model.members)
        else:
            check_network(weights, biases, activations)
        self._rates, self._training = self._attributes.get("_dropout"), model.training
        self._state = model._buffers.get("dropout_state")
        self._has_dropout = bool(self._rates)
        self.dropout = self._dropped(model)
        self.ends = weights[0].shape[-1], weights[-1].shape[-2]
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
        self.trained = [name for name, _ in trained]
        self.parameters = [parameter for _, parameter in trained]
        self.all = [parameter for _, parameter in named]
        self._places = [(layer, name, layer._parameters[name]) for layer in self.layers for name in ("weight", "bias")]
        self._where = {id(parameter): _where(parameter) for parameter in self.all}
        #: Whether the parameters have the dtypes, shapes and strides, and require the gradients, that they had.
        self._are_alike = guards(self.all)
        self._layers = [_facts(layer) for layer in self.layers]
        classes: set[Any] = {self._class, *map(type, self.layers)}
        self._forwards = [(kind, kind.forward) for kind in classes]
        self.kind = self.trained, activations

    def holds(self) -> bool:
        """Whether nothing has changed that a step depends on. False may also be a change that does not matter.

        Each step asks. So plain loops compare objects and addresses, and torch's guards compare everything else.
        """
        return self.is_in_place() and self._are_alike(*self.all)

    def is_in_place(self) -> bool:
        """``holds``, except for the properties of the parameters."""
        # torch numbers the handles of all hooks, so that one number tells whether there can be new ones.
        if RemovableHandle.next_id - _probes != self._handles and self._has_hooks():
            return False
        attributes = self._attributes
        if (
            attributes.get("_dropout") is not self._rates
            or "forward" in attributes
            or type(self._model) is not self._class
            or attributes["_modules"].get("layers") is not self._list
            or [*self._container["_modules"].values()] != self.layers
        ):
            return False
        if self._has_dropout and (
            self._model.training is not self._training or self._model._buffers.get("dropout_state") is not self._state
        ):
            return False
        for module_class, forward in self._forwards:
            if module_class.forward is not forward:
                return False
        try:
            for layer, own, kind, slot, activation, table, weight, place, bias, place_bias in self._layers:
                if (
                    own["_parameters"] is not table
                    or table["weight"] is not weight
                    or table["bias"] is not bias
                    or own["_slot"] is not slot
                    or slot.activation != activation
                    or type(layer) is not kind
                    or "forward" in own
                    or weight.data_ptr() != place
                    or (bias is not None and bias.data_ptr() != place_bias)
                ):
                    return False
        except KeyError:  # a parameter that was taken away
            return False
        return True

    def _dropped(self, model: MLP | MLPEnsemble) -> StepDropout | None:
        if not (self._has_dropout and model.training):
            return None
        state, rates, device = self._state, model._rates(), self.layers[0].weight.device
        if state is None or state.dtype != torch.int64 or state.shape != (2,) or state.device != device:
            got = "nothing" if state is None else f"{state.dtype} {list(state.shape)} on {state.device}"
            raise RuntimeError(
                f"expected the model's dropout_state to be int64 [2] on {device}, got {got}; assign "
                "model.dropout, or load a state_dict that has it"
            )
        return StepDropout(state, rates) if any(rates) else None

    def _has_hooks(self) -> bool:
        """Whether a call of the model, or a gradient of a parameter, would run a hook; the answer no is remembered."""
        parameters = [p for layer in self.layers for p in layer._parameters.values() if p is not None]
        found = (
            bool(_has_any_global_hook())
            or any(map(_has_hooks, (self._model, *self.layers)))
            or any(p._backward_hooks or p._post_accumulate_grad_hooks or _node_has_hooks(p) for p in parameters)
        )
        self._handles = -1 if found else RemovableHandle.next_id - _probes
        return found

    def rebound(self) -> Binding:
        """The binding of the same parameters after a change.

        Raises:
            RuntimeError: the parameters are not those of the model any more, or not where they were.
            ValueError, RuntimeError: as a new binding.
        """
        for layer, name, parameter in self._places:
            moved = parameter is not None and _where(parameter) != self._where[id(parameter)]
            if layer._parameters.get(name) is not parameter or moved:
                raise RuntimeError(
                    f"a {name} of the model was replaced or moved after the TrainStep was made (by model.to(...), by "
                    "a parametrization, or by assigning a parameter or its .data), so a step would train what the "
                    "model no longer has; make a new TrainStep"
                )
        if self._model._linears() != self.layers:
            raise RuntimeError(
                "the layers of the model are others than when the TrainStep was made, so a step would train what the "
                "model no longer has; make a new TrainStep"
            )
        return Binding(self._model)


def _node_has_hooks(parameter: Tensor) -> bool:
    """Whether the node of the tape that accumulates the parameter's gradient has hooks.

    A node does not tell its hooks. But the handle of a new hook leads to the table of all of them.
    """
    global _probes
    if not parameter.requires_grad:
        return False
    with torch.inference_mode(False):
        node: Any = get_gradient_edge(parameter).node
    for register in (node.register_hook, node.register_prehook):
        handle: RemovableHandle = register(_nothing)
        _probes += 1
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return True
    return False


def _where(parameter: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    """Where a parameter is, and what it is there."""
    return parameter.data_ptr(), parameter.shape, parameter.dtype


def _facts(layer: Any) -> tuple[Any, ...]:
    """A layer, its parameters, where they are, and whatever else of the layer a step depends on."""
    weight, bias, slot = layer.weight, layer.bias, layer._slot
    places = weight, weight.data_ptr(), bias, None if bias is None else bias.data_ptr()
    return layer, layer.__dict__, type(layer), slot, slot.activation, layer._parameters, *places


def _nothing(*gradients: Any) -> None:
    """A hook that does nothing."""


def _own_forward(model: MLP | MLPEnsemble) -> object:
    """The forward that an engine computes."""
    return _ENSEMBLE_FORWARD if isinstance(model, MLPEnsemble) else _FORWARD


def _check_model(model: MLP | MLPEnsemble, has_hooks: bool) -> None:
    """ValueError for a model whose call does more, or something else, than its layers' formula."""
    own_call = type(model).__call__ is not nn.Module.__call__
    if own_call or type(model).forward is not _own_forward(model) or "forward" in model.__dict__:
        name = "__call__" if own_call else "forward"
        raise ValueError(
            f"{type(model).__name__} has a {name} of its own, which a TrainStep would not call; train the model with "
            "autograd"
        )
    for i, layer in enumerate(model._linears()):
        if not _only_computes(layer) or not {"weight", "bias"} <= layer._parameters.keys():
            raise ValueError(
                f"layers.{i} has hooks, another class than an MLP's layers, a parametrization or a forward of its own, "
                "which a TrainStep would not call; remove them, or train with autograd"
            )
        if layer.activation == "softmax":
            raise ValueError(
                f"layers.{i} has softmax as its activation, which a TrainStep does not compute; use the loss "
                "'cross_entropy' or 'softmax_squared_error' on logits, or train with autograd"
            )
    if has_hooks:
        raise ValueError(
            "the model, one of its parameters, or every module of the process has a hook, which a TrainStep would not "
            "call; remove the hook, or train with autograd"
        )


def _check_parameters(named: Sequence[tuple[str, Tensor]]) -> None:
    """ValueError or RuntimeError for parameters that cannot be updated in place, each on its own."""
    both = sharing(named)
    if both is not None:
        raise ValueError(
            f"{both[0]} and {both[1]} are one parameter or lie in the same memory, which a TrainStep would update "
            "twice; train shared parameters with autograd"
        )
    first = named[0][1]
    for name, parameter in named:
        if parameter.is_neg():
            raise RuntimeError(
                f"the memory of {name} holds the negatives of its values, which a TrainStep would read as they are; "
                "assign param.data = param.data.resolve_neg()"
            )
        if not parameter.is_contiguous():
            raise RuntimeError(
                f"TrainStep updates parameters in place and needs them contiguous, got strides "
                f"{parameter.stride()}; assign param.data = param.data.contiguous()"
            )
        if parameter.dtype != first.dtype:
            raise RuntimeError(
                f"expected parameters of one dtype, got {name} in {parameter.dtype} and layers.0.weight in "
                f"{first.dtype}; convert the model with model.to(dtype)"
            )
