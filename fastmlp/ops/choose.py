"""The fused operations without autograd: on which backend they run.

``ops.on(backend)`` is the module that has the functions of ``Operations``: ``fastmlp.ops.torch_ops``,
``fastmlp.ops.triton_ops`` or, where a compiler or a dispatch mode watches, ``fastmlp.ops.compiled``. For an ensemble on
plain torch it is ``fastmlp.ops.torch_members``; the others see by the weights' dimensions that there are members.

``backend`` is what ``fastmlp.backend.runs`` returned for the operation's input. A backward pass is given the
backend of its forward pass, because it runs on another thread and possibly outside the ``use_backend`` block.
Arguments were validated by the callers in ``fastmlp.functional``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..backend import Runs, watched
from ..base.dropout import Dropout
from . import compiled, torch_members, torch_ops, triton_ops
from .torch_losses import Gradients, Rows, Settings


class BackwardOperations(Protocol):
    """DZ [M, N], X [M, K], W [N, K]; ``saved`` is what f' needs (``fastmlp.activations.saved_for_grad``).

    ``dropout`` is that of the output of the layer whose f' it is. dA is then the gradient of the dropped output, and a
    saved A is that output: A_out = keep * A / (1 - p), dZ = dA * keep / (1 - p) * f'.
    """

    def linear_dgrad(
        self,
        dz: Tensor,
        weight: Tensor,
        saved: Tensor | None = None,
        activation: str = "identity",
        *,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """DX = (dZ W) * f' with f the activation of the layer below."""

    def linear_wgrad(self, dz: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """(dW, db or None) of a linear layer with input X."""

    def activation_bwd(
        self, da: Tensor, saved: Tensor | None, activation: str, *, dropout: Dropout | None = None
    ) -> Tensor:
        """DZ = dA * f'."""


class Operations(BackwardOperations, Protocol):
    """The operations of a backward pass, those of the forward pass with b [N], and the losses.

    Cross-entropy takes Z [M, C] or [N, C, S]. The other losses are named as in ``fastmlp.base.losses``. ``want`` says
    which of two gradients are wanted; the other is None.
    """

    def linear_fwd(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        *,
        save_z: bool = False,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(A, Z or None) of A = f(X W^T + b)."""

    def cross_entropy_fwd(
        self, z: Tensor, target: Tensor, weight: Tensor | None, s: Settings
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, what the backward pass keeps beside the inputs, denominator of the mean or None)."""

    def cross_entropy_bwd(self, dloss: Tensor, rows: Rows, s: Settings, want: Sequence[bool]) -> Gradients:
        """(dZ, dTarget)."""

    def loss_fwd(self, a: Tensor, y: Tensor, loss: str, reduction: str, delta: float = ...) -> Tensor:
        """The loss of A and Y, in a's dtype."""

    def loss_bwd(
        self, g: Tensor, a: Tensor, y: Tensor, loss: str, reduction: str, want: Sequence[bool], delta: float = ...
    ) -> Gradients:
        """(dA, dY)."""


def on(backend: Runs) -> Operations:
    """The operations on a backend."""
    if backend == "torch":
        return torch_ops
    if backend == "members":
        return torch_members
    return compiled if backend == "operators" or watched() else triton_ops
