"""From a @triton.jit function and arguments to a kernel that runs here, specialised as Triton's JIT would do it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, create_function_from_signature

from .global_memory import Buffer, is_buffer
from .kernel import PtxKernel
from .stats import Stats


class _Pointer:
    """What Triton's specialisation looks at in a tensor: dtype and address (storages are 512-byte aligned here)."""

    def __init__(self, obj: Any) -> None:
        a = Buffer(obj, "")
        self._address = 512 + (a.ptr - a.lo)
        is_array = isinstance(obj, np.ndarray)
        self.dtype = torch.from_numpy(np.empty(0, obj.dtype)).dtype if is_array else obj.dtype

    def data_ptr(self) -> int:
        return self._address


def _as_pointers(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_as_pointers(v) for v in value)
    return _Pointer(value) if is_buffer(value) else value


def flatten(name: str, value: Any, kind: Any) -> Iterator[tuple[str, Any]]:
    """The run-time parts of one argument, in PTX order, with names: those of a tuple are "name[0]", "name[1]".

    Args:
        kind: the argument in Triton's signature: a type, "constexpr" (compiled away), or a tuple of these.
    """
    if isinstance(kind, (tuple, list)):
        for i, (v, k) in enumerate(zip(value, kind, strict=True)):
            yield from flatten(f"{name}[{i}]", v, k)
    elif kind != "constexpr":
        yield name, value


def compile_triton(
    fn: JITFunction,
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> tuple[CompiledKernel, list[str]]:
    """Compile a @triton.jit function for sm_<arch>.

    Returns:
        (Triton's compiled kernel, names of the run-time arguments in order).
    """
    compiled, signature = _compile(fn, args, constexprs, arch, num_warps, num_stages, options)
    return compiled, [n for n, kind in signature.items() if kind != "constexpr"]


def _compile(
    fn: JITFunction,
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None,
    arch: int,
    num_warps: int,
    num_stages: int,
    options: Mapping[str, Any],
) -> tuple[CompiledKernel, dict[str, Any]]:
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    call = {k: _as_pointers(v) for k, v in args.items()}
    call.update(constexprs or {}, **options, num_warps=num_warps, num_stages=num_stages)
    bound, specialization, kwargs = create_function_from_signature(fn.signature, fn.params, backend)(**call)
    parsed, signature, const, attrs = fn._pack_args(backend, dict(kwargs), bound, specialization, kwargs)
    compiled = triton_compile(ASTSource(fn, signature, const, attrs), target=target, options=parsed.__dict__)
    return compiled, signature


@functools.lru_cache(maxsize=256)
def decoded(ptx: str, shared: int, num_warps: int, global_scratch_size: int, profile_scratch_size: int) -> PtxKernel:
    """The kernel of a PTX text, decoded once."""
    return PtxKernel(ptx, shared, num_warps, global_scratch_size, profile_scratch_size)


def decode_compiled(compiled: CompiledKernel) -> PtxKernel:
    """The kernel that Triton compiled, ready to run here."""
    m = compiled.metadata
    return decoded(compiled.asm["ptx"], m.shared, m.num_warps, m.global_scratch_size, m.profile_scratch_size)


def triton_kernel(
    fn: JITFunction,
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> tuple[PtxKernel, list[str]]:
    """As `compile_triton`, but decoded: (kernel, names of the run-time arguments in order)."""
    compiled, names = compile_triton(fn, args, constexprs, arch, num_warps, num_stages, **options)
    return decode_compiled(compiled), names


def run_triton(
    fn: JITFunction,
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    grid: int | Sequence[int] | Callable[[dict[str, Any]], Sequence[int]] = (1,),
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    options: Mapping[str, Any] | None = None,
    **launch: Any,
) -> Stats:
    """Compile a @triton.jit function for sm_<arch> and execute it; outputs are written in place.

    Args:
        args: run-time arguments by name: torch CPU tensors, numpy arrays, numbers, None, and tuples of these.
        constexprs: the tl.constexpr arguments by name.
        grid: programs in each direction, or a function of all arguments by name that tells.
        options: further compile options of Triton, e.g. {"maxnreg": 128}.
        launch: options of `PtxKernel.launch`: mode, seed and so on.
    """
    compiled, signature = _compile(fn, args, constexprs, arch, num_warps, num_stages, options or {})
    if callable(grid):
        grid = grid({**args, **(constexprs or {})})
    flat: dict[str, Any] = {}
    for name, kind in signature.items():
        value = args[name] if name in args else fn.signature.parameters[name].default
        if kind != "constexpr":
            flat.update(flatten(name, value, kind))
    return decode_compiled(compiled).launch(grid, flat, **launch)
