"""Where torch must see every operation: in its transforms, for forward-mode derivatives, for batched backward passes.

A kernel, a call of oneDNN and an operation in place have neither a tangent nor a batching rule. There the formulas of
``fastmlp.reference`` run as plain torch operations, which torch can transform.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from ..backend import functorch_active, get_backend, nobody_watches


def transformed(*inputs: Tensor | None) -> bool:
    """Whether a forward pass must be plain torch: in a transform of torch.func, or for an input with a tangent.

    Raises:
        RuntimeError: an input with a tangent on backend "triton", or under torch.inference_mode.
    """
    if functorch_active():
        return True
    if forward_ad._current_level < 0 or not any(map(_has_tangent, inputs)):
        return False
    if get_backend() == "triton":
        raise RuntimeError(
            "backend 'triton' computes no forward-mode derivatives, but an input carries a tangent; use backend 'auto' "
            "or 'torch' there"
        )
    return True


def differentiable(*grads: Tensor | None) -> bool:
    """Whether a backward pass must be plain torch: for create_graph, and for gradients that torch transforms.

    ``torch.autograd.grad(is_grads_batched=True)`` and ``torch.vmap`` over a backward pass give batched gradients. A
    backward pass inside a dual level may be given gradients with tangents.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if functorch_active() or forward_ad._current_level >= 0:
        return True
    # is_grads_batched makes its gradients by a vmap that is older than torch.func's.
    return any(is_legacy_batchedtensor(grad) for grad in grads if grad is not None)


def launches_alone(*grads: Tensor | None) -> bool:
    """Whether a backward pass on the kernels is launches that nobody else sees, which is not ``differentiable``."""
    return (
        not torch.is_grad_enabled()
        and nobody_watches()
        and not any(map(is_legacy_batchedtensor, [grad for grad in grads if grad is not None]))
    )


def _has_tangent(t: Tensor | None) -> bool:
    if t is None or not t.is_floating_point():
        return False
    if not torch.is_inference_mode_enabled():
        return forward_ad.unpack_dual(t).tangent is not None
    with torch.inference_mode(False):
        tangent = None if t.is_inference() else forward_ad.unpack_dual(t).tangent
    if tangent is not None:
        raise RuntimeError(
            "torch.inference_mode drops forward-mode derivatives, but an input carries a tangent; use torch.no_grad"
        )
    return False
