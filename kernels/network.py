"""The launches of a whole network's forward pass, and of its backward pass, each remembered as one.

    forward    A_l = f_l(A_{l-1} W_l^T + b_l)                             linear_fwd of every layer
    backward   dZ_{l-1} = (dZ_l W_l) * f'_{l-1}, for l = L, ..., 2        linear_dgrad of every layer but the first
               dX = dZ_1 W_1 where wanted                                 linear_dgrad
               dW_l = dZ_l^T A_{l-1}, db_l = sum over the batch of dZ_l   one launch for all layers

The weight gradients are the kernel of ``wgrad_update``, which stores them in place of an update. A tile's batch is not
split, so that no workspace is needed, and the sums over the batch are in the order of its rows.

Dropout: (layer, p, stream), or None, for each layer, and one state for all. A_l is dropped as it is stored, and dZ_l
where f'_l is applied. The weight gradients read A_l after dropout.

Members: weights are [E, N, K]. X may be the same for all members; dX then still is [E, M, K], of each member.

Shapes and dtypes: those of the kernels. Both functions return None for what they leave to the launchers of the layers:
empty tensors, and in the backward pass more than ``GROUPED_ROWS`` rows per member, a dZ_L or a saved A or Z that is not
contiguous, inputs with strided columns, and a db without its dW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.signature import Signature, signature
from .configs import TileRule, gemm_tile, loads_wide
from .launch import Call, Launches, New, remembered, with_dropout
from .layout import Layer, Layout
from .linear_dgrad import plan as dgrad_plan
from .linear_fwd import plan as fwd_plan
from .wgrad_update import gradient_call, update_tile

__all__ = ["GROUPED_ROWS", "network_bwd", "network_fwd"]

#: The state of the dropout, and of each layer (layer, p, stream), or None.
Drops = tuple[Tensor, tuple[tuple[int, float, int] | None, ...]]
#: Larger batches keep a GPU busy for longer than their launches take the host. Where nothing is kept for a backward
#: pass, the memory of each of their layers is free again after the next one.
GROUPED_ROWS = 512


def _forward_plan(*given: Any, active: None = None, dropout: tuple[Any, ...] | None = None) -> Launches | None:
    """The plan. ``given``: X, W and b of every layer, the activations, where Z is wanted, and the rule of the tiles."""
    x, *params, activations, saves_z, rule = given
    drops = _of_layers(dropout, len(activations))
    if not x.numel() or not all(weight.numel() for weight in params[0::2]):
        return None
    calls, news = [], []
    layers = zip(params[0::2], params[1::2], activations, saves_z, drops, strict=True)
    for weight, bias, activation, save_z, drop in layers:
        shape = (*weight.shape[:-2], x.shape[-2], weight.shape[-2])
        a, z = (New(*shape, dtype=weight.dtype) if wanted else None for wanted in (True, save_z))
        calls.append(fwd_plan(x, weight, bias, a, z, None, activation, rule, None, drop))
        news += [a] if z is None else [a, z]
        x = a
    return Launches(calls, news)


def _of_layers(dropout: tuple[Any, ...] | None, count: int) -> Sequence[tuple[Any, ...] | None]:
    """The dropout of each layer as the plans of the layers take it."""
    if dropout is None:
        return [None] * count
    state, *drawn = dropout
    return [own and (state, *own) for own in drawn]


_forward = remembered(_forward_plan)
_forward_dropping = remembered(with_dropout(_forward_plan))


def network_fwd(
    x: Tensor,
    params: Sequence[Tensor | None],
    activations: tuple[str, ...],
    saves_z: tuple[bool, ...],
    known: Signature | None = None,
    drops: Drops | None = None,
) -> Sequence[Tensor] | None:
    """Launch the forward pass of W_1, b_1, W_2, ...: A_1, Z_1 if wanted, A_2, ...

    ``known`` is the signature of X and the parameters, if the caller has it. ``drops`` is the state, and the rest of
    the dropout of each layer's output.
    """
    if drops is None:
        return _forward((x, *params), (activations, saves_z, gemm_tile), (), known)
    state, drawn = drops
    return _forward_dropping((state, None, x, *params), (activations, saves_z, gemm_tile, drawn))


def _backward_plan(*given: Any, active: None = None, dropout: tuple[Any, ...] | None = None) -> Launches | None:
    """The plan. ``given``: the arguments of ``network_bwd``, and the rule of the tiles."""
    dz, *tensors, activations, kinds, wanted, rule = given
    count = len(activations)
    drops = _of_layers(dropout, count)
    inputs, weights = tensors[:count], tensors[count + 1 : 2 * count + 1]
    known = {"a": tensors[1 : count + 1], "z": tensors[2 * count + 1 :], None: [None] * count}
    saved = [known[kind][layer] for layer, kind in enumerate(kinds)]
    want_x, wants_w, wants_b = wanted[0], wanted[1::2], wanted[2::2]
    if (
        not 0 < dz.shape[-2] <= GROUPED_ROWS
        or any(b and not w for w, b in zip(wants_w, wants_b, strict=True))
        or any(t is not None and not t.numel() for t in (dz, *tensors))
        or any(x is not None and x.stride(-1) != 1 for x, w in zip(inputs, wants_w, strict=True) if w)
        or any(t is not None and not t.is_contiguous() for t in (dz, *saved))
    ):
        return None
    calls: list[Call] = []
    hidden: list[New] = []
    trained: list[tuple[Any, ...]] = []
    for layer in range(count - 1, -1, -1):
        if wants_w[layer]:
            of = (*dz.shape[:-2], dz.shape[-1])
            dw = New(*of, inputs[layer].shape[-1], dtype=dz.dtype)
            db = New(*of, dtype=dz.dtype) if wants_b[layer] else None
            trained.insert(0, (dz, inputs[layer], dw, db))  # only the first layer may have pixels
        if layer == 0 and not want_x:
            break
        dx = New(*dz.shape[:-1], weights[layer].shape[-1], dtype=dz.dtype)
        below = (saved[layer - 1], dx, None, activations[layer - 1]) if layer else (None, dx, None, "identity")
        calls.append(dgrad_plan(dz, weights[layer], *below, rule, None, drops[layer - 1] if layer else None))
        hidden.append(dx)
        dz = dx
    if trained:
        calls.append(_weight_gradients(trained, rule))
    wanted_grads = [hidden.pop()] if want_x else []
    wanted_grads += [grad for *_, dw, db in trained for grad in (dw, db) if grad is not None]
    return Launches(calls, [*wanted_grads, *hidden])


def _weight_gradients(trained: Sequence[tuple[Any, Any, Any, Any]], gemm_tile: TileRule) -> Call:
    """One launch for (dZ, X, dW, db or None) of every layer."""
    dzs, xs, dws, dbs = zip(*trained, strict=True)
    m, dtype, wide = dzs[0].shape[-2], dzs[0].dtype, loads_wide(*dzs, *xs)
    layout = Layout([Layer(dw, db) for dw, db in zip(dws, dbs, strict=True)])
    count, layers = layout.members, layout.of_layers
    pixels = xs[0].dtype == torch.uint8
    tile, *_ = update_tile(layers, m, dtype, gemm_tile, wide=wide, summed=False, members=count or 1, pixels=pixels)
    return gradient_call(layers, dzs, xs, tile, (1, m, 0), "none", count=count)


_backward = remembered(_backward_plan)
_backward_dropping = remembered(with_dropout(_backward_plan))


def network_bwd(
    dz: Tensor,
    tensors: Sequence[Tensor | None],
    activations: tuple[str, ...],
    kinds: tuple[str | None, ...],
    wanted: tuple[bool, ...],
    drops: Drops | None = None,
) -> Sequence[Tensor] | None:
    """Launch the backward pass from dZ_L; returns the wanted gradients, and tensors that it took besides.

    Args:
        tensors: A_0 to A_L, W_1 to W_L, Z_1 to Z_L; each None where it is not needed.
        kinds: of every layer what f'_l is computed from, "a", "z" or None.
        wanted: whether the gradients of X, W_1, b_1, W_2, ... are, in this order.
        drops: as in the forward pass; the caller applies that of the last layer.
    """
    if drops is None:
        given = (dz, *tensors)
        return _backward(given, (activations, kinds, wanted, gemm_tile), (), signature(given, tensors[2 * len(kinds)]))
    state, drawn = drops
    return _backward_dropping((state, None, dz, *tensors), (activations, kinds, wanted, gemm_tile, drawn))
