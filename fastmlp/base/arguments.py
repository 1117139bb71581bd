"""Validation of arguments: every error says what came, what was expected and what to do.

The exceptions are of the types that torch raises for the same mistake, so code that catches torch's keeps working.
Each function returns nothing; it runs on every call, so the good case costs a few attribute reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, LAYER_ACTIVATIONS

__all__ = [
    "check_activation",
    "check_batch",
    "check_classes",
    "check_input",
    "check_layer",
    "check_layer_activation",
    "check_linear",
    "check_same_device",
    "check_tensor",
]


def check_activation(activation: object) -> None:
    """ValueError unless ``activation`` is the name of an elementwise activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def check_layer_activation(activation: object) -> None:
    """ValueError unless ``activation`` is the name of an elementwise activation or "softmax"."""
    if activation not in LAYER_ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; expected one of {', '.join(LAYER_ACTIVATIONS)}")


def check_tensor(value: object, name: str) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} to be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor"
        )


def check_same_device(named: Sequence[tuple[str, Tensor | None]]) -> None:
    """RuntimeError unless all the given tensors are on one device."""
    first_name, first = next((n, t) for n, t in named if t is not None)
    for name, tensor in named:
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"expected all tensors to be on the same device, but {first_name} is on {first.device} and {name} on "
                f"{tensor.device}; move one of them with .to(device)"
            )


def check_classes(y: Tensor, classes: int) -> None:
    """IndexError unless all of ``y``, int64 and not empty, are class numbers in [0, classes)."""
    low, high = (int(value) for value in torch.aminmax(y))
    if not 0 <= low <= high < classes:
        bad = low if low < 0 else high
        raise IndexError(f"class number {bad} is out of range; the model has classes 0 to {classes - 1}")


def _names(layer: int | None) -> tuple[str, str]:
    """What an error calls W and b: put together only for an error."""
    return ("weight", "bias") if layer is None else (f"weights[{layer}]", f"biases[{layer}]")


def check_layer(weight: Tensor, bias: Tensor | None, layer: int | None = None) -> None:
    """Check W [N, K] and b [N], those of the layer of that number among several, against each other.

    Raises:
        TypeError: not tensors.
        RuntimeError: wrong rank or shape, dtypes that differ or are not floating-point, different devices.
    """
    if not isinstance(weight, Tensor):
        check_tensor(weight, _names(layer)[0])
    if weight.dim() != 2:
        raise RuntimeError(
            f"expected {_names(layer)[0]} of shape [out_features, in_features], got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise RuntimeError(
            f"expected a floating-point {_names(layer)[0]}, got {weight.dtype}; convert it with .float()"
        )
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        check_tensor(bias, _names(layer)[1])
    if bias.dim() != 1 or bias.size(0) != weight.size(0):
        w, b = _names(layer)
        raise RuntimeError(
            f"expected {b} of shape [{weight.shape[0]}], one value for each row of {w} {list(weight.shape)}, got "
            f"{list(bias.shape)}"
        )
    if bias.dtype != weight.dtype:
        w, b = _names(layer)
        raise RuntimeError(
            f"expected {b} and {w} of the same dtype, got {bias.dtype} and {weight.dtype}; convert one of them with "
            ".to(dtype)"
        )
    if bias.device != weight.device:
        check_same_device(tuple(zip(_names(layer), (weight, bias), strict=True)))


def check_input(x: Tensor, weight: Tensor, weight_name: str = "weight") -> None:
    """Check X [*, K] against W [N, K].

    Raises:
        RuntimeError: wrong rank, feature count, dtype or device, as torch.nn.functional.linear.
    """
    if x.dim() == 0:
        raise RuntimeError(
            "expected an input with at least 1 dimension, [*, in_features], got a 0-d tensor; reshape it"
        )
    if x.size(-1) != weight.size(1):
        raise RuntimeError(
            f"expected an input with {weight.shape[1]} features ({weight_name} is {list(weight.shape)}), got "
            f"{x.shape[-1]} from an input of shape {list(x.shape)}; reshape the input or build the layer with "
            f"in_features={x.shape[-1]}"
        )
    if x.dtype != weight.dtype and x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise RuntimeError(
                f"expected a floating-point input or uint8 pixels, got {x.dtype}; convert it with "
                f".to({weight.dtype}), or with .to(torch.uint8) if the values are pixels from 0 to 255"
            )
        raise RuntimeError(
            f"expected input and {weight_name} of the same dtype, got {x.dtype} and {weight.dtype}; "
            f"convert the input with .to({weight.dtype}), or use torch.autocast"
        )
    if x.device != weight.device:
        check_same_device((("the input", x), (weight_name, weight)))


def check_batch(x: Tensor, features: int) -> None:
    """Check that X is a tensor [batch, K] or [batch, ...]: TypeError or RuntimeError."""
    check_tensor(x, "the input")
    if x.dim() < 2:
        raise RuntimeError(
            f"expected an input of shape [batch, {features}] or [batch, ...], got {list(x.shape)}; "
            "add a batch dimension with x.unsqueeze(0)"
        )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the arguments of A = f(X W^T + b); errors as ``check_layer`` and ``check_input``."""
    check_layer(weight, bias)
    check_input(x, weight)


def check_rows(order: Tensor, rows: int) -> None:
    """IndexError unless all of a non-empty ``order`` are rows of data that has so many; waits for a GPU."""
    least, most = int(order.min()), int(order.max())
    if least < 0 or most >= rows:
        raise IndexError(f"order has rows from {least} to {most}, but the data has rows 0 to {rows - 1}")


def readable_rows(order: Tensor, rows: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """``order`` with the nearest of ``rows`` rows (at least one) for those out of range, and which steps had such.

    Nothing waits for a GPU. The second tensor is bool [ceil(n / batch_size)].
    """
    readable = order.clamp(0, rows - 1)
    outside = torch.nn.functional.pad(readable != order, (0, -order.shape[0] % batch_size))
    return readable, outside.view(-1, batch_size).any(1)
