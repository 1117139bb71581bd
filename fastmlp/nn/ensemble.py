"""MLPEnsemble: many MLPs of one shape as one module, with the members as the first axis of every parameter."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from ..base.arguments import check_tensor
from .layers import EnsembleLinear, LayerList
from .mlp import MLP, Network, _checked_sizes, _only_computes, _per_layer, _read

__all__ = ["MLPEnsemble"]


class MLPEnsemble(Network):
    """E multilayer perceptrons of one shape, each with parameters of its own, computed together.

    Args:
        sizes, activation, bias, device, dtype, dropout: of every member, as for an ``MLP``.
        members: the number E of members, at least 1.

    ``layers[i].weight`` is [E, n_i, n_{i-1}] and ``layers[i].bias`` is [E, n_i]; state_dict has the names of an MLP's.
    Input is [B, sizes[0]], the same for all members, or [E, B, sizes[0]], of the parameters' dtype or uint8 (pixels,
    scaled by 1/255); output [E, B, sizes[-1]]. Images are flattened by the caller, with ``x.flatten(1)``, since the
    first of three dimensions is the members.

    Each member is initialized like an MLP: after one seed, ``MLPEnsemble(sizes, 3)`` has the values of three MLPs that
    are made one after the other. ``MLPEnsemble.stack`` makes an ensemble of given MLPs, ``unstack`` the MLPs of one.

    With dropout each member has masks of its own, all from the seed and the number of the pass in ``dropout_state``.
    Ensembles that ``stack`` makes, and MLPs that ``unstack`` makes, draw new seeds.

    The forward pass is one node of the tape. Gradients, transforms, torch.compile and torch.export are those of an MLP;
    what is backpropagated may combine members, such as their minimum. ``fastmlp.TrainStep`` trains all members at once.

    Raises:
        TypeError: sizes that are no sequence of ints, members that is no int, dropout that is no number.
        ValueError: fewer than two sizes or one below 1, members below 1, unknown activations, a wrong number of them,
            or of dropout probabilities, or a probability below 0 or from 1 on.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        members: int,
        activation: str | Sequence[str] = "sigmoid",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dropout: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        self.sizes, self.members = _checked_sizes(sizes), _checked_members(members)
        activations = _per_layer(activation, len(self.sizes) - 1)
        self.layers = LayerList(
            EnsembleLinear(self.members, n_in, n_out, bias, f, device, dtype)
            for n_in, n_out, f in zip(self.sizes[:-1], self.sizes[1:], activations, strict=True)
        )
        self.reset_parameters()
        self.dropout = dropout

    def reset_parameters(self) -> None:
        """Draw new values, member by member, each as an MLP of its own would."""
        layers: list[EnsembleLinear] = self._linears()  # type: ignore[assignment]
        for member in range(self.members):
            for layer in layers:
                layer.reset_member(member)

    def forward(self, x: Tensor) -> Tensor:
        """[B, sizes[0]] or [E, B, sizes[0]] to [E, B, sizes[-1]]."""
        parts = None if _has_any_global_hook() else _read(self._linears())
        if parts is None:
            check_tensor(x, "the input")
            return self._in_turn(x)
        weights, biases, activations = parts
        if self._dropout and self.training:
            return functional.mlp(x, weights, biases, activations, self.members, self._dropout, self.dropout_state)
        return functional.mlp(x, weights, biases, activations, self.members)

    def extra_repr(self) -> str:
        """The sizes and the number of members; the layers print themselves."""
        return f"sizes={self.sizes}, members={self.members}{self._repr_of_dropout()}"

    @classmethod
    def stack(cls, models: Iterable[MLP]) -> MLPEnsemble:
        """The ensemble of copies of MLPs of one shape, in order; a parameter that is frozen in all stays frozen.

        Raises:
            TypeError: an element that is no MLP, or an MLP with a replaced layer or another ``forward``.
            ValueError: no models, or models of different sizes, activations, dropout, biases or frozen parameters.
            RuntimeError: models of different dtypes or devices.
        """
        models = list(models) if isinstance(models, Iterable) else models
        if not isinstance(models, list) or not all(isinstance(model, MLP) for model in models):
            kinds = {type(model).__name__: None for model in models} if isinstance(models, list) else {}
            got = f"a {type(models).__name__}" + (f" of {', '.join(kinds)}" if kinds else "")
            raise TypeError(
                f"MLPEnsemble.stack takes a list of fastmlp.MLP, got {got}; convert torch modules with "
                "fastmlp.MLP.from_torch"
            )
        if not models:
            raise ValueError("expected at least one MLP to stack, got none")
        for i, model in enumerate(models):
            _check_stackable(i, model, models[0])
        first = models[0]
        ensemble = cls(first.sizes, len(models), first.activations, device="meta")
        for i, layer in enumerate(ensemble._linears()):
            for name in ("weight", "bias"):
                parameters = [getattr(model.layers[i], name) for model in models]
                if parameters[0] is None:
                    layer.register_parameter(name, None)
                    continue
                stacked = torch.stack([parameter.detach() for parameter in parameters])
                setattr(layer, name, nn.Parameter(stacked, parameters[0].requires_grad))
        ensemble.dropout = first.dropout
        return ensemble.train(first.training)

    def unstack(self) -> list[MLP]:
        """The members as MLPs of their own, which are copies.

        Raises:
            TypeError: a layer was replaced by another module.
        """
        layers = self._linears()
        if not all(isinstance(layer, EnsembleLinear) for layer in layers):
            raise TypeError("a layer of the ensemble was replaced by another module, which no member has; put it back")
        bias = any(layer.bias is not None for layer in layers)
        models = [MLP(self.sizes, self.activations, bias=bias, device="meta") for _ in range(self.members)]
        for i, layer in enumerate(layers):
            for name in ("weight", "bias"):
                parameter = getattr(layer, name)
                for member, model in enumerate(models):
                    if parameter is None:
                        model.layers[i].register_parameter(name, None)
                    else:
                        own = nn.Parameter(parameter.detach()[member].clone(), parameter.requires_grad)
                        setattr(model.layers[i], name, own)
        for model in models:
            model.dropout = self.dropout
        return [model.train(self.training) for model in models]


def _checked_members(members: object) -> int:
    if isinstance(members, bool) or not hasattr(members, "__index__"):
        raise TypeError(
            f"expected members to be an int of at least 1, got {members!r} of type {type(members).__name__}"
        )
    number = operator.index(members)
    if number < 1:
        raise ValueError(f"expected at least 1 member, got members={number}")
    return number


def _about(model: MLP) -> tuple[dict[str, object], dict[str, object]]:
    """What stacked models have in common, by name: what raises ValueError where it differs, and what RuntimeError."""
    parameters = dict(model.named_parameters())
    first = next(iter(parameters.values()))
    return {
        "sizes": model.sizes,
        "activations": model.activations,
        "dropout": model._rates(),
        "parameters": {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        "frozen parameters": [name for name, parameter in parameters.items() if not parameter.requires_grad],
    }, {"dtype": first.dtype, "device": first.device}


def _check_stackable(i: int, model: MLP, first: MLP) -> None:
    """ValueError, RuntimeError or TypeError unless the model can be a member beside the first one."""
    if type(model).forward is not MLP.forward or not all(map(_only_computes, model._linears())):
        raise TypeError(
            f"models[{i}] has a replaced layer, a hook or a forward of its own, which an ensemble would not call; "
            "remove them before stacking"
        )
    for kind, theirs, ours in zip((ValueError, RuntimeError), _about(model), _about(first), strict=True):
        for name, value in theirs.items():
            if value != ours[name]:
                raise kind(
                    f"expected models of the same {name}, got {ours[name]} in models[0] and {value} in models[{i}]; "
                    "stack such models into ensembles of their own"
                )
