"""Whether tensors that are written to lie apart in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def sharing(named: Sequence[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two tensors that are one, or of which one begins within another, contiguous one; else None.

    Tensors that are not contiguous may share elements without being found, because they may also lie in each other's
    gaps.
    """
    seen: dict[int, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, tensor in named:
        if id(tensor) in seen:
            return seen[id(tensor)], name
        seen[id(tensor)] = name
        begin = tensor.data_ptr()
        if begin:  # empty tensors, and those on "meta", have no address
            elements = tensor.numel() if tensor.is_contiguous() else 1
            spans.append((begin, begin + elements * tensor.element_size(), name))
    end, owner = 0, ""
    for begin, own_end, name in sorted(spans):
        if begin < end:
            return owner, name
        if own_end > end:
            end, owner = own_end, name
    return None
