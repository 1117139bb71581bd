"""Validation of arguments: every error says what came, what was expected and what to do.

The exceptions are of the types that torch raises for the same mistake, so code that catches torch's keeps working.
Most functions return nothing. They run on every call, so the good case costs a few attribute reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..activations import LAYER_ACTIVATIONS
from .compat import is_autocast_enabled
from .names import unknown

#: Dtypes of labels.
LABELS = (torch.int64, torch.uint8)
REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_activation(activation: object, known: Collection[str] = LAYER_ACTIVATIONS) -> None:
    """ValueError unless ``activation`` is one of the ``known`` names."""
    if activation not in known:
        raise ValueError(unknown("activation", activation, known))


def check_tensor(value: object, name: str) -> None:
    """TypeError unless ``value`` is a tensor; RuntimeError for a nested one that has no shape."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} to be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor"
        )
    if value.__class__ is Tensor and value.is_nested:  # of layout torch.strided, and so without a shape
        raise RuntimeError(
            f"expected {name} to have a shape, got a nested tensor; use to_padded_tensor(0.0), or make one call for "
            "each tensor of unbind()"
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


def check_classes(
    y: Tensor,
    classes: int,
    message: str = "class number {bad} is out of range; expected classes 0 to {last}, got {low} to {high}",
    *,
    ignore_index: int | None = None,
) -> None:
    """IndexError unless all of ``y``, integers and not empty, are in [0, classes) or ``ignore_index``.

    ``message`` may name {classes}, {last} = classes - 1, {ignore_index}, the range {low} and {high} of y, the first
    label {bad} that is no class, and where {at} that label is.
    """
    low, high = (int(value) for value in torch.aminmax(y))
    if low >= 0 and high < classes:
        return
    wrong = (y < 0) | (y >= classes)
    if ignore_index is not None:
        wrong &= y != ignore_index
        if not wrong.any():
            return
    where = wrong.nonzero()[0].tolist()
    at = f" at position {where[0] if len(where) == 1 else where}" if where else ""
    facts = {"classes": classes, "last": classes - 1, "low": low, "high": high, "ignore_index": ignore_index}
    raise IndexError(message.format(bad=y[tuple(where)].item(), at=at, **facts))


def check_reduction(reduction: object) -> None:
    """ValueError unless ``reduction`` is one of torch's three."""
    if reduction not in REDUCTIONS:
        raise ValueError(unknown("reduction", reduction, REDUCTIONS))


def check_values(input: Tensor, target: Tensor, reduction: str, *, broadcasts: bool = False) -> None:
    """Check that both are floating-point, of one shape and on one device.

    Raises:
        TypeError: not tensors.
        ValueError: an unknown reduction, shapes that differ (RuntimeError where torch ``broadcasts`` and cannot).
        RuntimeError: dtypes that are not floating-point, NotImplementedError where torch raises that; two devices.
    """
    check_tensor(input, "the input")
    check_tensor(target, "the target")
    check_reduction(reduction)
    if input.shape != target.shape:
        kind = RuntimeError if broadcasts and _broadcast(target.shape, input.shape) is None else ValueError
        raise kind(
            f"expected a target of the input's shape {list(input.shape)}, got {list(target.shape)}; use "
            "target.expand_as(input) if it should be repeated"
        )
    for name, tensor in (("input", input), ("target", target)):
        if not tensor.is_floating_point():
            integers = name == "target" and tensor.dtype not in (torch.bool, torch.complex64, torch.complex128)
            raise (RuntimeError if integers else NotImplementedError)(
                f"expected a floating-point {name}, got {tensor.dtype}; convert it with .float()"
            )
    if input.device != target.device:
        check_same_device((("the input", input), ("the target", target)))


def _broadcast(*shapes: torch.Size) -> torch.Size | None:
    """The shape that tensors of these shapes have together, or None."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def check_factors(input: Tensor, *, same_shape: bool, **factors: Tensor | None) -> None:
    """Check weights of a loss of single elements against its input.

    Raises:
        TypeError: not tensors.
        ValueError: with ``same_shape``, another shape than the input's.
        RuntimeError: a shape that does not broadcast to the input's; another device.
    """
    for name, factor in factors.items():
        if factor is None:
            continue
        check_tensor(factor, name)
        if same_shape and factor.shape != input.shape:
            raise ValueError(f"expected {name} of the input's shape {list(input.shape)}, got {list(factor.shape)}")
        if _broadcast(factor.shape, input.shape) != input.shape:
            raise RuntimeError(
                f"expected {name} of a shape that broadcasts to the input's {list(input.shape)}, such as "
                f"{list(input.shape[-1:])}, got {list(factor.shape)}"
            )
    check_same_device((("the input", input), *factors.items()))


def check_delta(delta: object) -> float:
    """The threshold of the Huber loss as a float: TypeError for no number, RuntimeError unless it is above 0."""
    if not isinstance(delta, (int, float)):
        if isinstance(delta, str) or not hasattr(delta, "__float__"):
            raise TypeError(f"expected delta to be a number, got {delta!r} of type {type(delta).__name__}")
        delta = float(delta)
    if not delta > 0:
        raise RuntimeError(f"expected delta to be above 0, got {delta}")
    return delta


def check_value_target(input: Tensor, target: Tensor, reduction: str) -> None:
    """``check_values``, and RuntimeError for dtypes that differ."""
    check_values(input, target, reduction)
    if input.dtype != target.dtype:
        raise RuntimeError(
            f"expected input and target of the same dtype, got {input.dtype} and {target.dtype}; convert the target "
            f"with .to({input.dtype})"
        )


def check_class_target(input: Tensor, target: Tensor, reduction: str) -> None:
    """ValueError or RuntimeError unless logits [*, C] have labels [*] of a dtype of labels, on one device."""
    check_reduction(reduction)
    if not input.is_floating_point():
        raise RuntimeError(f"expected floating-point logits, got {input.dtype}; convert them with .float()")
    if target.dtype not in LABELS:
        raise RuntimeError(f"expected labels in int64 or uint8, got {target.dtype}; convert them with .long()")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"expected labels of shape {list(input.shape[:-1])} for logits {list(input.shape)}, or values of shape "
            f"{list(input.shape)} in {input.dtype}, got {list(target.shape)} in {target.dtype}"
        )
    check_same_device((("the input", input), ("the target", target)))


def check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> None:
    """All that cross-entropy can see without looking at values; ``functional.cross_entropy`` names the exceptions."""
    if weight is not None:
        check_tensor(weight, "weight")
    if not isinstance(ignore_index, int):
        raise TypeError(f"expected ignore_index to be an int, got {type(ignore_index).__name__}")
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"expected label_smoothing to be a float, got {type(label_smoothing).__name__}")
    check_reduction(reduction)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if input.dtype not in _FLOATS:
        raise NotImplementedError(f"expected floating-point logits, got {input.dtype}; convert them with .float()")
    if target.device != input.device or (weight is not None and weight.device != input.device):
        check_same_device((("the input", input), ("the target", target), ("weight", weight)))
    if input.shape == target.shape:
        _check_probabilities(input, target, ignore_index)
    else:
        _check_label_shape(input, target)
        if target.dtype not in LABELS:
            raise RuntimeError(
                f"expected labels of dtype int64 or uint8, got {target.dtype}; convert them with .long(), or give "
                f"class probabilities of the input's shape {list(input.shape)}"
            )
    if weight is not None:
        _check_weight(input, target, weight)


def _check_probabilities(input: Tensor, target: Tensor, ignore_index: int) -> None:
    if input.dim() == 0:
        raise RuntimeError("expected logits of shape [C], [N, C] or [N, C, d1, ...], got a 0-d tensor")
    if target.dtype not in _FLOATS:
        raise RuntimeError(
            f"expected floating-point class probabilities, because the target has the input's shape "
            f"{list(input.shape)}, got {target.dtype}; labels have one dimension less, without the classes"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is for labels, got ignore_index={ignore_index} with class probabilities; "
            "leave it out, or give those rows a probability of 0 everywhere"
        )


def _check_label_shape(input: Tensor, target: Tensor) -> None:
    if input.dim() == 2 and target.dim() == 1 and input.shape[0] == target.shape[0] and input.shape[1] > 0:
        return
    got = f"input {list(input.shape)} and target {list(target.shape)}"
    if input.dim() == 0:
        raise RuntimeError(f"expected logits of shape [C], [N, C] or [N, C, d1, ...], got {got}")
    if input.dim() <= 2 and target.dim() > 1:
        raise RuntimeError(f"expected labels [N] for logits [N, C], or probabilities of the input's shape, got {got}")
    if input.dim() == 1:
        if target.numel() != 1:
            raise ValueError(f"expected one label for logits [C], got {got}")
    elif target.dim() == 0 or input.shape[0] != target.shape[0]:
        raise ValueError(f"expected as many labels as rows (the batch size), got {got}")
    elif input.shape[:1] + input.shape[2:] != target.shape:
        raise RuntimeError(f"expected labels [N, d1, ...] for logits [N, C, d1, ...], got {got}")
    if input.shape[min(1, input.dim() - 1)] == 0 and target.numel() > 0:
        raise IndexError(f"there are no classes for a label to name: got {got}")


def _check_weight(input: Tensor, target: Tensor, weight: Tensor) -> None:
    classes = input.shape[min(1, input.dim() - 1)]
    if weight.dim() != 1 or weight.numel() != classes:
        raise RuntimeError(f"expected weight of shape [{classes}], one value for each class, got {list(weight.shape)}")
    if target.is_floating_point() or is_autocast_enabled(input.device.type):
        return
    if weight.dtype != input.dtype:
        raise RuntimeError(
            f"expected weight in the input's dtype {input.dtype}, got {weight.dtype}; convert one of them"
        )


def _names(layer: int | None) -> tuple[str, str]:
    """What an error calls W and b: put together only for an error."""
    return ("weight", "bias") if layer is None else (f"weights[{layer}]", f"biases[{layer}]")


def check_layer(weight: Tensor, bias: Tensor | None, layer: int | None = None) -> None:
    """Check W [N, K] and b [N] against each other; ``layer`` is the layer's number where there are several.

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


def check_network(weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]) -> None:
    """Check each layer by itself, and against the layer below.

    Raises:
        ValueError: no layers, or not as many weights as biases and activations.
        RuntimeError: shapes, dtypes or devices that do not fit; and what ``check_layer`` raises.
    """
    if not len(weights) == len(biases) == len(activations) or not weights:
        raise ValueError(
            f"expected as many weights as biases and activations, at least one of each, got {len(weights)} weights, "
            f"{len(biases)} biases and {len(activations)} activations"
        )
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_layer(weight, bias, layer)
        if layer == 0:
            continue
        below = weights[layer - 1]
        if weight.size(1) != below.size(0):
            raise RuntimeError(
                f"expected weights[{layer}] of shape [out_features, {below.shape[0]}] to follow weights[{layer - 1}] "
                f"of shape {list(below.shape)}, got {list(weight.shape)}"
            )
        if weight.dtype != below.dtype or weight.device != below.device:
            raise RuntimeError(
                f"expected all layers of one dtype on one device, got weights[{layer - 1}] in {below.dtype} on "
                f"{below.device} and weights[{layer}] in {weight.dtype} on {weight.device}; convert one with .to(...)"
            )


def check_members(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], members: int
) -> None:
    """Check the stacked parameters of an ensemble, and each layer as ``check_network`` does.

    Raises:
        ValueError: no layers, or not as many weights as biases and activations.
        RuntimeError: weights other than [members, N, K] or biases other than [members, N]; what ``check_network``
            raises.
    """
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=False)):
        for place, (tensor, dims) in enumerate(((weight, 3), (bias, 2))):
            if tensor is None and dims == 2:
                continue
            if not isinstance(tensor, Tensor) or tensor.dim() != dims or tensor.size(0) != members:
                name, shape = _names(layer)[place], f"[{members}, out_features{', in_features' * (dims - 2)}]"
                check_tensor(tensor, name)
                got = None if tensor is None else list(tensor.shape)
                raise RuntimeError(f"expected {name} of shape {shape} for {members} members, got {got}")
    below = None
    fits = len(weights) == len(biases) == len(activations) > 0
    for weight, bias in zip(weights, biases, strict=False):
        first = weights[0]
        fits &= weight.dtype == first.dtype and weight.device == first.device and weight.is_floating_point()
        fits &= below is None or weight.size(2) == below.size(1)
        if bias is not None:
            fits &= bias.dtype == first.dtype and bias.device == first.device and bias.size(1) == weight.size(1)
        below = weight
    if not fits:  # all members have these shapes and dtypes, so a check of the last one finds what does not fit
        check_network([w[-1] for w in weights], [None if b is None else b[-1] for b in biases], activations)


def check_members_input(x: Tensor, weight: Tensor) -> None:
    """RuntimeError unless X is [M, K], or [E, M, K] for W [E, N, K], of a dtype and on a device that fits."""
    members, features = weight.size(0), weight.size(2)
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.size(0) != members):
        raise RuntimeError(
            f"expected an input of shape [batch, {features}], the same for all members, or [{members}, batch, "
            f"{features}], got {list(x.shape)}; flatten images with x.flatten(1)"
        )
    if x.size(-1) != features or x.dtype != weight.dtype or x.device != weight.device:
        check_input(x, weight[-1], "the weight of a member")


def check_rows(order: Tensor, rows: int) -> None:
    """IndexError unless every entry of ``order``, which is not empty, is in [0, rows); waits for a GPU."""
    least, most = int(order.min()), int(order.max())
    if least < 0 or most >= rows:
        raise IndexError(f"order has rows from {least} to {most}, but the data has rows 0 to {rows - 1}")


def readable_rows(order: Tensor, rows: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """``order`` with the nearest row in place of each entry out of range, and which steps had such entries.

    ``rows``, the number of rows, is at least 1. Nothing waits for a GPU. The second tensor is bool
    [ceil(n / batch_size)].
    """
    readable = order.clamp(0, rows - 1)
    outside = torch.nn.functional.pad(readable != order, (0, -order.shape[0] % batch_size))
    return readable, outside.view(-1, batch_size).any(1)
