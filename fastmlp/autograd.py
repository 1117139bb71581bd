"""The torch.autograd.Function classes: one tape node for a layer, one for a whole MLP.

Forward and backward run the fused operations of ``fastmlp.ops``; nothing inside them is on the tape. What the
backward pass needs goes through ``save_for_backward``; what nobody asked the gradient of is neither saved nor
computed. With ``create_graph=True`` the backward pass is itself differentiated, so it then evaluates the same
formulas with differentiable torch operations (``fastmlp.reference``) instead of kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import ops, reference
from .activations import saved_for_grad
from .backend import Resolved

__all__ = ["LinearAct", "MLPFunction"]


def _param_grads(
    dz: Tensor, x: Tensor, need_weight: bool, need_bias: bool, backend: Resolved
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, db), each None where nobody asked for it."""
    if need_weight:
        return ops.linear_wgrad(dz, x, bias=need_bias, backend=backend)
    return None, dz.sum(0) if need_bias else None


class LinearAct(Function):
    """A = f(X W^T + b) for X [M, K], W [N, K], b [N] or None; A [M, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, backend: Resolved) -> Tensor:
        """Keep A (or Z) for f', X for dW and W for dX, each only if that gradient is wanted."""
        need_x, need_weight, _ = ctx.needs_input_grad[:3]
        kind = saved_for_grad(activation)
        a, z = ops.linear_fwd(x, weight, bias, activation, save_z=kind == "z", backend=backend)
        # A second derivative through gelu and silu starts from Z, which only X, W and b lead back to.
        keep_inputs = kind == "z"
        ctx.save_for_backward(
            x if need_weight or keep_inputs else None,
            weight if need_x or keep_inputs else None,
            bias if keep_inputs else None,
            {"a": a, "z": z, None: None}[kind],
        )
        ctx.activation, ctx.backend = activation, backend
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """DZ = dA * f'(Z), then dX = dZ W, dW = dZ^T X, db = sum_m dZ."""
        (da,) = grads
        x, weight, bias, saved = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            if saved_for_grad(ctx.activation) == "z":
                z = reference.linear_act(x, weight, bias)
                dz = da * reference.activation_grad(z, ctx.activation)
            else:
                # The saved output is on the tape, so its own dependence on X, W and b is differentiated too.
                dz = da * reference.activation_grad_from_output(saved, ctx.activation) if saved is not None else da
                dz = dz * 0 if ctx.activation == "step" else dz
            dx = reference.linear_dgrad(dz, weight) if need_x else None
            dw = reference.linear_wgrad(dz, x)[0] if need_weight else None
            return dx, dw, dz.sum(0) if need_bias else None, None, None
        dz = ops.activation_bwd(da, saved, ctx.activation, backend=ctx.backend)
        dw, db = _param_grads(dz, x, need_weight, need_bias, ctx.backend)
        dx = ops.linear_dgrad(dz, weight, None, "identity", backend=ctx.backend) if need_x else None
        return dx, dw, db, None, None


class MLPFunction(Function):
    """The whole network A_l = f_l(A_{l-1} W_l^T + b_l) as one node: ``apply(x, activations, backend, W_1, b_1, ...)``.

    Epilogue fusion crosses layers: each dgrad also multiplies by the derivative of the layer below. The first
    layer's dX is computed only if x requires grad, and nothing below the lowest layer that needs a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, activations: tuple[str, ...], backend: Resolved, *params: Tensor | None) -> Tensor:
        """Keep every hidden A_l (and Z_l for gelu and silu) above the lowest layer that needs a gradient."""
        weights, biases = params[0::2], params[1::2]
        needs = ctx.needs_input_grad[3:]
        last = len(activations) - 1
        trainable = [layer for layer in range(last + 1) if needs[2 * layer] or needs[2 * layer + 1]]
        # Gradients flow down to this layer's dZ; -1 means into x.
        lowest = -1 if ctx.needs_input_grad[0] else min(trainable, default=last + 1)
        inputs: list[Tensor | None] = []
        saved: list[Tensor | None] = []
        a = x
        for layer, activation in enumerate(activations):
            weight = weights[layer]
            assert weight is not None
            kind = saved_for_grad(activation) if layer >= lowest else None
            inputs.append(a if needs[2 * layer] else None)
            a, z = ops.linear_fwd(a, weight, biases[layer], activation, save_z=kind == "z", backend=backend)
            saved.append({"a": a, "z": z, None: None}[kind])
        ctx.save_for_backward(x, *params, *inputs[1:], *saved)
        ctx.activations, ctx.backend, ctx.lowest = activations, backend, lowest
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From the last layer down: dW_l, db_l, then dZ_{l-1} = (dZ_l W_l) * f'_{l-1}."""
        (da,) = grads
        layers = len(ctx.activations)
        x, *rest = ctx.saved_tensors
        params, rest = rest[: 2 * layers], rest[2 * layers :]
        if torch.is_grad_enabled():
            return MLPFunction._differentiable_backward(ctx, da, x, params)
        inputs, saved = [x, *rest[: layers - 1]], rest[layers - 1 :]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        out: list[Tensor | None] = [None] * (2 * layers)
        dz = ops.activation_bwd(da, saved[-1], ctx.activations[-1], backend=ctx.backend)
        for layer in range(layers - 1, max(ctx.lowest, 0) - 1, -1):
            out[2 * layer], out[2 * layer + 1] = _param_grads(
                dz, inputs[layer], needs[2 * layer], needs[2 * layer + 1], ctx.backend
            )
            if layer > max(ctx.lowest, 0):
                dz = ops.linear_dgrad(
                    dz, params[2 * layer], saved[layer - 1], ctx.activations[layer - 1], backend=ctx.backend
                )
        dx = ops.linear_dgrad(dz, params[0], None, "identity", backend=ctx.backend) if need_x else None
        return dx, None, None, *out

    @staticmethod
    def _differentiable_backward(
        ctx: FunctionCtx, da: Tensor, x: Tensor, params: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The same gradients as expressions on the tape, for create_graph=True; hidden layers are recomputed."""
        activations: tuple[str, ...] = ctx.activations  # type: ignore[attr-defined]
        needs_input_grad: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
        dx, dws, dbs = reference.mlp_backward(da, x, params[0::2], params[1::2], activations)
        wanted = [g for pair in zip(dws, dbs, strict=True) for g in pair]
        needs = needs_input_grad[3:]
        return (
            dx if needs_input_grad[0] else None,
            None,
            None,
            *(g if need else None for g, need in zip(wanted, needs, strict=True)),
        )
