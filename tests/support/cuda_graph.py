"""CUDA graphs on the simulated GPU: CPU tensors are the device's, and a capture executes nothing.

A capture records every kernel launch and every torch operation with its addresses. It refuses what a GPU refuses:
waiting for the device, copies from the host's memory, a kernel that was not loaded before, a capture inside a capture.
Tensors made during the capture belong to the graph's pool. A replay executes what was recorded, at the recorded
addresses. So values that Python computed are those of the capture, and a replay after the memory was freed is an error.

Before a replay, everything that the graph writes is poisoned, except the buffers declared with ``SimulatedCuda.keep``.
A graph that reads an activation, a partial sum or a tensor of the pool before writing it gets NaN.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import fastmlp.step.graphs
import fastmlp.step.triton_loss
import fastmlp.step.triton_step
import fastmlp.step.validation
from fastmlp import TrainStep
from tests.conftest import uninitialized_is_nan
from tests.ptxsim import SimulatedGPU
from tests.ptxsim.simulated_gpu import Launch, Launcher
from tests.support.cuda_standin import Graph, StandIn, needs_values

__all__ = ["SimulatedCuda"]

_WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__float__),
    *(Tensor.__int__, Tensor.__index__, torch.nonzero, torch.equal, torch.allclose, torch.is_nonzero),
}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}


def refused(what: str) -> RuntimeError:
    return RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


@dataclass(frozen=True)
class _Pointer:
    """Where a tensor was when a graph recorded it; like an address, it keeps no memory alive."""

    address: int
    storage: StorageWeakRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def to(cls, t: Tensor) -> _Pointer:
        storage = StorageWeakRef(t.untyped_storage())
        return cls(t.data_ptr(), storage, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)

    def tensor(self) -> Tensor:
        storage, offset = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata), self.offset
        if storage is None:
            storage = self._successor()
            offset = (self.address - storage.data_ptr()) // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype).set_(storage, offset, self.size, self.stride)

    def bytes(self, count: int) -> Tensor:
        """The memory that begins at the address."""
        t = self.tensor()
        return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage(), t.storage_offset() * t.itemsize, (count,))

    def _successor(self) -> torch.UntypedStorage:
        """The memory of a tensor of this dtype that was made at the address after the first one was freed."""
        # The type itself: a proxy of an object that is gone raises an error when it is asked for its class.
        for t in (o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.dtype == self.dtype):
            try:
                storage = t.untyped_storage()
                begin = storage.data_ptr()
            except (RuntimeError, NotImplementedError):  # a tensor without memory, sparse or fake, of another test
                continue
            if begin <= self.address < begin + storage.nbytes():
                return storage
        raise RuntimeError(f"the graph uses a {self.dtype} tensor {self.size} that was freed since its capture")


def _pointers(tree: Any) -> Any:
    return tree_map_only(Tensor, _Pointer.to, tree)


def _tensors(tree: Any) -> Any:
    return tree_map(lambda x: x.tensor() if isinstance(x, _Pointer) else x, tree)


@dataclass(frozen=True)
class KernelNode:
    """One launch of a Triton kernel."""

    launch: Launch  #: its arguments are pointers
    launcher: Launcher
    written: list[tuple[_Pointer, np.ndarray]]  #: and which bytes

    def poison(self, kept: set[int]) -> None:
        for place, written in self.written:
            if place.storage.cdata not in kept:
                place.bytes(len(written))[torch.from_numpy(written)] = 0xFF

    def run(self, cuda: SimulatedCuda) -> None:
        cuda.execute(dataclasses.replace(self.launch, arguments=_tensors(self.launch.arguments)), self.launcher)


@dataclass(frozen=True)
class OperationNode:
    """One torch operation: in place on tensors, or writing ``results``, which are the pool's."""

    operation: Any
    args: Any
    kwargs: Any
    results: list[_Pointer]

    def poison(self, kept: set[int]) -> None:
        changed = list(self.results)
        for i, argument in enumerate(self.operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                changed += [p for p in tree_leaves(value) if isinstance(p, _Pointer)]
        for place in changed:
            if place.storage.cdata not in kept:
                poison(place.tensor())

    def run(self, cuda: SimulatedCuda) -> None:
        results = self.operation(*_tensors(self.args), **_tensors(self.kwargs))
        if self.results:
            made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
            for place, value in zip(self.results, made, strict=True):
                place.tensor().copy_(value)


class _NoWaits(TorchFunctionMode):
    """Refuses calls that wait for the device, some of which are no torch operations on CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS or func in _FROM_HOST:
            raise refused(f"{getattr(func, '__name__', func)}: the host would wait")
        return func(*args, **(kwargs or {}))


def _allocated(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


class _Recording(TorchDispatchMode):
    """Operations become nodes of the graph; new tensors its memory."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if needs_values(func, args):
            raise refused(f"{func}: the host would wait")
        if func is torch.ops.aten.lift_fresh.default:
            raise refused("a tensor of the host's memory would be copied to the device")
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._graph.nodes.append(OperationNode(func, _pointers(args), _pointers(kwargs), []))
            return _written_arguments(func, args, kwargs)
        with FakeTensorMode(allow_non_fake_inputs=True):
            like = func(*args, **kwargs)
        new = tree_map_only(Tensor, self._allocate, like)
        if not func.__name__.startswith(("empty", "new_empty")):
            made = [_Pointer.to(t) for t in tree_leaves(new) if isinstance(t, Tensor)]
            self._graph.nodes.append(OperationNode(func, _pointers(args), _pointers(kwargs), made))
        return new

    def _allocate(self, like: Tensor) -> Tensor:
        t = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        poison(t)
        self._graph.memory.append(t)
        return t


def _written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operation that writes into its arguments returns: those arguments."""
    returned = []
    for result in func._schema.returns:
        for i, argument in enumerate(func._schema.arguments):
            same = argument.alias_info is not None and result.alias_info is not None
            if same and argument.alias_info.before_set == result.alias_info.before_set:
                returned.append(args[i] if i < len(args) else kwargs[argument.name])
    if len(returned) != len(func._schema.returns):
        raise NotImplementedError(f"{func} writes into its arguments and also returns something new")
    return returned[0] if len(returned) == 1 else tuple(returned) or None


def poison(t: Tensor) -> None:
    """NaN, or integers that nobody means."""
    if t.dtype == torch.bool:
        t.fill_(True)
    elif t.dtype == torch.uint8:
        t.fill_(0xA5)
    else:
        t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)


class _Gpu(SimulatedGPU):
    """Hands every launch to the stand-in."""

    def __init__(self, cuda: SimulatedCuda, arch: int, execute: bool) -> None:
        # Only with global_races does the simulator know what a kernel has written. Other lanes check shared memory.
        super().__init__(arch, execute, global_races=True, stats="written", uninit="off")
        self._cuda = cuda

    def submit(self, launch: Launch, launcher: Launcher) -> None:
        self._cuda.submit(launch, launcher)


class SimulatedCuda(StandIn):
    """One GPU that executes (``execute=False``: counts) launches on CPU tensors, with CUDA graphs.

    Attributes:
        launched: the kernels of the launches outside graphs. Their arguments are not kept: a graph has to keep its own.
    """

    device_type = "cpu"

    def __init__(self, arch: int = 80, *, execute: bool = True) -> None:
        super().__init__(devices=1)
        self._gpu = _Gpu(self, arch, execute)
        #: The code of the kernels that were launched outside a capture.
        self._loaded: set[Any] = set()
        #: By kernel, argument and shape: the bytes that were written.
        self._written: dict[Any, np.ndarray] = {}
        self.launched: list[str] = []
        self._kept: list[Callable[[], Iterable[Tensor]]] = []
        self._modes = ExitStack()

    def __enter__(self) -> SimulatedCuda:
        super().__enter__()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for module in (fastmlp.step.graphs, fastmlp.step.triton_step):
            if hasattr(module, "can_capture"):
                patch.setattr(module, "can_capture", lambda device: True)
        self._stack.enter_context(self._gpu)
        self._stack.enter_context(fastmlp.use_backend("triton"))
        for name in ("check_classes", "check_rows"):  # only a CPU looks at values
            patch.setattr(fastmlp.step.validation, name, lambda *_, **__: None)
        patch.setattr(fastmlp.step.triton_loss, "host_sees_labels", lambda device: False)
        if self._gpu.execute:
            self._stack.enter_context(uninitialized_is_nan())
        return self

    def keep(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Declare static buffers, whose values last from one replay to the next."""
        self._kept.append(tensors)

    def keep_state(self, step: TrainStep) -> TrainStep:
        """Declare what one step changes and the next one reads."""
        engine = step._engine

        def state() -> Iterable[Tensor]:
            yield from (*step.model.parameters(), *step.model.buffers(), *engine.layout.params)
            yield from (p.low_ptr for p in engine.layout.of_parameters if p.low_ptr is not None)
            counts = engine.rows.updates, None if engine.late is None else engine.late.count
            yield from (t for t in (*engine.states, *counts) if t is not None)
            if engine.loss_scale is not None:
                yield from (engine.loss_scale.scale, engine.loss_scale.inverse, engine.loss_scale.good_steps)
                yield engine.late.overflow

        self.keep(state)
        return step

    def submit(self, launch: Launch, launcher: Launcher) -> None:
        """A launch: executed, or recorded by a capture."""
        if self.capturing is None:
            self._loaded.add(launch.asm["ptx"])
            self.execute(launch, launcher)
            self.launched.append(launch.name)
        elif launch.asm["ptx"] not in self._loaded:
            raise refused(f"{launch.name} would be loaded")
        else:
            recorded = dataclasses.replace(launch, arguments=_pointers(launch.arguments))
            written = [
                (place, self._written[key])
                for name, place in launcher.parameters(recorded).items()
                if isinstance(place, _Pointer)
                if (key := (launch.asm["ptx"], launch.grid, name, place.size, place.stride)) in self._written
            ]
            self.capturing.nodes.append(KernelNode(recorded, launcher, written))

    def execute(self, launch: Launch, launcher: Launcher) -> None:
        if not self._gpu.execute:
            return
        launch.stats = launcher.execute(launch, self._gpu.launch_options)
        named = launcher.parameters(launch)
        for name, written in launch.stats.written.items():
            key = launch.asm["ptx"], launch.grid, name, tuple(named[name].shape), named[name].stride()
            self._written[key] = self._written[key] | written if key in self._written else written

    def begin_capture(self, graph: Graph) -> None:
        self._modes.enter_context(_NoWaits())
        self._modes.enter_context(_Recording(graph))
        # The kernels' launches allocate past all modes.
        self._modes.enter_context(mock.patch("fastmlp.kernels.launch._on_cpu", _allocated))

    def end_capture(self, graph: Graph) -> None:
        self._modes.close()

    def replay(self, graph: Graph) -> None:
        if not self._gpu.execute:
            return
        kept = {t.untyped_storage()._cdata for tensors in self._kept for t in tensors()}
        with torch.no_grad():
            for t in graph.memory:
                poison(t)
            kernels = [node for node in graph.nodes if isinstance(node, KernelNode)]
            for node in kernels:
                node.poison(kept)
            # An operation in place also touches what a kernel leaves alone, such as the padding between gradients.
            kept |= {place.storage.cdata for node in kernels for place, _ in node.written}
            for node in graph.nodes:
                if isinstance(node, OperationNode):
                    node.poison(kept)
            for node in graph.nodes:
                node.run(self)
