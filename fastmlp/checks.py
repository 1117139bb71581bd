"""Validation of arguments: every error says what came, what was expected and what to do.

The exceptions are of the types that torch raises for the same mistake, so code that catches torch's keeps working.
Each function returns nothing; it runs on every call, so the good case costs a few attribute reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS

__all__ = ["check_activation", "check_linear", "check_same_device"]


def check_activation(activation: object) -> None:
    """ValueError unless ``activation`` is the name of an elementwise activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def check_same_device(named: Sequence[tuple[str, Tensor | None]]) -> None:
    """RuntimeError unless all the given tensors are on one device."""
    first_name, first = next((n, t) for n, t in named if t is not None)
    for name, tensor in named:
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"expected all tensors to be on the same device, but {first_name} is on {first.device} and {name} on "
                f"{tensor.device}; move one of them with .to(device)"
            )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, features: int | None = None) -> None:
    """Check the arguments of A = f(X W^T + b) after X was flattened to its last dimension.

    Raises:
        RuntimeError: wrong rank, feature count, dtype or device, as torch.nn.functional.linear.
    """
    if weight.dim() != 2:
        raise RuntimeError(f"expected weight of shape [out_features, in_features], got {list(weight.shape)}")
    if x.dim() == 0:
        raise RuntimeError("expected an input with at least 1 dimension, [*, in_features], got a 0-d tensor")
    features = x.shape[-1] if features is None else features
    if features != weight.shape[1]:
        raise RuntimeError(
            f"expected an input with {weight.shape[1]} features (weight is {list(weight.shape)}), got {features} from "
            f"an input of shape {list(x.shape)}; reshape the input or build the layer with in_features={features}"
        )
    if x.dtype != weight.dtype and x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise RuntimeError(
                f"expected a floating-point input or uint8 pixels, got {x.dtype}; convert it with "
                f".to({weight.dtype}), or with .to(torch.uint8) if the values are pixels from 0 to 255"
            )
        raise RuntimeError(
            f"expected input and weight of the same dtype, got {x.dtype} and {weight.dtype}; "
            f"convert the input with .to({weight.dtype}), or use torch.autocast"
        )
    if not weight.is_floating_point():
        raise RuntimeError(f"expected a floating-point weight, got {weight.dtype}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise RuntimeError(
                f"expected a bias of shape [{weight.shape[0]}] for weight {list(weight.shape)}, got {list(bias.shape)}"
            )
        if bias.dtype != weight.dtype:
            raise RuntimeError(f"expected bias and weight of the same dtype, got {bias.dtype} and {weight.dtype}")
    check_same_device((("the input", x), ("weight", weight), ("bias", bias)))
