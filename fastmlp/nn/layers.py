"""The layers: Linear with its activation as a module, and the list of an MLP's layers.

A tool that finds a ``torch.nn.Linear`` (LoRA, quantization, float8) takes it for an affine map and wraps or replaces
it. So a module that applies an activation is never an ``nn.Linear`` here. ``Linear`` applies its activation itself and
is a module of its own kind. ``Affine`` is an ``nn.Linear`` whose call is the affine map, and the MLP around it applies
the activation. The name of the activation lies in a ``Slot``, which the layer and its place in the MLP share. So the
name remains where a tool puts another module into the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..activations import ACTIVATIONS
from ..base.arguments import check_activation


class Slot:
    """A place of an MLP's list of layers: the name of the activation that follows the module there."""

    def __init__(self, activation: str = "identity") -> None:
        self.activation = activation


class _Activated(nn.Module):
    """What Linear and Affine have in common: ``weight``, ``bias`` and the name of an activation."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: nn.Parameter  # or None; torch's own annotation leaves None out
    _slot: Slot

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        nn.Module.__init__(self)  # the class after this one may be nn.Linear, which would make parameters too
        self._slot = Slot(activation)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values as torch.nn.Linear does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    @property
    def activation(self) -> str:
        """A name of ``fastmlp.activations.LAYER_ACTIVATIONS``; another name takes effect in the next forward pass."""
        return self._slot.activation

    @activation.setter
    def activation(self, name: str) -> None:
        check_activation(name)
        self._slot.activation = name

    def extra_repr(self) -> str:
        """What torch prints, and the activation."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_slot" not in state:  # pickled when the name was an attribute of the layer
            state["_slot"] = Slot(state.pop("activation"))
        super().__setstate__(state)


class Linear(_Activated):
    """torch.nn.Linear followed by an activation, in one kernel: A = f(x W^T + b).

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear, and initialized like it.
        activation: "identity" (default), or another name of ``fastmlp.activations.LAYER_ACTIVATIONS``.

    Input [*, in_features] (uint8 pixels count as x / 255), output [*, out_features]; ``functional.linear_act`` says
    the rest.

    A Linear has the attributes of torch.nn.Linear and is none, whatever its activation: code that replaces an
    nn.Linear by another affine map would drop the activation. Code that initializes each nn.Linear of a model must
    name fastmlp.Linear too. The layers of an MLP are nn.Linear modules.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[*, in_features] to [*, out_features]."""
        return functional.linear_act(input, self.weight, self.bias, self.activation)


class Affine(_Activated, nn.Linear):
    """A layer of an MLP: an nn.Linear, Z = x W^T + b, and the name of the activation that the MLP applies to Z."""

    def forward(self, input: Tensor) -> Tensor:
        """[*, in_features] to [*, out_features], without the activation."""
        return functional.linear_act(input, self.weight, self.bias)


class EnsembleLinear(_Activated):
    """A layer of an MLPEnsemble: Z = x W^T + b of each member, with weight [E, N, K] and bias [E, N] or None.

    A call is the affine map: x [B, K] or [E, B, K] to [E, B, N]. The ensemble applies the activation.
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        nn.Module.__init__(self)
        self._slot = Slot(activation)
        self.members, self.in_features, self.out_features = members, in_features, out_features
        self.weight = nn.Parameter(torch.empty(members, out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(members, out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def reset_member(self, member: int) -> None:
        """Draw new values of one member as torch.nn.Linear does."""
        # nn.Linear's bound of both, which kaiming_uniform_(weight, a=sqrt(5)) computes in these steps.
        deviation = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(self.in_features)
        bound = math.sqrt(3.0) * deviation
        with torch.no_grad():
            self.weight[member].uniform_(-bound, bound)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                self.bias[member].uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """Draw new values of all members, one after the other."""
        for member in range(self.members):
            self.reset_member(member)

    def forward(self, input: Tensor) -> Tensor:
        """[B, K] or [E, B, K] to [E, B, N], without the activation."""
        return functional.mlp(input, [self.weight], [self.bias], ["identity"], self.members)

    def extra_repr(self) -> str:
        """The number of members, and what a Linear prints."""
        return f"members={self.members}, {super().extra_repr()}"


#: Layers whose activation the module around them applies.
_AFFINE = (Affine, EnsembleLinear)


class LayerList(nn.ModuleList):
    """The layers of an MLP: an nn.ModuleList that keeps the activation of each place.

    A ``Linear`` or ``Affine`` brings its own activation to the place where it is put. Any other module takes the
    activation of the place, and in a new place it has none. Insertion and deletion move the activations together with
    the modules.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._slots: list[Slot] = []
        self.extend(modules)

    def slots(self) -> list[Slot]:
        """One for each module, in order, with its activation.

        Raises:
            RuntimeError: somebody changed the number of modules past the methods of the list.
        """
        return [
            module._slot if isinstance(module, _Activated) else slot
            for module, slot in zip(self._modules.values(), self._places(), strict=True)
        ]

    def _places(self) -> list[Slot]:
        """The slots of the places, which a ``Linear`` leaves empty; errors as ``slots``."""
        if len(self._slots) != len(self._modules):
            raise RuntimeError(
                f"layers has {len(self._modules)} modules and {len(self._slots)} activations; expected modules to be "
                "added and deleted with the methods of nn.ModuleList, so that each keeps its activation"
            )
        return self._slots

    def replaced(self, modules: Iterable[nn.Module]) -> LayerList:
        """A list of other modules with the activations of this one.

        Raises:
            RuntimeError: another number of modules, among them some that bring no activation.
        """
        other = LayerList(modules)
        if len(other) == len(self):
            kept = zip(other, other._slots, self._places(), strict=True)
            other._slots = [own if isinstance(module, _Activated) else place for module, own, place in kept]
        elif not all(isinstance(module, _Activated) for module in other):
            raise RuntimeError(
                f"expected {len(self)} modules in place of the {len(self)} layers, got {len(other)}, so their "
                "activations are unknown; add and delete layers with the methods of nn.ModuleList"
            )
        return other

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._keep_slot(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As nn.Module's."""
        super().add_module(name, module)
        self._keep_slot(name, module)

    def _keep_slot(self, name: str, module: nn.Module | None) -> None:
        place = list(self._modules).index(name)
        if place == len(self._slots):
            self._slots.append(Slot())
        if isinstance(module, _Activated):
            # What wraps a Linear later applies the activation inside the Linear, and the place has none beside it.
            self._slots[place] = module._slot if isinstance(module, _AFFINE) else Slot()

    def insert(self, index: int, module: nn.Module) -> None:
        """As nn.ModuleList's."""
        super().insert(index, module)
        self._slots.insert(index, module._slot if isinstance(module, _AFFINE) else Slot())

    def __delitem__(self, index: int | slice) -> None:
        super().__delitem__(index)
        del self._slots[index]

    def __getitem__(self, index: int | slice) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, LayerList):
            found._slots = self._places()[index]  # type: ignore[assignment]
        return found


def activate(z: Tensor, activation: str) -> Tensor:
    """A = f(Z) in new memory, differentiable."""
    return functional.softmax(z) if activation == "softmax" else ACTIVATIONS[activation].new(z)
