"""Two checks that Triton's interpreter lacks: other orders of programs, and pointers outside every tensor.

``programs`` runs the programs of each launch in another order, or only some of them. ``bounds_checked`` makes a load or
store outside every tensor argument of its kernel an error. The interpreter alone would read or overwrite other memory.

Inside the ``with`` block, both replace Triton's GridExecutor, which runs the loop over the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

__all__ = ["Order", "bounds_checked", "programs", "shuffled"]

#: From a kernel's name and the number of its programs to the linear ids of those to run, in their order.
Order = Callable[[str, int], Sequence[int]]


def shuffled(seed: int) -> Order:
    """Every program once, in a random order that differs between launches."""
    rng = np.random.default_rng(seed)
    return lambda name, count: rng.permutation(count)


@contextmanager
def programs(order: Order) -> Iterator[None]:
    """Run the programs that ``order`` names, in its order; id = (x * grid_y + y) * grid_z + z."""

    class Ordered(GridExecutor):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            if callable(self.grid):
                raise NotImplementedError("a grid that is a function of the arguments")
            full = (*self.grid, 1, 1)[:3]
            chosen = order(self.fn.__name__, full[0] * full[1] * full[2])
            # The executor's own loop counts over the chosen programs; the kernel is told the whole grid.
            self.grid = (len(chosen),)
            builder = interpreter_builder
            builder.set_grid_dim = lambda *_: type(builder).set_grid_dim(builder, *full)
            builder.set_grid_idx = lambda i, *_: type(builder).set_grid_idx(
                builder, *(int(n) for n in np.unravel_index(int(chosen[i]), full))
            )
            try:
                super().__call__(*args, **kwargs)
            finally:
                del builder.set_grid_dim, builder.set_grid_idx

    with _executor(Ordered):
        yield


@contextmanager
def bounds_checked() -> Iterator[None]:
    """Raise IndexError in a kernel that reads or writes outside the extent of every tensor it was given.

    (The caller sees an InterpreterError of the interpreter with the IndexError as its cause.) The extent is that of the
    view, from its first element to its last, so a neighbour in the same storage is out of bounds. Gaps between the
    elements of a strided view are not checked.
    """

    class Checked(GridExecutor):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            extents = _merged([_extent(t) for t in _tensors((args, tuple(kwargs.values()))) if t.numel()])
            builder = interpreter_builder

            def load(ptrs: TensorHandle, mask: TensorHandle, other: Any, *options: Any) -> TensorHandle:
                _check(ptrs, mask, extents, "load")
                return type(builder).create_masked_load(builder, ptrs, mask, other, *options)

            def store(ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any) -> None:
                _check(ptrs, mask, extents, "store")
                type(builder).create_masked_store(builder, ptrs, value, mask, *options)

            def atomic(
                op: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *options: Any
            ) -> TensorHandle:
                _check(ptr, mask, extents, "atomic")
                return type(builder).create_atomic_rmw(builder, op, ptr, val, mask, *options)

            builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
            try:
                super().__call__(*args, **kwargs)
            finally:
                del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    with _executor(Checked):
        yield


@contextmanager
def _executor(mixin: type[GridExecutor]) -> Iterator[None]:
    """Put ``mixin`` before the executor in force, so that blocks nest."""
    before = interpreter.GridExecutor
    interpreter.GridExecutor = type(mixin.__name__, (mixin, before), {})
    try:
        yield
    finally:
        interpreter.GridExecutor = before


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _tensors(argument)
    elif isinstance(arguments, Tensor):
        yield arguments


def _extent(t: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a view to the one after its last."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _merged(extents: list[tuple[int, int]]) -> np.ndarray:
    """Disjoint extents [n, 2] in ascending order."""
    out: list[list[int]] = []
    for low, high in sorted(extents):
        if out and low <= out[-1][1]:
            out[-1][1] = max(high, out[-1][1])
        else:
            out.append([low, high])
    return np.array(out, np.uint64).reshape(-1, 2)


def _check(ptrs: TensorHandle, mask: TensorHandle, extents: np.ndarray, what: str) -> None:
    active = np.broadcast_to(mask.data, ptrs.data.shape)
    addresses = ptrs.data[active].astype(np.uint64)
    if not addresses.size:
        return
    size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
    block = np.searchsorted(extents[:, 0], addresses, side="right") - 1
    inside = (block >= 0) & (addresses + size <= extents[np.maximum(block, 0), 1]) if len(extents) else block >= 0
    if not inside.all():
        where = np.argwhere(active)[np.flatnonzero(~inside)[0]].tolist()
        raise IndexError(
            f"{what} of {int((~inside).sum())} elements outside every tensor argument, the first at {where} of a "
            f"block of shape {list(ptrs.data.shape)}, program {interpreter_builder.grid_idx}"
        )
