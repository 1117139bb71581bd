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

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops, reference
from ..activations import ACTIVATIONS, saved_for_grad
from ..backend import Runs
from ..base.compat import is_autocast_enabled
from ..ops import BackwardOperations, torch_ops, triton_ops
from .transforms import differentiable

_AS_IT_IS = nullcontext()


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
    def activation_bwd(da: Tensor, saved: Tensor | None, activation: str) -> Tensor:
        """DZ = dA * f'."""
        if not ACTIVATIONS[activation].twice:
            assert saved is not None
            return da * reference.activation_grad(saved, activation)
        if ACTIVATIONS[activation].derivative == 0:
            return da.masked_fill(torch.ones_like(da, dtype=torch.bool), 0)  # zeros with a derivative
        return torch_ops.activation_bwd(da, saved, activation)

    @staticmethod
    def linear_dgrad(dz: Tensor, weight: Tensor, saved: Tensor | None = None, activation: str = "identity") -> Tensor:
        """DX = (dZ W) * f'."""
        return _Differentiable.activation_bwd(reference.linear_dgrad(dz, weight), saved, activation)

    @staticmethod
    def linear_wgrad(dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """(dW, db or None)."""
        dw, db = reference.linear_wgrad(dz, x)
        return dw, db if bias else None


def _backward_operations(backend: Runs, *grads: Tensor | None) -> BackwardOperations:
    return _Differentiable if differentiable(*grads) else ops.on(backend)


def _one_output(backend: Runs) -> bool:
    """Whether the node is traced, which is on the operators only."""
    return backend == "operators" and torch.compiler.is_compiling()


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


class MLPFunction(Function):
    """The whole network A_l = f_l(A_{l-1} W_l^T + b_l) as one node: ``apply(x, activations, backend, W_1, b_1, ...)``.

    Returns (A_L, A_1, Z_1, A_2, Z_2, ..., Z_L) with None for what the backward pass does not read; all but the first
    are there for it only.

    Epilogue fusion crosses layers: each dgrad also multiplies by the derivative of the layer below. The first
    layer's dX is computed only if x requires grad. Layers below the lowest one that needs a gradient are the
    caller's to run before (``fastmlp.functional.mlp`` does), off the tape.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activations: tuple[str, ...], backend: Runs, *params: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Keep A_l or Z_l of each layer for its f', A_{l-1} for each dW_l that is wanted, W_l for each dgrad."""
        weights = params[0::2]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        last = len(activations) - 1
        do = ops.on(backend)
        kinds = [saved_for_grad(activation) for activation in activations]
        saves_z = tuple([kind == "z" for kind in kinds])
        outputs = triton_ops.network_fwd(x, params, activations, saves_z) if do is triton_ops else None
        if outputs is None:
            outputs, a = [], x
            for layer, activation in enumerate(activations):
                weight = weights[layer]
                assert weight is not None
                a, z = do.linear_fwd(a, weight, params[2 * layer + 1], activation, save_z=saves_z[layer])
                outputs += [a] if z is None else [a, z]
        made = iter(outputs)
        inputs: list[Tensor | None] = []
        saved: list[Tensor | None] = []
        hidden: list[Tensor | None] = []
        a = x
        for layer, kind in enumerate(kinds):
            inputs.append(a if needs[2 * layer] else None)
            a, z = next(made), next(made) if kind == "z" else None
            saved.append(a if kind == "a" else z)
            read_later = kind == "a" or (layer < last and needs[2 * layer + 2])
            hidden += (a if layer < last and read_later else None, z)
        ctx.save_for_backward(*inputs, weights[0] if need_x else None, *weights[1:], *saved)
        ctx.activations, ctx.backend = activations, backend
        ctx.set_materialize_grads(False)
        return a, *([None] * len(hidden) if _one_output(backend) else hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """From the last layer down: dW_l, db_l, then dZ_{l-1} = (dZ_l W_l) * f'_{l-1}.

        In a second derivative dA_l and dZ_l also receive what flows into the saved A_l and Z_l; such a layer takes
        the product and the derivative apart.
        """
        activations = ctx.activations
        count = len(activations)
        tensors = ctx.saved_tensors
        inputs, weights, saved = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        needs = ctx.needs_input_grad
        out: list[Tensor | None] = [None] * len(needs)
        do = _backward_operations(ctx.backend, *grads)
        with _outside_autocast(*grads):
            dz = grads[0]
            if dz is not None:
                dz = do.activation_bwd(dz, saved[-1], activations[-1])
            if do is triton_ops and dz is not None and all(g is None for g in grads[1:]):
                wanted = (needs[0], *needs[3:])
                at_once = triton_ops.network_bwd(dz, tensors, activations, wanted)
                if at_once is not None:
                    made = iter(at_once)
                    dx, *gradients = [next(made) if want else None for want in wanted]
                    return dx, None, None, *gradients
            for layer in range(count - 1, -1, -1):
                dz_extra = grads[2 * layer + 2]
                if dz_extra is not None:
                    dz = dz_extra if dz is None else dz + dz_extra
                w, b = 3 + 2 * layer, 4 + 2 * layer
                if dz is None:
                    pass
                elif needs[w]:
                    out[w], out[b] = do.linear_wgrad(dz, inputs[layer], bias=needs[b])
                elif needs[b]:
                    out[b] = dz.sum(-2)
                if layer == 0:
                    break
                below, kept, da_extra = activations[layer - 1], saved[layer - 1], grads[2 * layer - 1]
                if da_extra is None:
                    dz = None if dz is None else do.linear_dgrad(dz, weights[layer], kept, below)
                else:
                    da = da_extra if dz is None else do.linear_dgrad(dz, weights[layer]) + da_extra
                    dz = do.activation_bwd(da, kept, below)
            if needs[0] and dz is not None:
                out[0] = do.linear_dgrad(dz, weights[0])
        return tuple(out)
