"""Remembered launches: what a launcher and Triton found out for a shape is kept, and is not looked for again.

Two launches of equal shapes differ in their addresses only. A launcher would still look its tile up, and Triton's
binder would look at every argument and search the compiled kernel. That takes 15 to 35 microseconds of Python for a
launch which a GPU may finish in 5. A plan is a function that says what to launch for some tensors. ``remembered`` makes
a launching function of a plan, and asks the plan only for what was never launched before:

    @remembered
    def _launch(da, saved, dz, activation):
        return call(_activation_bwd_kernel, (cdiv(da.numel(), BLOCK),), da, saved, dz, da.numel(), ...)

    _launch((da, saved, dz), (activation,))

A plan may depend only on what the key has: the dtype, shape, strides and alignment to 16 bytes of every tensor, the
settings, the current device of the active driver, whether torch allows tf32, and whether launches are dependent ones
(``dependent``). Triton's own choice of a compiled kernel depends on no more: on the types of the
arguments, the alignment of pointers, on which integers are 1 or multiples of 16, on None, on a launch's options, and on
three knobs, which are in the key too. For AMD Triton also asks whether a storage is larger than 2 GiB. Numbers are
floats that may change from call to call, as tensors do: one kernel serves all floats.

A remembered launch goes through Triton's own launcher object, so that a driver which records launches records it.
Triton's ``run`` does everything else: first launches, the interpreter, arguments of unknown kinds, and all launches
while a profiler or another hook watches. It also checks that no global constant of a kernel has changed since the
kernel was compiled, which a remembered launch does not.

A function among the settings, such as the rule of the tiles, is part of the key. Whoever replaces anything else that a
plan reads calls ``forget``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..base.signature import MOST, Signature, signature
from .dependent import launch_options, launches_dependent
from .device import interpreting

__all__ = [
    "Call",
    "Launches",
    "New",
    "call",
    "forget",
    "launch_plainly",
    "remembered",
    "with_active",
    "with_dropout",
]

#: Bytes of a storage up to which Triton's code for AMD takes 32-bit offsets.
_NEAR = 2**31 - 1
#: What the arguments of a remembered launch are, besides tensors, numbers and tuples.
_CONSTANTS = (int, float, str, type(None))

_precision = torch._C._get_fp32_precision_getter
#: What torch.compile's code allocates with, from a shape, strides and a dtype, on the current device. torch.empty takes
#: twice as long to read its arguments and to ask who watches, which nobody does here.
_on_gpu, _on_cpu = torch._C._dynamo.guards._empty_strided_cuda, torch._C._dynamo.guards._empty_strided_cpu
_runtime, _compilation = knobs.runtime, knobs.compilation
#: Whether the kernels are the interpreter's; their decorators asked at this time too.
_INTERPRETING = interpreting()


class Call(NamedTuple):
    """A kernel, its grid and its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def call(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Call:
    """What ``kernel[grid](*arguments, **options)`` would launch, with the options of ``dependent``."""
    return Call(kernel, grid, arguments, options | launch_options())


def launch_plainly(planned: Call) -> None:
    """Launch and remember nothing."""
    planned.kernel[planned.grid](*planned.arguments, **planned.options)


class New:
    """An argument that each launch allocates: a contiguous tensor, of which a plan may ask what it asks of tensors.

    The tensor is 16-byte aligned, as all memory of torch's allocators is; the first launch looks.
    """

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = shape, dtype
        self.strides = tuple([math.prod(shape[i + 1 :]) for i in range(len(shape))])

    @classmethod
    def like(cls, t: Tensor, dtype: torch.dtype | None = None) -> New:
        """What torch.empty_like allocates, with ``t``'s strides where they are those of a dense tensor."""
        new = cls(*t.shape, dtype=dtype or t.dtype)
        new.strides = torch.empty_like(t).stride()  # freed before anything is allocated
        return new

    def numel(self) -> int:
        """As a tensor's."""
        return math.prod(self.shape)

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def stride(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.strides if dim is None else self.strides[dim]

    def data_ptr(self) -> int:
        """A multiple of 16."""
        return 0

    def allocated(self, device: torch.device) -> Tensor:
        """The tensor."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


class Launches(NamedTuple):
    """Several calls in their order, and what they allocate."""

    calls: Sequence[Call]
    news: Sequence[New] = ()


#: None: the plan's launcher has another way for such arguments.
Plan = Callable[..., "Call | Launches | None"]


class _Step(NamedTuple):
    """A kernel as it is launched again; holds no tensor."""

    kernel: Any
    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    packed_metadata: Any
    #: Makes the arguments from the tensors, numbers and new tensors, with the constants after them.
    arrange: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    constants: tuple[Any, ...]


class _Memory(dict[tuple[Any, ...], tuple[list[tuple[Any, ...]], list[_Step], list[Any]]]):
    """The remembered launches of one driver: what they allocate, the kernels, and the hooks that the kernels have."""

    def __init__(self, active: Any) -> None:
        super().__init__()
        self.asks_sizes = active.get_current_target().backend == "hip"


#: What is remembered where a plan answered None.
_REFUSED: tuple[Any, Any, Any] = ((), (), ())

_memories: WeakKeyDictionary[Any, _Memory] = WeakKeyDictionary()
#: The driver of the last launch and its memory.
_latest: tuple[Callable[[], Any], _Memory | None] = (lambda: None, None)


def forget() -> None:
    """Forget all launches, because something changed that a plan or Triton reads."""
    for memory in list(_memories.values()):
        memory.clear()


def _memory_of(active: Any) -> _Memory:
    global _latest
    memory = _memories.get(active)
    if memory is None:
        memory = _memories[active] = _Memory(active)
    _latest = ref(active), memory
    return memory


def remembered(plan: Plan) -> Callable[..., Any]:
    """The function ``launch(tensors, settings=(), numbers=(), known=None)`` of a plan.

    It launches ``plan(*tensors, *numbers, *settings)``. ``known`` is the tensors' signature, if the caller has it.
    Each tensor but the first may be None. The settings are hashable, each always of one type, since 1, 1.0 and True are
    equal keys. The numbers are floats. The plan is a pure function of the settings and of what the tensors are, not of
    what is in them. It passes the tensors and numbers on to kernels, also in tuples. The launch returns the list of
    what it allocated, or None where the plan answers None.
    """

    def launch(
        tensors: tuple[Tensor | None, ...],
        settings: tuple[Any, ...] = (),
        numbers: tuple[float, ...] = (),
        known: Signature | None = None,
    ) -> Sequence[Tensor] | None:
        if _INTERPRETING:
            launched = _launched(plan, _as_in_memory(tensors), numbers, settings)
            return None if launched is None else launched[0]
        active = driver.active
        owner, memory = _latest
        if memory is None or owner() is not active:
            memory = _memory_of(active)
        device = active.get_current_device()
        inspection = _runtime.add_stages_inspection_hook
        key = (
            plan, settings, len(numbers), device, _precision("cuda", "matmul"), launches_dependent(),
            _runtime.debug, _compilation.instrumentation_mode, inspection if inspection is None else _asked(inspection),
            signature(tensors) if known is None else known,
        )  # fmt: skip
        if memory.asks_sizes:
            key += tuple([t is not None and t.untyped_storage().nbytes() > _NEAR for t in tensors])
        found = memory.get(key)
        if found is _REFUSED:
            return None
        if found is None and (readable := _as_in_memory(tensors)) is not tensors:
            return launch(readable, settings, numbers)
        if found is None or _watched(found[2]):
            return _remember(memory, key, _launched(plan, tensors, numbers, settings))
        news, steps, _ = found
        if news:
            allocate = _on_gpu if tensors[0].is_cuda else _on_cpu  # type: ignore[union-attr]
            allocated = [allocate(*new) for new in news]
            values = (*tensors, *numbers, *allocated)
        else:
            allocated, values = [], tensors + numbers
        stream = active.get_current_stream(device)
        for _, run, (x, y, z), function, metadata, arrange, constants in steps:
            run(x, y, z, stream, function, metadata, None, None, None, *arrange(values + constants))
        return allocated

    return launch


def _as_in_memory(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The tensors, with a copy of each view that negates: a kernel would read the negatives of the view's values.

    No kernel writes to such a view, because fastmlp allocates what kernels write, and steps refuse such parameters.
    """
    if any(t is not None and t.is_neg() for t in tensors):
        return tuple([t if t is None else t.resolve_neg() for t in tensors])
    return tensors


def with_active(plan: Plan) -> Plan:
    """The plan with one tensor more, in front: which members are active. Keys of single models have no such place."""

    def planned(active: Tensor, *rest: Any) -> Call | Launches | None:
        return plan(*rest, active=active)

    return planned


def with_dropout(plan: Plan) -> Plan:
    """The plan with dropout, whose state and ``active`` (or None) are tensors in front; the settings end with the rest.

    Keys of launches without dropout have no such places.
    """

    def planned(state: Tensor, active: Tensor | None, *given: Any) -> Call | Launches | None:
        *rest, drawn = given
        return plan(*rest, active=active, dropout=(state, *drawn))

    return planned


def _remember(
    memory: _Memory,
    key: tuple[Any, ...],
    launched: tuple[Sequence[Tensor], Sequence[New], Sequence[_Step | None]] | None,
) -> Sequence[Tensor] | None:
    if len(memory) >= MOST:
        memory.clear()
    if launched is None:
        memory[key] = _REFUSED
        return None
    allocated, news, steps = launched
    known = [step for step in steps if step is not None]
    if len(known) == len(steps) and not any(t.data_ptr() & 15 for t in allocated):
        allocations = [(new.shape, new.strides, new.dtype) for new in news]
        memory[key] = allocations, known, [step.kernel.pre_run_hooks for step in known]
    return allocated


def _asked(inspection: Any) -> Any:
    """The answer of a hook into the compiler, by which Triton tells kernels apart; before 3.8 Triton does not ask."""
    try:
        return inspection()
    except TypeError:
        return inspection


def _watched(hooks: Sequence[Sequence[Any]]) -> bool:
    """Whether a hook wants to see the launches: one of Triton's, or one of the kernels' own, whose lists are given."""
    before, after = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(
        any(hooks)
        or (before is not None and getattr(before, "calls", True))
        or (after is not None and getattr(after, "calls", True))
    )


def _launched(
    plan: Plan, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], settings: tuple[Any, ...]
) -> tuple[Sequence[Tensor], Sequence[New], Sequence[_Step | None]] | None:
    """Launch as Triton does; returns what was allocated, and what to remember, None for what cannot be."""
    values = _distinct(tensors) + tuple([number * 1.0 for number in numbers])
    planned = plan(*values, *settings)
    if planned is None:
        return None
    calls, news = planned if isinstance(planned, Launches) else ([planned], ())
    assert tensors[0] is not None
    allocated = [new.allocated(tensors[0].device) for new in news]
    tensor_of = dict(zip(map(id, news), allocated, strict=True))
    values += tuple(news)

    steps: list[_Step | None] = []
    for kernel, grid, arguments, options in calls:
        compiled = kernel[grid](*(_filled(arguments, tensor_of) if news else arguments), **options)
        # Not of the interpreter, not still being compiled, and not what a test puts in place of ``run``.
        if type(compiled) is CompiledKernel:
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            steps.append(_step(kernel, compiled, grid, values, tuple([named[name] for name in kernel.arg_names])))
        else:
            steps.append(None)
    return allocated, news, steps


def _filled(argument: Any, tensor_of: dict[int, Tensor]) -> Any:
    """The argument with tensors in place of what stands for new ones."""
    if isinstance(argument, tuple):
        # The compiler reads the parts of named tuples by their names.
        return getattr(type(argument), "_make", tuple)([_filled(a, tensor_of) for a in argument])
    return tensor_of.get(id(argument), argument)


def _distinct(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The tensors, each an object of its own where one is in several places."""
    seen: set[int] = set()
    distinct = []
    for t in tensors:
        distinct.append(t.detach() if t is not None and id(t) in seen else t)
        seen.add(id(t))
    return tuple(distinct)


def _step(
    kernel: Any, compiled: CompiledKernel, grid: tuple[int, ...], values: tuple[Any, ...], arguments: tuple[Any, ...]
) -> _Step | None:
    """How the arguments are made of the values and of constants; None if one is neither."""
    places, count = {id(value): place for place, value in enumerate(values) if value is not None}, len(values)
    constants: list[Any] = []

    def has_values(argument: Any) -> bool:
        return id(argument) in places or (isinstance(argument, tuple) and any(map(has_values, argument)))

    def expression(argument: Any) -> str:
        if isinstance(argument, tuple) and id(argument) not in places and has_values(argument):
            return f"({''.join([expression(part) + ', ' for part in argument])})"
        if id(argument) not in places:
            constants.append(argument)
        return f"p[{places.get(id(argument), count + len(constants) - 1)}]"

    # Source code of places alone. Functions that call each other for tuples within tuples take ten times as long.
    arrange = eval("lambda p: " + expression(arguments))
    # The functions above refer to themselves, so nothing that they refer to may hold a tensor: it would be freed late.
    places.clear()
    if not all(map(_is_constant, constants)):
        return None
    x, y, z = (*grid, 1, 1)[:3]
    return _Step(
        kernel, compiled.run, (x, y, z), compiled.function, compiled.packed_metadata, arrange, tuple(constants)
    )  # fmt: skip


def _is_constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))
