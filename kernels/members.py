"""Members: E models of one shape in the same launches, a program of the grid's z axis for each.

A tensor of members has one axis more, in front: W [E, N, K], b [E, N], X [E, M, K]. A tensor without that axis is the
same for all members, and is read E times with a stride of 0. A kernel takes a named tuple ``members`` with the number
of elements from one member to the next, and moves its pointers in its first statements. A single model has None in the
place of the tuple, which is no argument and no code.

``active_ptr`` points to one bool per member, or is None. Programs of a member that is not active return at once: they
read and write nothing, so that the member stays as it is bit by bit, and costs next to nothing. The pointer is no part
of the tuple, because Triton 3.6 cannot compare a tuple that has None in it with None.

Member strides are multiplied in int64. A grid has at most ``MOST`` programs along z.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = ["MOST", "count_of", "inactive", "stride_of"]

#: The most programs that CUDA and HIP launch along the z axis.
MOST = 65_535


@triton.jit
def inactive(active_ptr, member):
    """Whether the programs of the member have nothing to do."""
    if active_ptr is None:
        return False
    else:
        return tl.load(active_ptr + member) == 0


def count_of(weight: Any) -> int | None:
    """The number of members of a weight [E, N, K]; None for a weight [N, K], which is a single model.

    Raises:
        ValueError: more members than a grid has room for.
    """
    if weight.dim() == 2:
        return None
    members: int = weight.shape[0]
    if members > MOST:
        raise ValueError(
            f"expected at most {MOST:,} members, since a launch has no more programs along its z axis, got "
            f"{members:,}; train them as several ensembles"
        )
    return members


def stride_of(tensor: Any, dims: int) -> int:
    """Elements from one member to the next of a tensor with ``dims`` axes per member; 0 for None and shared tensors."""
    if tensor is None or tensor.dim() == dims or tensor.shape[0] == 1:
        return 0
    stride: int = tensor.stride(0)
    return stride
