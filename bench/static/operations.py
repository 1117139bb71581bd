"""The kernels of ordinary PyTorch code, counted from the aten operations that it dispatches.

A dispatched operation counts as one kernel, unless it is a view, an allocation, or metadata. This count is a lower
bound: on a GPU some operations are several kernels (a split product and its reduction, the fill before
nll_loss_backward's scatter), and none is less than one. Bytes are compulsory: each tensor is read or written once.
FLOPs of products are those of torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .work import Work, touched

__all__ = ["Operation", "OperationCounter"]

_aten = torch.ops.aten

# No kernel: these allocate memory or change metadata. (Views say so themselves.)
_NO_KERNEL = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.detach,
    _aten.alias, _aten.lift_fresh, _aten._unsafe_view, _aten._local_scalar_dense, _aten.is_same_size,
    _aten.set_, _aten.resize_,
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An operation that counts as one kernel.

    Attributes:
        name: such as aten.addmm.
        work: FLOPs and compulsory bytes.
        product: (M, N, K) of a matrix product, else None.
        itemsize: bytes of an element of its first tensor.
        tensors: the memory that it touches, by identity of the storage: bytes.
    """

    name: str
    work: Work
    product: tuple[int, int, int] | None = None
    itemsize: int = 4
    tensors: dict[int, int] = field(default_factory=dict, compare=False)


class OperationCounter(TorchDispatchMode):
    """Within the ``with`` block, ``operations`` gets every operation that PyTorch dispatches to a kernel.

    It works on fake tensors too (torch._subclasses.FakeTensorMode), which have shapes and no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if func.namespace == "aten" and not func.is_view and packet not in _NO_KERNEL:
            tensors = _tensors((args, kwargs, result))
            product = None
            if packet in (_aten.mm, _aten.addmm):
                (m, k), n = args[-2].shape, args[-1].shape[1]
                product = m, n, k
            self.operations.append(
                Operation(
                    f"aten.{packet.__name__}",
                    _work(func, args, kwargs, result),
                    product,
                    args[-1].element_size() if product else tensors[0].element_size() if tensors else 4,
                    {t.untyped_storage()._cdata: touched(t) for t in tensors},
                )
            )
        return result


def _tensors(values: Any) -> list[Tensor]:
    """The distinct tensors in a structure of arguments."""
    return list({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())


def _nll_loss_forward(args: tuple[Any, ...]) -> int:
    return args[1].numel() * args[0].element_size() + touched(args[1])  # one log probability per row


def _nll_loss_backward(args: tuple[Any, ...]) -> int:
    return touched(args[0], args[2])  # the upstream scalar and the labels


#: Operations that read only a part of their arguments, with the bytes that they read.
_READ: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _aten.nll_loss_forward: _nll_loss_forward,
    _aten.nll_loss_backward: _nll_loss_backward,
    _aten.index: lambda args: sum(
        rows.numel() * (args[0].numel() // args[0].shape[0] * args[0].element_size() + rows.element_size())
        for rows in args[1]
    ),
    _aten.ones_like: lambda args: 0,
    _aten.zeros_like: lambda args: 0,
    _aten.full_like: lambda args: 0,
    _aten.fill_: lambda args: 0,
    _aten.zero_: lambda args: 0,
    _aten.copy_: lambda args: touched(args[1]),
    _aten.sigmoid_backward: lambda args: touched(args[0], args[1]),
}


def _work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Work:
    packet = func.overloadpacket
    changed: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        # Fused optimizers write the gradients only to unscale them.
        unscaled = packet is _aten._fused_sgd_ and argument.name == "grads" and kwargs.get("grad_scale") is None
        if argument.alias_info is not None and argument.alias_info.is_write and not unscaled:
            changed += _tensors(value)
    given = {id(t) for t in _tensors((args, kwargs))}
    fresh = [t for t in _tensors(result) if id(t) not in given]
    if packet in _READ:
        read = _READ[packet](args)
    else:
        read = sum(touched(t) for t in _tensors((args, kwargs)))
    flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    written = sum(touched(t) for t in [*changed, *fresh])
    elements = sum(t.numel() for t in [*changed, *fresh])
    return Work(flops, 0 if flops else elements, read, written, elements)
