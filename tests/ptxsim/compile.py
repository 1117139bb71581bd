"""Compile a @triton.jit function with its arguments to a kernel that runs here, specialised as Triton's JIT does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .kernel import PtxKernel
from .simulated_gpu import SimulatedGPU, decode_compiled, flatten
from .stats import Stats


class _Array:
    """The dtype and address that Triton's specialisation reads of a tensor; a numpy array does not have them."""

    def __init__(self, array: np.ndarray) -> None:
        self.dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        self._address = array.__array_interface__["data"][0]

    def data_ptr(self) -> int:
        return self._address


def _for_triton(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_for_triton(v) for v in value)
    return _Array(value) if isinstance(value, np.ndarray) else value


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
    call = {k: _for_triton(v) for k, v in args.items()}
    call.update(constexprs or {}, **options, num_warps=num_warps, num_stages=num_stages)
    with SimulatedGPU(arch, execute=False):
        compiled = fn.warmup(grid=(1,), **call)
    return compiled, [n for n, kind in compiled.src.signature.items() if kind != "constexpr"]


def triton_kernel(
    fn: JITFunction,
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any] | None = None,
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> tuple[PtxKernel, list[str]]:
    """Like `compile_triton`, but the kernel is decoded: (kernel, names of the run-time arguments in order)."""
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
        grid: programs in each direction, or a function that returns them for all arguments by name.
        options: further compile options of Triton, e.g. {"maxnreg": 128}.
        launch: options of `PtxKernel.launch`: mode, seed and so on.
    """
    compiled, _ = compile_triton(fn, args, constexprs, arch, num_warps, num_stages, **(options or {}))
    if callable(grid):
        grid = grid({**args, **(constexprs or {})})
    flat: dict[str, Any] = {}
    for name, kind in compiled.src.signature.items():
        value = args[name] if name in args else fn.signature.parameters[name].default
        if kind != "constexpr":
            flat.update(flatten(name, value, kind))
    return decode_compiled(compiled).launch(grid, flat, **launch)
