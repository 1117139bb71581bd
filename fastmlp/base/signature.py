"""A number for all that launches depend on of their tensors.

Equal numbers mean that every tensor has the same dtype, shape, strides, alignment to 16 bytes and device, or is None in
both calls. A view that negates, such as ``z.conj().imag``, has another number, and tensors without strides or memory,
such as sparse ones, have a new number in each call. To read these properties of the tensors of a whole network takes as
long as to launch a kernel. Where the caller names an object that calls of the same kind share, such as a weight,
torch's guards compare the tensors with those of the call before in one call of C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST", "Signature", "comparison", "guards", "signature"]

#: Entries of a table of signatures, or of known calls or launches. One more, and the table is emptied.
MOST = 4096

Signature = int

_is_nested: Callable[[Any], bool] = Tensor.is_nested.__get__  # type: ignore[attr-defined]
_numbers: dict[tuple[Any, ...], Signature] = {}
_next = count()
#: By the shared object, the number of tensors, and the shape of the first one: the signature, which tensors are None,
#: and a function that compares the others with those of the call that got the signature, which were aligned.
_seen: dict[tuple[Any, ...], tuple[Signature, list[bool], Callable[..., bool]]] = {}


def signature(tensors: Sequence[Tensor | None], shared: object = None) -> Signature:
    """The number of the tensors, of which the first one is not None."""
    if shared is None:
        number = _number(tensors)
        return next(_next) if number is None else number
    try:
        place = id(shared), len(tensors), tensors[0].shape  # type: ignore[union-attr]
    except RuntimeError:  # a nested tensor has no shape
        return next(_next)
    absent, present = [t is None for t in tensors], [t for t in tensors if t is not None]
    seen = _seen.get(place)
    if seen is not None and seen[1] == absent and seen[2](*present) and _aligned(present):
        return seen[0]
    number = _number(tensors)
    if number is None:
        return next(_next)
    if _aligned(present):
        if len(_seen) >= MOST:
            _seen.clear()
        _seen[place] = number, absent, comparison(present)
    return number


def _number(tensors: Sequence[Tensor | None]) -> Signature | None:
    """``signature``, by reading every property; None where a tensor has no strides or no memory."""
    try:
        found = tuple(
            [
                None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() & 15, t.device, t.is_neg())
                for t in tensors
            ]
        )
    except RuntimeError:
        return None
    number = _numbers.get(found)
    if number is None:
        if len(_numbers) >= MOST:
            _numbers.clear()
        number = _numbers[found] = next(_next)
    return number


def _aligned(tensors: Sequence[Tensor]) -> bool:
    addresses = 0
    for t in tensors:
        addresses |= t.data_ptr()
    return not addresses & 15


def comparison(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that says whether other tensors, as many, have the properties of these.

    The properties are type, dtype, shape, strides, device, `requires_grad` and the keys of torch's dispatcher, by which
    views that negate differ from others. The answer is False for what is no tensor and where a tensor is given twice.
    It may be False for tensors that have the properties, such as inside autocast. A tensor of torch.inference_mode and
    another one inside of the mode are alike.
    """
    guard = guards(tensors)

    def alike(*others: Any) -> bool:
        try:
            return not any(map(_is_nested, others)) and guard(*others)
        except TypeError:  # no tensor
            return False

    return alike


def guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """``comparison`` by torch alone, without a call of Python. A nested tensor without strides ends the process."""
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    of_dynamo = torch._C._dynamo.guards.TensorGuards
    check: Callable[..., bool] = of_dynamo(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check
