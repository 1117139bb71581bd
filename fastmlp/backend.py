"""The backend, which is the code that runs a fused operation: the Triton kernels or plain torch.

``"auto"`` (the default) takes the kernels for float32, float16 and bfloat16 tensors on a GPU (CUDA or HIP) and plain
torch for everything else; ``resolve`` says which of them runs for a given tensor. ``"torch"`` never launches a kernel.
``"triton"`` always launches kernels, or raises an error that says what is missing. It takes CPU tensors only in
Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported) and under a driver whose device is the CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "Backend",
    "Resolved",
    "check_kernels_run_on",
    "functorch_active",
    "get_backend",
    "resolve",
    "set_backend",
    "triton_available",
    "use_backend",
]

Backend = Literal["auto", "triton", "torch"]
Resolved = Literal["triton", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_default: Backend = "auto"
_override: ContextVar[Backend | None] = ContextVar("fastmlp_backend", default=None)
#: How many ``use_backend`` blocks are open, in all threads. Only an open block makes ``get_backend`` read the context
#: variable, since torch.compile before torch 2.12 cannot trace the reading.
_overrides = 0
_lock = Lock()
_triton_installed = importlib.util.find_spec("triton") is not None


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not _triton_installed:
        raise RuntimeError(
            "backend 'triton' was asked for, but the package triton is not installed (it exists for Linux only); "
            "install it with `pip install triton`, or use backend 'torch'"
        )
    return BACKENDS[BACKENDS.index(name)]


def set_backend(name: Backend) -> None:
    """Choose the backend of every following operation in this process: "auto", "triton" or "torch".

    Raises:
        ValueError: unknown name.
        RuntimeError: "triton" where the package triton is not installed.
    """
    global _default
    _default = _known(name)


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the backend inside a ``with`` block of the current thread or task; errors as ``set_backend``.

    The backward pass runs on the backend that its forward pass ran on, also outside the block.
    """
    global _overrides
    token = _override.set(_known(name))
    with _lock:
        _overrides += 1
    try:
        yield
    finally:
        with _lock:
            _overrides -= 1
        _override.reset(token)


def get_backend() -> Backend:
    """The backend that was chosen for this place: "auto", "triton" or "torch"."""
    return (_override.get() or _default) if _overrides else _default


def triton_available() -> bool:
    """True if the package triton is installed."""
    return _triton_installed


def functorch_active() -> bool:
    """True inside a transform of torch.func, whose tensors have no memory that a kernel could read."""
    return bool(torch._C._are_functorch_transforms_active())  # torch.autograd.Function asks the same


def resolve(x: Tensor, dtype: torch.dtype | None = None) -> Resolved:
    """The code that runs an operation on ``x`` computing in ``dtype`` (default: x's): "triton" or "torch".

    Raises:
        RuntimeError: backend "triton" on a device that no kernel can run on, or inside a transform of torch.func.
        TypeError: backend "triton" with a dtype that the kernels do not compute in.
    """
    name = get_backend()
    if name == "torch":
        return "torch"
    if functorch_active():
        if name == "auto":
            return "torch"
        raise RuntimeError(
            "backend 'triton' cannot run inside a transform of torch.func (vmap, grad, jvp, ...): a kernel is no torch "
            "operation; use backend 'auto' or 'torch' there"
        )
    dtype = x.dtype if dtype is None else dtype
    if name == "auto":
        return "triton" if x.is_cuda and _triton_installed and dtype in KERNEL_DTYPES else "torch"
    if dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"backend 'triton' computes in float32, float16 and bfloat16, got {dtype}; "
            "convert the tensors, or use backend 'auto' or 'torch'"
        )
    if not torch.compiler.is_compiling():  # torch.compile cannot trace the check; its operators check when they run
        check_kernels_run_on(x)
    return "triton"


def check_kernels_run_on(x: Tensor) -> None:
    """RuntimeError unless a kernel can run on the device of ``x``."""
    if not x.is_cuda and not (x.device.type == "cpu" and _kernels_take_cpu()):
        raise RuntimeError(
            f"backend 'triton' needs tensors on a GPU, got one on {x.device}; move the tensors, use backend 'auto' or "
            "'torch', or run the kernels in Triton's interpreter (set TRITON_INTERPRET=1 before Python starts)"
        )


def _kernels_take_cpu() -> bool:
    import triton
    from triton.runtime import driver

    if triton.knobs.runtime.interpret:
        return True
    try:
        return bool(driver.active.get_active_torch_device().type == "cpu")
    except RuntimeError:  # no driver: neither CUDA nor HIP is usable on this machine
        return False
