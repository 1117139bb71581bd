"""Modules: MLP, and its conversion from and to plain torch modules; ``fastmlp.nn.layers`` has the layers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional, reference
from ..activations import ACTIVATIONS, LEAKY_SLOPE
from ..base.arguments import check_activation, check_batch
from ..base.dropout import checked_rates
from ..functional import Drops, begin_dropout
from ..ops.dropout import dropped
from .layers import Affine, EnsembleLinear, LayerList, Linear, activate

__all__ = ["MLP"]

#: torch's modules by the name of the activation, with the attributes that tell their variants apart.
_TORCH_MODULES = {name: f.module for name, f in ACTIVATIONS.items() if f.module is not None}


class Network(nn.Module):
    """What an MLP and an MLPEnsemble have in common: ``layers``, the activation of each place, and dropout."""

    sizes: tuple[int, ...]
    layers: LayerList
    #: int64 [2] on the model's device, the seed and the number of training passes; there if something is dropped.
    dropout_state: Tensor
    _dropout: float | tuple[float, ...] = 0.0

    @property
    def dropout(self) -> float | tuple[float, ...]:
        """The probability of an element of a hidden layer's output to be dropped, or one for each hidden layer.

        Another value takes effect in the next training pass. The first value above 0 draws the seed of the masks from
        torch's default generator.
        """
        return self._dropout

    @dropout.setter
    def dropout(self, value: float | Sequence[float]) -> None:
        rates = checked_rates(value, len(self.layers) - 1)
        drops = any(rates) if isinstance(rates, tuple) else rates > 0 and len(self.layers) > 1
        self._dropout = rates if drops else 0.0
        if not drops:
            self._buffers.pop("dropout_state", None)
        elif "dropout_state" not in self._buffers:
            seed = torch.randint((1 << 63) - 1, (1,), dtype=torch.int64, device="cpu")
            device = next((t.device for t in self.parameters()), "cpu")
            self.register_buffer("dropout_state", torch.cat([seed, torch.zeros_like(seed)]).to(device))

    @property
    def activations(self) -> tuple[str, ...]:
        """The activation of each layer, the last one included."""
        return tuple(slot.activation for slot in self.layers.slots())

    def _linears(self) -> list[Linear]:
        """The layers, which have a weight, a bias and an activation unless somebody replaced them."""
        return list(self._modules["layers"]._modules.values())  # type: ignore[union-attr, arg-type]

    def _in_turn(self, x: Tensor) -> Tensor:
        """A call of each layer, followed by its activation and by dropout."""
        drops: Drops | None = None
        if self._dropout and self.training:
            drops = begin_dropout(self._dropout, self.dropout_state, len(self.layers) - 1, x)
        for i, (layer, slot) in enumerate(zip(self.layers, self.layers.slots(), strict=True)):
            if i == 0 and x.dtype == torch.uint8:  # no other module knows what the pixels mean
                x = reference.pixels(x, _floating_dtype(layer))
            x = layer(x)
            if not isinstance(layer, Linear):
                x = activate(x, slot.activation)
            if drops is not None and (own := drops[i]) is not None:
                x = dropped(x, own)
        return x

    def _rates(self) -> tuple[float, ...]:
        """The dropout of each hidden layer; ValueError where layers were added or deleted since it was given."""
        hidden = len(self.layers) - 1
        rates = checked_rates(self._dropout, hidden)
        return rates if isinstance(rates, tuple) else (rates,) * hidden

    def _repr_of_dropout(self) -> str:
        return f", dropout={self.dropout}" if self.dropout else ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "layers" and isinstance(value, (nn.ModuleList, nn.Sequential)) and not isinstance(value, LayerList):
            old = self._modules.get(name)
            value = old.replaced(value) if isinstance(old, LayerList) else LayerList(value)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.layers = self.layers  # an nn.ModuleList where it was pickled by an earlier version


class MLP(Network):
    """Multilayer perceptron: linear layers with an activation after each but the last.

    Args:
        sizes: number of features of the input, of every hidden layer and of the output: at least two positive ints,
            e.g. ``(784, 512, 512, 10)``.
        activation: one name for all hidden layers, or a sequence with a name per hidden layer, or with a name per layer
            including the last. Default "sigmoid".
        bias: whether the layers have biases.
        device, dtype: of the parameters; default torch's.
        dropout: the probability p, at least 0 and below 1, of an element of a hidden layer's output to be dropped, or a
            sequence with one for each hidden layer. Default 0. In training mode A becomes keep * A / (1 - p) after the
            activation, in evaluation mode (``model.eval()``) nothing is dropped. Masks have numbers of 16 bits, so the
            share that is dropped is p rounded to a multiple of 1/65,536 above 0.

    The parameters start as those of nn.Linear. `fastmlp.train.initial.initialize_` gives them values that suit the
    activation. With nn.Linear's, sigmoid layers hardly tell one input from another at first.

    ``layers`` is an nn.ModuleList of nn.Linear modules, so state_dict has ``layers.{i}.weight`` [out, in] and
    ``layers.{i}.bias`` [out]. Input is [B, sizes[0]] or [B, ...] flattened from dimension 1, of the parameters' dtype
    or uint8 (pixels, scaled by 1/255 in the first kernel); output [B, sizes[-1]].

    A layer called by itself is the affine map x W^T + b. Its activation belongs to the place in ``layers``, and
    ``layers[i].activation = "tanh"`` changes it. So a tool may wrap or replace a layer by what it makes of an
    nn.Linear (LoRA, quantization), and the MLP goes on applying the activation after it. A ``fastmlp.Linear`` put into
    ``layers`` brings its own activation in place of the other.

    The forward pass is one node of the tape, so the hidden layers' gradients never leave the backward kernels. The
    layers are called one by one, each followed by its activation, where one of ``layers`` (or all modules) has a hook,
    and where one was replaced by another module or has another ``forward``.

    With dropout the model has a buffer ``dropout_state``, int64 [2]: a seed from torch's default generator, and the
    number of training passes so far. Each pass computes its masks from the two (``fastmlp.reference.keep_mask``), so
    ``torch.manual_seed`` before the construction and a saved state_dict give the same masks again, on every backend and
    in a TrainStep. A mask is a function of the place in the batch: processes of DistributedDataParallel, whose buffers
    are those of the first process, share their masks. ``model.dropout`` may be assigned. Dropout inside a transform of
    torch.func or torch.utils.checkpoint is a RuntimeError.

    Raises:
        TypeError: sizes that are no sequence of ints (a bool is none), dropout that is no number.
        ValueError: fewer than two sizes or one below 1, unknown activations, a wrong number of them, or of dropout
            probabilities, or a probability below 0 or from 1 on.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Sequence[str] = "sigmoid",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dropout: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        self.sizes = _checked_sizes(sizes)
        activations = _per_layer(activation, len(self.sizes) - 1)
        self.layers = LayerList(
            Affine(n_in, n_out, bias, f, device, dtype)
            for n_in, n_out, f in zip(self.sizes[:-1], self.sizes[1:], activations, strict=True)
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B, sizes[0]] (or [B, ...]) to [B, sizes[-1]]."""
        parts = None if _has_any_global_hook() else _read(self._linears())
        if parts is None:
            return self._one_by_one(x)
        weights, biases, activations = parts
        if self._dropout and self.training:
            return functional.mlp(x, weights, biases, activations, None, self._dropout, self.dropout_state)
        return functional.mlp(x, weights, biases, activations)

    def _one_by_one(self, x: Tensor) -> Tensor:
        check_batch(x, self.sizes[0])
        return self._in_turn(x.flatten(1) if x.dim() > 2 else x)

    def extra_repr(self) -> str:
        """The sizes; the layers print themselves."""
        return f"sizes={self.sizes}{self._repr_of_dropout()}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles, because TorchScript cannot read ``forward``."""
        return self.to_torch()

    @classmethod
    def from_torch(cls, module: nn.Module) -> MLP:
        """The MLP that a torch module of nn.Linear layers and activations computes; it shares the parameters.

        Accepts an nn.Sequential (nested ones too) or a module whose children, in order, form one: an optional
        nn.Flatten, then nn.Linear layers, each followed by at most one activation: nn.Softmax(-1), or the module of an
        activation in ``fastmlp.activations``, with the same settings. An nn.Dropout may follow the activation of a
        hidden layer; its masks become those of an MLP, with a new seed. An optimizer that was made for the module goes
        on working, because the parameters are shared. The MLP is in training mode if the module is.

        Raises:
            TypeError: a child that an MLP has no place for, or one whose weight is computed by a parametrization; a
                wrapper of torch.nn.parallel or torch.distributed, whose communication an MLP would not do.
            ValueError: children in an order that is not an MLP's, or with hooks.
        """
        linears: list[nn.Linear] = []
        activations: list[str] = []
        rates: list[float | None] = []
        for child, activation in _leaves(module):
            if isinstance(child, nn.Flatten):
                if linears or child.start_dim != 1 or child.end_dim != -1:
                    raise ValueError(
                        f"{child} after {len(linears)} linear layers: nn.Flatten is accepted only before the first "
                        "layer and with start_dim=1, end_dim=-1"
                    )
            elif _is_linear(child):
                if not isinstance(child.weight, nn.Parameter):
                    raise TypeError(f"the weight of {child} is computed, not a parameter; remove its parametrization")
                linears.append(child)  # type: ignore[arg-type]
                activations.append(activation)
                rates.append(None)
            elif type(child) is nn.Dropout:
                if child.p and (not rates or rates[-1] is not None):
                    where = "before the first layer" if not rates else "after another one"
                    raise ValueError(
                        f"{child} {where}: an MLP drops the outputs of hidden layers, each once; remove it"
                    )
                if child.p:
                    rates[-1] = child.p
            else:
                name = _activation_name(child)
                if not linears or (activations[-1] != "identity" and name != "identity"):
                    raise ValueError(f"{child} does not follow a linear layer; remove it or compose two modules")
                if rates[-1] is not None and name != "identity":
                    raise ValueError(f"{child} follows a Dropout, which an MLP applies after the activation; swap them")
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
        if rates[-1] is not None:
            raise ValueError(f"Dropout of {rates[-1]} after the last layer: an MLP drops the outputs of hidden layers")
        model.dropout = [rate or 0.0 for rate in rates[:-1]]
        return model.train(module.training)

    def to_torch(self) -> nn.Sequential:
        """An nn.Sequential of nn.Flatten, nn.Linear, activation modules and nn.Dropout; it shares the parameters.

        The masks of nn.Dropout are those of torch's generator. A layer that somebody replaced, hooked or parametrized
        is itself in the nn.Sequential, which is in training mode if the MLP is.

        Raises:
            ValueError: the activation "step", for which torch has no module.
        """
        modules: list[nn.Module] = [nn.Flatten()]
        rates = (*self._rates(), 0.0)
        for layer, activation, p in zip(self._linears(), self.activations, rates, strict=True):
            own = _only_computes(layer) and isinstance(layer.weight, nn.Parameter)
            if own:
                k, n, bias = layer.in_features, layer.out_features, layer.bias is not None
                plain = nn.Linear(k, n, bias, "meta", layer.weight.dtype)
                plain.weight, plain.bias = layer.weight, layer.bias
                modules.append(plain)
            else:
                modules.append(layer)
            if own or not isinstance(layer, Linear):  # a Linear applies its activation itself
                modules += _torch_activation(activation)
            if p:
                modules.append(nn.Dropout(p))
        return nn.Sequential(*modules).train(self.training)


def _torch_activation(activation: str) -> list[nn.Module]:
    """torch's module of an activation, none for the identity; ValueError if torch has none."""
    if activation == "softmax":
        return [nn.Softmax(-1)]
    if activation not in _TORCH_MODULES:
        raise ValueError(f"torch has no module for the activation {activation!r}")
    kind, settings = _TORCH_MODULES[activation]
    return [] if activation == "identity" else [kind(**settings)]


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
    """One activation per layer. A single name, or one name per hidden layer, leaves the last layer without one."""
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


def _read(layers: Sequence[Any], *, only_ask: bool = False) -> tuple[list[Any], list[Any], list[str]] | None:
    """The layers' weights, biases and activations; with ``only_ask`` empty lists.

    None if a call of a layer is more than the forward of a layer of ours: there is a hook or a patched forward. All
    layers are asked first, because a parametrization computes its weight when it is read. Every call of a model asks,
    so this is one function, which looks up attributes without ``nn.Module.__getattr__``.
    """
    for layer in layers:
        own = layer.__dict__
        if (
            type(layer).forward not in _FORWARDS
            or "forward" in own
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return None
    weights, biases, activations = [], [], []
    for layer in () if only_ask else layers:
        own = layer.__dict__
        parameters = own["_parameters"]
        weights.append(parameters["weight"] if "weight" in parameters else layer.weight)  # noqa: SIM401
        biases.append(parameters["bias"] if "bias" in parameters else layer.bias)  # noqa: SIM401
        activations.append(own["_slot"].activation)
    return weights, biases, activations


def _only_computes(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` is the forward of a layer of ours and no more."""
    return _read((layer,), only_ask=True) is not None


def _floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in, as far as its parameters and buffers say."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


#: What layers of ours compute, as it was at import, so that a class that somebody patches is not taken for ours.
_FORWARDS = frozenset((Affine.forward, Linear.forward, EnsembleLinear.forward))


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward in (nn.Linear.forward, Affine.forward, Linear.forward)


def is_parallel(module: nn.Module) -> bool:
    """Whether calling ``module`` also talks to other devices or processes: DistributedDataParallel, FSDP and others."""
    return any(base.__module__.startswith(("torch.nn.parallel", "torch.distributed")) for base in type(module).__mro__)


def _leaves(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that ``module`` calls in order, each with the activation that belongs to it."""
    if is_parallel(module):
        raise TypeError(
            f"{type(module).__name__} communicates when it is called, which an MLP would not do; train it with "
            "autograd, or convert the module before it is wrapped"
        )
    if "_orig_mod" in module._modules:  # torch.compile's
        return _leaves(module._orig_mod)  # type: ignore[arg-type]
    if _has_hooks(module) or "forward" in module.__dict__:
        raise ValueError(
            f"{module} has hooks (weight_norm and pruning add such) or a patched forward, which an MLP would not call"
        )
    if isinstance(module, MLP):
        if type(module).forward is not MLP.forward:
            raise TypeError(f"{type(module).__name__} has another forward than MLP, which from_torch cannot read")
        if replaced := [layer for layer in module.layers if not _is_linear(layer)]:
            raise TypeError(f"an MLP from from_torch has no place for the replaced layer {replaced[0]}")
        pairs: list[tuple[nn.Module, str]] = []
        for layer, name, p in zip(module.layers, module.activations, (*module._rates(), 0.0), strict=True):
            pairs += [(leaf, name) for leaf, _ in _leaves(layer)]
            pairs += [(nn.Dropout(p), "identity")] if p else []
        return pairs
    if isinstance(module, Linear):
        return [(module, module.activation)]
    # Not children(), which leaves out a module's second appearance, such as one nn.ReLU used after every layer.
    children = [child for child in module._modules.values() if child is not None]
    if not children or isinstance(module, nn.Linear):
        return [(module, "identity")]
    return [pair for child in children for pair in _leaves(child)]


def _activation_name(module: nn.Module) -> str:
    if type(module) is nn.Softmax and module.dim in (1, -1):
        return "softmax"
    for name, (kind, settings) in _TORCH_MODULES.items():
        if type(module) is kind and all(getattr(module, key) == value for key, value in settings.items()):
            return name
    raise TypeError(
        f"an MLP has no place for {module}; expected nn.Linear, nn.Flatten or one of "
        f"{', '.join(kind.__name__ for kind, _ in _TORCH_MODULES.values())}, Softmax, Dropout "
        f"(LeakyReLU with slope {LEAKY_SLOPE}, exact GELU, Softmax over the features)"
    )
