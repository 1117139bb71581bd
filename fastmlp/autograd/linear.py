"""The torch.autograd.Function classes: one tape node for a layer, one for a whole MLP.

Forward and backward run the fused operations of ``fastmlp.ops``; nothing inside them is on the tape. What the
backward pass needs goes through ``save_for_backward``. A gradient that nobody asked for is not computed, and nothing is
saved for it.

Second derivatives: everything that the backward pass reads and that depends on a parameter (hidden A_l, or Z_l where f'
is computed from Z) is an output of the node. So autograd knows where it came from. With ``create_graph=True`` the
backward pass evaluates the same formulas with differentiable torch operations instead of kernels. The gradients of the
saved outputs then come back into the same backward pass. Callers drop these outputs; without ``create_graph`` their
gradients are never made. torch.compile has no second derivatives and would make zeros of these gradients, so a traced
node has one output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import ops, reference
from ..activations import ACTIVATIONS, saved_for_grad
from ..backend import Runs
from ..base.compat import is_autocast_enabled
from ..base.dropout import Dropout
from ..base.signature import Signature
from ..ops import BackwardOperations, torch_ops, triton_ops
from ..ops.dropout import before_dropout, dropped, kept_layers
from .transforms import differentiable, launches_alone

_AS_IT_IS = nullcontext()
#: The types of gradients where nothing flowed back: each is None.
_NOTHING = frozenset((type(None),))


def _outside_autocast(*grads: Tensor | None) -> AbstractContextManager[object]:
    """The saved tensors have the dtypes of the forward pass; a backward() inside torch.autocast keeps to them."""
    for g in grads:
        if g is not None:
            device_type = g.device.type
            return torch.autocast(device_type, enabled=False) if is_autocast_enabled(device_type) else _AS_IT_IS
    return _AS_IT_IS


class _Differentiable:
    """The operations of a backward pass as torch sees them: see ``fastmlp.autograd.transforms.differentiable``."""

    @staticmethod
    def activation_bwd(da: Tensor, saved: Tensor | None, activation: str, *, dropout: Dropout | None = None) -> Tensor:
        """DZ = dA * f'."""
        if dropout is not None:
            da, saved = dropped(da, dropout), before_dropout(saved, activation, dropout.p)
        if not ACTIVATIONS[activation].twice:
            assert saved is not None
            return da * reference.activation_grad(saved, activation)
        if ACTIVATIONS[activation].derivative == 0:
            return da.masked_fill(torch.ones_like(da, dtype=torch.bool), 0)  # zeros with a derivative
        return torch_ops.activation_bwd(da, saved, activation)

    @staticmethod
    def linear_dgrad(
        dz: Tensor,
        weight: Tensor,
        saved: Tensor | None = None,
        activation: str = "identity",
        *,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """DX = (dZ W) * f'."""
        return _Differentiable.activation_bwd(reference.linear_dgrad(dz, weight), saved, activation, dropout=dropout)

    @staticmethod
    def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """(dW, db or None)."""
        dw, db = reference.linear_wgrad(dz, x)
        return dw, db if bias else None


def _backward_operations(backend: Runs, *grads: Tensor | None) -> BackwardOperations:
    if backend == "triton" and launches_alone(*grads):
        return triton_ops
    return _Differentiable if differentiable(*grads) else ops.on(backend)


def _one_output(backend: Runs) -> bool:
    """Whether the node is traced, which only happens on the backend "operators"."""
    return backend == "operators" and is_compiling()


class LinearAct(Function):
    """A = f(X W^T + b) for X [M, K], W [N, K], b [N] or None.

    ``apply(x, weight, bias, activation, backend)`` returns (A [M, N], Z [M, N] or None); Z is there for the
    backward pass only, where f' is computed from it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: Runs
    ) -> tuple[Tensor, Tensor | None]:
        """Keep A (or Z) for f', X for dW and W for dX, each only if that gradient is wanted."""
        need_x, need_weight = ctx.needs_input_grad[:2]
        kind = saved_for_grad(activation)
        a, z = ops.on(backend).linear_fwd(x, weight, bias, activation, save_z=kind == "z")
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, a if kind == "a" else z)
        ctx.activation, ctx.backend = activation, backend
        ctx.set_materialize_grads(False)
        return a, None if _one_output(backend) else z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """DZ = dA * f'(Z), then dX = dZ W, dW = dZ^T X, db = sum_m dZ."""
        dz, dz_extra = grads
        x, weight, saved = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        do = _backward_operations(ctx.backend, *grads)
        dx: Tensor | None = None
        dw: Tensor | None = None
        db: Tensor | None = None
        with _outside_autocast(*grads):
            if dz is not None:
                dz = do.activation_bwd(dz, saved, ctx.activation)
            if dz_extra is not None:
                dz = dz_extra if dz is None else dz + dz_extra
            if dz is not None:
                if need_weight:
                    dw, db = do.linear_wgrad(dz, x, bias=need_bias)
                elif need_bias:
                    db = dz.sum(0)
                if need_x:
                    dx = do.linear_dgrad(dz, weight)
        return dx, dw, db, None, None


#: The dropout of each layer's output.
Drops = tuple[Dropout | None, ...]
_NO_DROPOUT: Drops = ()


def _drops(places: Sequence[Dropout | None], state: Any, x: Tensor, params: Sequence[Any], backend: Runs) -> Drops:
    """The layers' dropout with the state and, on all but the kernels, with the masks."""
    if backend == "triton":
        return tuple([None if place is None else place._replace(state=state) for place in places])
    rows = (*params[0].shape[:-2], x.shape[-2])
    return kept_layers(places, state, [(*rows, weight.shape[-2]) for weight in params[::2]])


class _Books(NamedTuple):
    """What the node of a network keeps and returns; ``_books`` makes one for the activations and wanted gradients.

    The functions pick from (None, X, W_1, b_1, ..., W_L, b_L) and the outputs A_1, Z_1 if saved, A_2, ...
    """

    #: What f' of each layer is computed from.
    kinds: tuple[Literal["a", "z"] | None, ...]
    saves_z: tuple[bool, ...]
    #: A_0 to A_L, W_1 to W_L and Z_1 to Z_L, None where the backward pass does not read it.
    kept: Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]
    #: A_L, and the hidden A_l and the Z_l that are kept, in the order of the outputs.
    returned: Callable[[tuple[Tensor | None, ...]], tuple[Tensor, ...]]
    #: "a" or "z" and l of everything that is returned but A_L.
    hidden: tuple[tuple[str, int], ...]


def _books(activations: tuple[str, ...], wanted: tuple[bool, ...]) -> _Books:
    """``wanted`` says of X, W_1, b_1, W_2, ... whether the gradient is wanted.

    The backward pass reads A_l or Z_l of each layer for its f', A_{l-1} for each dW_l that is wanted, and W_l for each
    dgrad.
    """
    kinds, last = [saved_for_grad(activation) for activation in activations], len(activations)
    place = 2 * last + 2
    a_places, z_places, hidden = [int(wanted[1])], [], {}
    for layer, kind in enumerate(kinds, 1):
        read = kind == "a" or (layer < last and wanted[2 * layer + 1])
        a_places.append(place if read else 0)
        if read and layer < last:
            hidden["a", layer] = place
        end, place = place, place + 1
        z_places.append(place if kind == "z" else 0)
        if kind == "z":
            hidden["z", layer] = place
            place += 1
    w_places = [2 if wanted[0] else 0, *range(4, 2 * last + 2, 2)]
    first = itemgetter(end)
    return _Books(
        kinds=tuple(kinds),
        saves_z=tuple([kind == "z" for kind in kinds]),
        kept=itemgetter(*a_places, *w_places, *z_places),
        # itemgetter of one place does not make a tuple.
        returned=itemgetter(end, *hidden.values()) if hidden else lambda pool: (first(pool),),
        hidden=tuple(hidden),
    )


_remembered_books = lru_cache(1024)(_books)


class MLPFunction(Function):
    """The whole network A_l = f_l(A_{l-1} W_l^T + b_l) as one node: ``apply(x, call, W_1, b_1, ...)``.

    ``call`` has the activations, the backend, the signature of X and the parameters (None where it is not known), and
    None. With dropout the last of these is a tuple with a ``Dropout`` without state, or None, for each layer, and the
    state follows the parameters as one more argument.
    Returns A_L, and of A_1, Z_1, A_2, Z_2, ..., Z_L those that the backward pass reads, which nobody else needs.

    Epilogue fusion crosses layers: each dgrad also multiplies by the derivative of the layer below. The first
    layer's dX is computed only if x requires grad. The caller has to run the layers below the lowest one that needs a
    gradient beforehand, off the tape, as ``fastmlp.functional.mlp`` does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: tuple[tuple[str, ...], Runs, Signature | None, Any], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Keep what ``_books`` says, and of dropout the state and the masks, which the kernels do without."""
        activations, backend, known, places = call
        need_x, _, *needs = ctx.needs_input_grad
        params, drops = tensors, _NO_DROPOUT
        if places is not None:
            params, needs = params[:-1], needs[:-1]
            drops = _drops(places, tensors[-1], x, params, backend)
        # A compiler warns of a cache that it does not see.
        books = (_books if is_compiling() else _remembered_books)(activations, (need_x, *needs))
        do = triton_ops if known is not None else ops.on(backend)
        outputs: Any = None
        if do is triton_ops and places is None:
            outputs = triton_ops.network_fwd(x, params, activations, books.saves_z, known)
        elif do is triton_ops:
            outputs = triton_ops.network_fwd(x, params, activations, books.saves_z, drops=drops)
        if outputs is None:
            outputs, a = [], x
            for layer, (activation, save_z) in enumerate(zip(activations, books.saves_z, strict=True)):
                weight = params[2 * layer]
                assert weight is not None
                if drops is not _NO_DROPOUT and (dropout := drops[layer]) is not None:
                    a, z = do.linear_fwd(a, weight, params[2 * layer + 1], activation, save_z=save_z, dropout=dropout)
                else:
                    a, z = do.linear_fwd(a, weight, params[2 * layer + 1], activation, save_z=save_z)
                outputs += [a] if z is None else [a, z]
        pool = (None, x, *params, *outputs)
        if places is None:
            ctx.save_for_backward(*books.kept(pool))
        else:
            ctx.save_for_backward(*books.kept(pool), tensors[-1], *[None if d is None else d.keep for d in drops])
        ctx.call = activations, backend, books, places
        ctx.set_materialize_grads(False)
        returned = books.returned(pool)
        return returned[:1] if _one_output(backend) else returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """From the last layer down: dW_l, db_l, then dZ_{l-1} = (dZ_l W_l) * f'_{l-1}.

        In a second derivative dA_l and dZ_l also receive what flows into the saved A_l and Z_l; such a layer takes
        the product and the derivative apart.
        """
        activations, backend, books, places = ctx.call
        tensors = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        do = _backward_operations(backend, *grads)
        dz, *others = grads
        if places is not None:
            return _backward_of_dropout(do, ctx.call, tensors, dz, others, (need_x, *needs[:-1]))
        wanted = (need_x, *needs)
        if do is triton_ops and dz is not None and _NOTHING.issuperset(map(type, others)):  # launches know no autocast
            dz = do.activation_bwd(dz, _saved(tensors, books.kinds, len(activations)), activations[-1])
            at_once = triton_ops.network_bwd(dz, tensors, activations, books.kinds, wanted)
            if at_once is not None:
                made = iter(at_once)
                dx, *gradients = [next(made) if want else None for want in wanted]
                return dx, None, *gradients
        elif dz is not None:
            with _outside_autocast(*grads):
                dz = do.activation_bwd(dz, _saved(tensors, books.kinds, len(activations)), activations[-1])
        with _outside_autocast(*grads):
            hidden = dict(zip(books.hidden, others, strict=False))  # a traced node returns none
            dx, *gradients = _layer_by_layer(do, dz, hidden, tensors, activations, books.kinds, wanted)
        return dx, None, *gradients


def _backward_of_dropout(
    do: BackwardOperations, call: tuple[Any, ...], tensors: Sequence[Tensor | None], dz: Tensor | None,
    others: Sequence[Tensor | None], wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``MLPFunction.backward`` with dropout; the last of the gradients is that of the state."""
    activations, _, books, places = call
    *rest, state = tensors[: -len(activations)]
    drops = tuple(
        place and place._replace(state=state, keep=keep)
        for place, keep in zip(places, tensors[-len(activations) :], strict=True)
    )
    with _outside_autocast(dz, *others):
        if dz is not None:
            dz = do.activation_bwd(dz, _saved(rest, books.kinds, len(activations)), activations[-1])
            if do is triton_ops and _NOTHING.issuperset(map(type, others)):
                at_once = triton_ops.network_bwd(dz, rest, activations, books.kinds, wanted, drops)
                if at_once is not None:
                    made = iter(at_once)
                    dx, *gradients = [next(made) if want else None for want in wanted]
                    return dx, None, *gradients, None
        hidden = dict(zip(books.hidden, others, strict=False))
        dx, *gradients = _layer_by_layer(do, dz, hidden, rest, activations, books.kinds, wanted, drops)
    return dx, None, *gradients, None


def _saved(tensors: Sequence[Tensor | None], kinds: Sequence[Literal["a", "z"] | None], layer: int) -> Tensor | None:
    """The tensor that f' of a layer is computed from, among those that an MLPFunction keeps; layers count from 1."""
    kind = kinds[layer - 1]
    return None if kind is None else tensors[layer] if kind == "a" else tensors[2 * len(kinds) + layer]


def _layer_by_layer(
    do: BackwardOperations, dz: Tensor | None, hidden: dict[tuple[str, int], Tensor | None],
    tensors: Sequence[Tensor | None], activations: tuple[str, ...], kinds: Sequence[Literal["a", "z"] | None],
    wanted: tuple[bool, ...], drops: Drops = _NO_DROPOUT,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of X, W_1, b_1, W_2, ... ``dz`` is dZ_L, to which what flows into a returned Z_L is still added."""
    count = len(activations)
    out: list[Tensor | None] = [None] * len(wanted)
    for layer in range(count, 0, -1):
        dz_extra = hidden.get(("z", layer))
        if dz_extra is not None:
            dz = dz_extra if dz is None else dz + dz_extra
        w, b = 2 * layer - 1, 2 * layer
        x, weight = tensors[layer - 1], tensors[count + layer]
        if dz is None:
            pass
        elif wanted[w]:
            assert x is not None
            out[w], out[b] = do.linear_wgrad(dz, x, bias=wanted[b])
        elif wanted[b]:
            out[b] = dz.sum(-2)
        if layer == 1:
            break
        assert weight is not None
        below, kept, da_extra = activations[layer - 2], _saved(tensors, kinds, layer - 1), hidden.get(("a", layer - 1))
        own: dict[str, Any] = {} if drops is _NO_DROPOUT or drops[layer - 2] is None else {"dropout": drops[layer - 2]}
        if da_extra is None:
            dz = None if dz is None else do.linear_dgrad(dz, weight, kept, below, **own)
        else:
            da = da_extra if dz is None else do.linear_dgrad(dz, weight) + da_extra
            dz = do.activation_bwd(da, kept, below, **own)
    if wanted[0] and dz is not None:
        assert weight is not None
        out[0] = do.linear_dgrad(dz, weight)
    return out
