"""Modules: Linear with its activation, MLP, and conversion from and to plain torch modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .activations import ACTIVATIONS, LEAKY_SLOPE
from .base.arguments import check_activation, check_batch

__all__ = ["MLP", "Linear"]

#: torch's modules by the name of the activation, with the attributes that tell their variants apart.
_TORCH_MODULES = {name: f.module for name, f in ACTIVATIONS.items() if f.module is not None}


class Linear(nn.Linear):
    """torch.nn.Linear followed by an activation, in one kernel: A = f(x W^T + b).

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear, and initialized like it.
        activation: "identity" (default), or another name of ``fastmlp.activations.LAYER_ACTIVATIONS``.

    Input [*, in_features] (uint8 pixels count as x / 255), output [*, out_features]; ``functional.linear_act`` says
    the rest.
    """

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
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """[*, in_features] to [*, out_features]."""
        return functional.linear_act(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """What torch prints, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


class MLP(nn.Module):
    """Multilayer perceptron: Linear layers with an activation after each but the last.

    Args:
        sizes: number of features of the input, of every hidden layer and of the output: at least two positive ints,
            e.g. ``(784, 512, 512, 10)``.
        activation: one name for all hidden layers, or a sequence with a name per hidden layer, or with a name per layer
            including the last. Default "sigmoid".
        bias: whether the layers have biases.
        device, dtype: of the parameters; default torch's.

    ``layers`` is an nn.ModuleList of ``Linear``, so state_dict has ``layers.{i}.weight`` [out, in] and
    ``layers.{i}.bias`` [out]. Input is [B, sizes[0]] or [B, ...] flattened from dimension 1, of the parameters' dtype
    or uint8 (pixels, scaled by 1/255 in the first kernel); output [B, sizes[-1]].

    The forward pass is one node of the tape, so the hidden layers' gradients never leave the backward kernels. The
    layers are called one by one, each still fused, where one of ``layers`` (or all modules) has a hook, and where one
    was replaced by another module or has another ``forward``.

    Raises:
        TypeError: sizes that are no sequence of ints (a bool is none).
        ValueError: fewer than two sizes or one below 1, unknown activations, a wrong number of them.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Sequence[str] = "sigmoid",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes = _checked_sizes(sizes)
        activations = _per_layer(activation, len(self.sizes) - 1)
        self.layers = nn.ModuleList(
            Linear(n_in, n_out, bias, f, device, dtype)
            for n_in, n_out, f in zip(self.sizes[:-1], self.sizes[1:], activations, strict=True)
        )

    @property
    def activations(self) -> tuple[str, ...]:
        """The activation of each layer, the last one included."""
        return tuple(layer.activation for layer in self._linears())

    def _linears(self) -> list[Linear]:
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, sizes[0]] (or [B, ...]) to [B, sizes[-1]]."""
        layers = self._linears()
        if _has_any_global_hook() or not all(map(_only_computes, layers)):
            check_batch(x, self.sizes[0])
            x = x.flatten(1) if x.dim() > 2 else x
            for layer in layers:
                x = layer(x)
            return x
        weights = [_parameter(layer, "weight") for layer in layers]
        biases = [_parameter(layer, "bias") for layer in layers]
        return functional.mlp(x, weights, biases, [layer.activation for layer in layers])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The sizes; the layers print themselves."""
        return f"sizes={self.sizes}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, because TorchScript cannot read ``forward``."""
        return self.to_torch()

    @classmethod
    def from_torch(cls, module: nn.Module) -> MLP:
        """The MLP that a torch module of nn.Linear layers and activations computes; it shares the parameters.

        Accepts an nn.Sequential (nested ones too) or a module whose children, in order, form one: an optional
        nn.Flatten, then nn.Linear layers, each followed by at most one activation: nn.Softmax(-1), or the module of an
        activation in ``fastmlp.activations``, with the same settings. An optimizer that was made for the module goes
        on working, because the parameters are shared.

        Raises:
            TypeError: a child that an MLP has no place for, or one whose weight is computed by a parametrization.
            ValueError: children in an order that is not an MLP's, or with hooks.
        """
        linears: list[nn.Linear] = []
        activations: list[str] = []
        for child in _leaves(module):
            if _has_hooks(child):
                raise ValueError(f"{child} has hooks (weight_norm and pruning add such), which an MLP would not call")
            if isinstance(child, nn.Flatten):
                if linears or child.start_dim != 1 or child.end_dim != -1:
                    raise ValueError(
                        f"{child} after {len(linears)} linear layers: nn.Flatten is accepted only before the first "
                        "layer and with start_dim=1, end_dim=-1"
                    )
            elif type(child).forward in (nn.Linear.forward, Linear.forward):
                assert isinstance(child, nn.Linear)
                if not isinstance(child.weight, nn.Parameter):
                    raise TypeError(f"the weight of {child} is computed, not a parameter; remove its parametrization")
                linears.append(child)
                activations.append(child.activation if isinstance(child, Linear) else "identity")
            else:
                name = _activation_name(child)
                if not linears or (activations[-1] != "identity" and name != "identity"):
                    raise ValueError(f"{child} does not follow a linear layer; remove it or compose two modules")
                activations[-1] = activations[-1] if name == "identity" else name
        if not linears:
            raise ValueError(f"found no nn.Linear in {type(module).__name__}")
        sizes = [linears[0].in_features]
        for layer in linears:
            if layer.in_features != sizes[-1]:
                raise ValueError(f"{layer} follows a layer with {sizes[-1]} outputs; expected in_features={sizes[-1]}")
            sizes.append(layer.out_features)
        model = cls(sizes, activations, device="meta")
        for ours, theirs in zip(model._linears(), linears, strict=True):
            ours.weight, ours.bias = theirs.weight, theirs.bias
        return model

    def to_torch(self) -> nn.Sequential:
        """An nn.Sequential of nn.Flatten, nn.Linear and activation modules; it shares the parameters.

        Raises:
            ValueError: the activation "step", for which torch has no module.
        """
        modules: list[nn.Module] = [nn.Flatten()]
        for layer in self._linears():
            k, n, bias = layer.in_features, layer.out_features, layer.bias is not None
            plain = nn.Linear(k, n, bias, "meta", layer.weight.dtype)
            plain.weight, plain.bias = layer.weight, layer.bias
            modules.append(plain)
            if layer.activation == "softmax":
                modules.append(nn.Softmax(-1))
            elif layer.activation not in _TORCH_MODULES:
                raise ValueError(f"torch has no module for the activation {layer.activation!r}")
            elif layer.activation != "identity":
                kind, settings = _TORCH_MODULES[layer.activation]
                modules.append(kind(**settings))
        return nn.Sequential(*modules)


def _checked_sizes(sizes: object) -> tuple[int, ...]:
    expected = "expected sizes to be at least two positive ints such as (784, 512, 512, 10)"
    if not isinstance(sizes, Iterable):
        raise TypeError(f"{expected}, got {sizes!r} of type {type(sizes).__name__}; give a sequence")
    checked = []
    for n in sizes:
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise TypeError(f"{expected}, got {sizes!r}, in which {n!r} is of type {type(n).__name__}")
        checked.append(operator.index(n))
    if len(checked) < 2 or min(checked) < 1:
        raise ValueError(f"{expected}, got {sizes!r}")
    return tuple(checked)


def _per_layer(activation: str | Sequence[str], layers: int) -> tuple[str, ...]:
    """One activation per layer; a single name, or one name per hidden layer, leaves the last layer without."""
    if isinstance(activation, str):
        check_activation(activation)
        return (*[activation] * (layers - 1), "identity")
    names = tuple(activation) if isinstance(activation, Iterable) else (activation,)
    for name in names:
        check_activation(name)
    if len(names) == layers:
        return names
    if len(names) == layers - 1:
        return (*names, "identity")
    raise ValueError(
        f"expected {layers - 1} activations (one a hidden layer) or {layers} (one a layer), got {len(names)}: {names}"
    )


def _only_computes(layer: nn.Module) -> bool:
    """True if calling ``layer`` does nothing but ``Linear.forward``: no hook, no other class, no patched forward."""
    return type(layer).forward is Linear.forward and not _has_hooks(layer) and "forward" not in layer.__dict__


def _parameter(layer: nn.Module, name: str) -> Tensor | None:
    """``layer.weight`` or ``layer.bias``, without the slow look-up of a module's attributes."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _leaves(module: nn.Module) -> list[nn.Module]:
    # Not children(), which leaves out a module's second appearance, such as one nn.ReLU used after every layer.
    children = [child for child in module._modules.values() if child is not None]
    if not children or isinstance(module, nn.Linear):
        return [module]
    return [leaf for child in children for leaf in _leaves(child)]


def _activation_name(module: nn.Module) -> str:
    if type(module) is nn.Softmax and module.dim in (1, -1):
        return "softmax"
    for name, (kind, settings) in _TORCH_MODULES.items():
        if type(module) is kind and all(getattr(module, key) == value for key, value in settings.items()):
            return name
    raise TypeError(
        f"an MLP has no place for {module}; expected nn.Linear, nn.Flatten or one of "
        f"{', '.join(kind.__name__ for kind, _ in _TORCH_MODULES.values())}, Softmax "
        f"(LeakyReLU with slope {LEAKY_SLOPE}, exact GELU, Softmax over the features)"
    )
