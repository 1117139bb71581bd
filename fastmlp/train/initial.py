"""Starting values of an MLP's parameters by activation, and learning rates that suit them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..activations import ACTIVATIONS
from ..nn import MLP

LEARNING_RATES: Mapping[str, float] = {name: f.lr for name, f in ACTIVATIONS.items()}
"""Base learning rate by hidden activation (``Activation.lr``)."""


@torch.no_grad()
def initialize_(model: MLP, seed: int | None = None) -> MLP:
    """Give each layer of ``model``, in place, starting weights that suit its activation; biases become 0.

    The weights are uniform, after Glorot and Bengio (2010), or after He et al. (2015) for activations that are near 0
    for half of their inputs (``Activation.gain``). With torch's default weights, sigmoid layers hardly tell one input
    from another at first, and every network here is less accurate after the same epochs. Dropout, where the model has
    some, begins anew with a seed that is drawn after the weights. Returns ``model``.

    Args:
        model: any MLP.
        seed: of a new generator, so that the values are the same on every device. Default: torch's global generator of
            the CPU.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer, activation in zip(model._linears(), model.activations, strict=True):
        outputs, inputs = layer.weight.shape
        gain = 1.0 if activation == "softmax" else ACTIVATIONS[activation].gain
        bound = math.sqrt(6 / inputs) if gain is None else gain * math.sqrt(6 / (inputs + outputs))
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        values = torch.empty(outputs, inputs, dtype=dtype, device="cpu")
        layer.weight.copy_(values.uniform_(-bound, bound, generator=generator))
        if layer.bias is not None:
            layer.bias.zero_()
    if model.dropout:
        first = torch.randint(2**63 - 1, (), generator=generator, device="cpu")
        model.dropout_state.copy_(torch.stack([first, torch.zeros_like(first)]))
    return model
