"""A machine with two GPUs that compute nothing; its fake tensors have a device, a shape and an address.

Inside ``with Machine() as machine:`` tensors on "cuda:0" and "cuda:1" can be made. Torch operations that mix devices
fail as they do on GPUs, and kernels are recorded instead of launched. Tensors on the CPU are real ones.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from fastmlp import backend
from tests.ptxsim import SimulatedGPU
from tests.support.cuda_standin import Device, Graph, StandIn, needs_values

__all__ = ["Launch", "Machine"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the device that was current, and the dtypes of the tensors among the arguments."""

    name: str
    device: int
    dtypes: tuple[torch.dtype, ...]
    captured: bool


class _FakeMode(FakeTensorMode):
    """Fake tensors that never initialize a GPU, for a machine whose torch.cuda only claims to have GPUs."""

    @property
    def avoid_device_init(self) -> bool:
        return True


class _Driver(SimulatedGPU):
    """The part of Triton's driver that the launchers use. The current device is torch's, as on a real machine."""

    def __init__(self, machine: Machine, arch: int) -> None:
        super().__init__(arch, execute=False)
        self._machine = machine

    def get_current_device(self) -> int:
        return self._machine.current


class _Watch(TorchDispatchMode):
    """Every torch operation passes through here. Operations on the CPU get real tensors, all others fake tensors."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine, kwargs = self._machine, dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_gpu = any(isinstance(t, FakeTensor) for t in given)
        device = kwargs.get("device")
        generator = kwargs.get("generator")
        if generator is not None and device is not None and generator.device.type != torch.device(device).type:
            raise RuntimeError(f"Expected a '{device}' device type for generator but found '{generator.device}'")
        if on_gpu and needs_values(func, args):
            machine.wait(f"{func}")
            if func is aten._local_scalar_dense.default:
                return {torch.bool: True}.get(given[0].dtype, 1.0 if given[0].is_floating_point() else 1)
            if func is aten.equal.default:
                return True
        if not on_gpu and (device is None or torch.device(device).type != "cuda"):
            return self._on_host(func, given, args, kwargs)
        self._check_copy(func, args, kwargs)
        if func.__name__.startswith("_fused_"):  # optimizers, for which torch has no fake kernels
            assert len({t.device for t in given}) == 1, f"{func} of tensors on several devices"
            return None
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0]
        return tree_map_only(Tensor, lambda t: self._placed(func, t), func(*args, **kwargs))

    def _on_host(self, func: Any, given: Sequence[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        machine = self._machine
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in machine.pinned
        pinned = bool(kwargs.get("pin_memory")) or func is aten._pin_memory.default
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        with unset_fake_temporarily():
            result = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in given}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and pinned:
                machine.pinned[t.untyped_storage()._cdata] = t  # kept, so that no other tensor gets its address
            elif isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                machine.created(func, t)
        return result

    def _check_copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the copies between host and GPU for which the host waits."""
        if func is aten.copy_.default:
            to, source, later = args[0], args[1], (*args, *kwargs.values())[2:3] == (True,)
        elif func is aten._to_copy.default and kwargs.get("device") is not None:
            to, source, later = None, args[0], kwargs.get("non_blocking", False)
        else:
            return
        device = torch.device(kwargs["device"]) if to is None else to.device
        if device.type == source.device.type:
            return
        host = to if device.type == "cpu" else source
        if not (later and host is not None and host.untyped_storage()._cdata in self._machine.pinned):
            self._machine.wait(f"{func} from {source.device} to {device}, not pinned or not non_blocking")

    def _placed(self, func: Any, t: Tensor) -> Tensor:
        if isinstance(t, FakeTensor) and t.device.type == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(t.shape, dtype=t.dtype)
        self._machine.created(func, t)
        return t


class Machine(StandIn):
    """Two GPUs.

    Attributes:
        launches: the launched kernels; the kernels of a capture are repeated for every replay.
        pinned: tensors in pinned memory, by the address of their storage.
    """

    def __init__(self, arch: int = 90) -> None:
        super().__init__(devices=2)
        self.launches: list[Launch] = []
        self.pinned: dict[int, Tensor] = {}
        self._driver = _Driver(self, arch)
        self._hot: torch.device | None = None
        self._host_allowed = False
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def patches(self) -> dict[str, Any]:
        here = {"is_available": lambda: True, "is_initialized": lambda: True, "is_bf16_supported": lambda *_: True}
        return {**super().patches(), **here}

    def __enter__(self) -> Machine:
        super().__enter__()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(FakeTensor, "data_ptr", _address, raising=False)
        # The tensors pass for real ones, which nobody watches.
        patch.setattr(backend, "_PLAIN", backend._PLAIN | {FakeTensor})
        patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        for module in (torch.autograd, torch.autograd.graph):
            patch.setattr(module, "_engine_run_backward", self._backward)
        patch.setattr(JITFunction, "run", lambda kernel, *args, **options: self._launch(kernel, args, options))
        self._stack.enter_context(self._driver)
        self._stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
        self._stack.enter_context(_Watch(self))
        return self

    @contextmanager
    def hot(self, device: str | torch.device, *, host: bool = False) -> Iterator[None]:
        """Require that the host never waits and new tensors are on ``device`` (with ``host``, or on the CPU)."""
        before = self._hot, self._host_allowed
        self._hot, self._host_allowed = torch.device(device), host
        try:
            yield
        finally:
            self._hot, self._host_allowed = before

    def held(self) -> int:
        """Bytes of all tensors on GPUs that are alive."""
        gc.collect()
        self._storages = {key: pair for key, pair in self._storages.items() if not pair[0].expired()}
        return sum(size for _, size in self._storages.values())

    def wait(self, what: str) -> None:
        super().wait(what)
        assert self._hot is None, f"the host waits for the device: {what}"

    def created(self, func: Any, t: Tensor) -> None:
        """Note a tensor, which is new or a view."""
        if t.device.type == "cuda":
            storage = t.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            if self.capturing is not None:
                assert t.device == self.capture_stream.device, f"{func} on {t.device} while another device captures"
                self.capturing.memory.append(t)
        if self._hot is None or t.device == self._hot or func is aten.scalar_tensor.default:
            return
        allowed = self._host_allowed and t.device.type == "cpu"
        assert allowed, f"{func} makes a tensor on {t.device} where everything should be on {self._hot}"

    def replay(self, graph: Graph) -> None:
        self.launches += graph.nodes

    def _launch(self, kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = {p.name for p in kernel.params}
        bound = kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in names})
        tensors = [t for t in tree_leaves(tuple(bound.arguments.values())) if isinstance(t, Tensor)]
        wrong = {str(t.device) for t in tensors} - {f"cuda:{self.current}"}
        assert not wrong, f"{kernel.__name__} is launched on cuda:{self.current} with tensors on {', '.join(wrong)}"
        captured = self.capturing is not None
        launch = Launch(kernel.__name__, self.current, tuple(t.dtype for t in tensors), captured)
        if captured:
            assert self.current_stream() is self.capture_stream, "a launch on a stream that is not being captured"
            self.capturing.nodes.append(launch)
        else:
            self.launches.append(launch)

    def _backward(
        self, outputs: Sequence[Tensor], grads: Any, keep: bool, create: bool, inputs: Any, *_: Any, **__: Any
    ) -> Any:
        """Replace torch's backward pass, whose threads need real GPUs: run the nodes in order, each on its device."""
        found = {id(t): None for t in inputs}
        nodes, pending = _below([t.grad_fn for t in outputs])
        waiting: dict[Any, list[Tensor | None]] = {n: [None] * len(n._input_metadata) for n in nodes}

        def give(node: Any, position: int, grad: Tensor | None) -> None:
            if grad is not None:
                there = waiting[node][position]
                waiting[node][position] = grad if there is None else there + grad

        with torch.set_grad_enabled(create):
            for t, grad in zip(outputs, grads, strict=True):
                give(t.grad_fn, t.output_nr, torch.ones_like(t) if grad is None else grad)
            ready = [n for n in nodes if not pending[n]]
            while ready:
                node = ready.pop()
                given = waiting.pop(node)
                results: Any = (None,) * len(node.next_functions)
                if any(g is not None for g in given):
                    with Device(self, next(g for g in given if g is not None).device):
                        results = self._run_node(node, given, found)
                for (below, position), grad in zip(node.next_functions, results, strict=False):
                    if below is not None:
                        give(below, position, grad)
                        pending[below] -= 1
                        if not pending[below]:
                            ready.append(below)
        return tuple(found.values())

    @staticmethod
    def _run_node(node: Any, given: list[Tensor | None], found: dict[int, Any]) -> Any:
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) in found:
                found[id(variable)] = given[0]
            elif not found:
                variable.grad = given[0] if variable.grad is None else variable.grad + given[0]
            return ()
        custom = hasattr(node, "apply")
        results = node.apply(*given) if custom else node(*given)
        results = results if isinstance(results, tuple) else (results,)
        if not custom:
            return results
        # next_functions of a torch.autograd.Function leaves out inputs that are no tensors.
        wanted = iter([r for r, needed in zip(results, node.needs_input_grad, strict=True) if needed])
        return tuple(None if below is None else next(wanted) for below, _ in node.next_functions)


def _below(roots: Sequence[Any]) -> tuple[list[Any], Counter[Any]]:
    """All nodes that can be reached, and how many edges lead to each."""
    nodes, edges, todo = list(dict.fromkeys(roots)), Counter(), list(dict.fromkeys(roots))
    while todo:
        for below, _ in todo.pop().next_functions:
            if below is not None:
                edges[below] += 1
                if edges[below] == 1 and below not in nodes:
                    nodes.append(below)
                    todo.append(below)
    return nodes, edges


def _address(t: Tensor) -> int:
    """An address that differs between storages; the addresses of fake tensors do not."""
    return (t.untyped_storage()._cdata << 16) + t.storage_offset() * t.element_size()
