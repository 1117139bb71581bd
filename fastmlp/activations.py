"""The activations that fastmlp knows by name: which there are, and what each must keep for its derivative.

This table needs no Triton; ``fastmlp.kernels.activations`` holds the same functions as device code and
``fastmlp.reference`` as torch expressions, and a test keeps the three in step.
"""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "LAYER_ACTIVATIONS", "LEAKY_SLOPE", "NEEDS_NOTHING", "NEEDS_Z", "saved_for_grad"]

#: Every elementwise activation, in the order of the documentation.
ACTIVATIONS = ("identity", "sigmoid", "relu", "tanh", "step", "leaky_relu", "gelu", "silu")
#: What a layer of an MLP may have: an elementwise activation, or softmax over its features.
LAYER_ACTIVATIONS = (*ACTIVATIONS, "softmax")
#: Derivative needs the pre-activation Z; the forward pass keeps it beside A.
NEEDS_Z = frozenset({"gelu", "silu"})
#: Derivative is a constant; the forward pass keeps nothing.
NEEDS_NOTHING = frozenset({"identity", "step"})
#: Slope of leaky_relu below zero (torch's default).
LEAKY_SLOPE = 0.01


def saved_for_grad(activation: str) -> str | None:
    """What the derivative of ``activation`` is computed from: ``"z"``, ``"a"`` or None (nothing)."""
    if activation in NEEDS_NOTHING:
        return None
    return "z" if activation in NEEDS_Z else "a"
