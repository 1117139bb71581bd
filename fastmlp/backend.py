"""The backend, which is the code that runs a fused operation: the Triton kernels or plain torch.

``"auto"`` (the default) takes the kernels for float32, float16 and bfloat16 tensors on a GPU (CUDA or HIP) and plain
torch for everything else; ``resolve`` says which of them runs for a given tensor. ``"torch"`` never launches a kernel.
``"triton"`` always launches kernels, or raises an error that says what is missing. It takes CPU tensors only in
Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported) and under a driver whose device is the CPU.

Subclasses of Tensor with operations of their own (DTensor, quantized weights) have no memory that a kernel could read,
so they run on plain torch on every backend. Where a compiler or a dispatch mode watches, the kernels run as operators
that torch knows (``fastmlp.library``).
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
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

__all__ = [
    "BACKENDS",
    "Backend",
    "Resolved",
    "Runs",
    "alone",
    "check_kernels_run_on",
    "foreign",
    "functorch_active",
    "get_backend",
    "has_values",
    "nobody_watches",
    "on_tape",
    "resolve",
    "runs",
    "set_backend",
    "traced",
    "triton_available",
    "use_backend",
    "watched",
]

Backend = Literal["auto", "triton", "torch"]
Resolved = Literal["triton", "torch"]
#: What runs one operation. "operators" are the kernels as operators of torch (``fastmlp.library``), and "members" is
#: plain torch on an ensemble.
Runs = Literal["triton", "operators", "torch", "members"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The types of tensors with memory and no operations of their own, and of a missing bias.
_PLAIN = frozenset((Tensor, Parameter, type(None)))
#: The types of tensors that stand for such tensors while somebody traces; they have no memory.
_STAND_INS = (FakeTensor, FunctionalTensor)

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
    """Choose the backend of every following operation in this process.

    Args:
        name: "auto" (what a process begins with): the kernels where they can run, else plain torch, which on a CPU is
            torch's own tape for small layers and networks and for most losses; "torch": plain torch, with fastmlp's
            gradients; "triton": the kernels, or an error.

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
    return _are_functorch_transforms_active()  # torch.autograd.Function asks the same


def traced(*tensors: Tensor | None) -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace traces, or a tensor is of a type of its own.

    Such types are fake tensors, which have no memory, and subclasses of Tensor with operations of their own.
    """
    return is_compiling() or not _PLAIN.issuperset(map(type, tensors)) or _get_tracing_state() is not None


def watched(*tensors: Tensor | None) -> bool:
    """Whether somebody else sees the operations on these tensors: those that ``traced`` names, or a dispatch mode.

    FakeTensorMode, a counter of operations and a selective checkpoint are dispatch modes.
    """
    return traced(*tensors) or torch._C._len_torch_dispatch_stack() > 0


def foreign(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is of a subclass of Tensor, which may have operations of its own and no memory."""
    return any(type(t) not in _PLAIN and not isinstance(t, _STAND_INS) for t in tensors)


def on_tape(backend: Runs) -> bool:
    """Whether an operation that needs gradients is one of our nodes of the tape, and not an operator with a formula.

    torch.export drops our nodes, and an exported program is trained with the formulas of the operators in it.
    """
    return backend != "operators" or not torch.compiler.is_exporting()


def has_values(t: Tensor) -> bool:
    """Whether Python may look at the values of a tensor: nobody traces or transforms, and the tensor has memory."""
    if traced(t) or functorch_active():
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is None


def resolve(x: Tensor, dtype: torch.dtype | None = None) -> Resolved:
    """The code that runs an operation on ``x`` computing in ``dtype`` (default: x's): "triton" or "torch".

    Raises:
        RuntimeError: backend "triton" on a device that no kernel can run on, or inside a transform of torch.func.
        TypeError: backend "triton" with a dtype that the kernels do not compute in.
    """
    name = get_backend()
    if name == "torch" or (name == "auto" and not x.is_cuda):
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
        return "triton" if _triton_installed and dtype in KERNEL_DTYPES else "torch"
    if dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"backend 'triton' computes in float32, float16 and bfloat16, got {dtype}; "
            "convert the tensors, or use backend 'auto' or 'torch'"
        )
    if not is_compiling():  # torch.compile cannot trace the check; its operators check when they run
        check_kernels_run_on(x)
    return "triton"


def runs(dtype: torch.dtype, x: Tensor, *others: Tensor | None) -> Runs | Literal["formula"]:
    """What runs an operation on ``x`` and others that computes in ``dtype``; errors as ``resolve``.

    Where somebody watches, the kernels are operators of torch. "formula" stands for torch's own functions, which torch
    differentiates. They run on subclasses of Tensor with operations of their own and under torch.jit.trace. In place of
    plain torch they also run while torch.compile or torch.export traces and on fake tensors: a compiler fuses better
    than we do, and a threshold in our code, such as a number of rows, would limit the compiled code to its side.
    """
    backend = resolve(x, dtype)
    if traced(x, *others):
        jit = _get_tracing_state() is not None
        return "formula" if backend == "torch" or jit or foreign(x, *others) else "operators"
    return "operators" if backend == "triton" and torch._C._len_torch_dispatch_stack() else backend


def nobody_watches() -> bool:
    """Whether no compiler, tracer, dispatch mode, transform of torch.func or dual level sees the operations."""
    return (
        not is_compiling()
        and _get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def alone(x: Tensor, *others: Tensor | None) -> Literal["triton", "torch"] | None:
    """What ``runs`` answers for these tensors if nobody watches, outside autocast, in a dtype of the kernels.

    Then the kernels are a few launches, and plain torch, which is what "auto" means on a CPU, a few calls. What the
    shapes, dtypes and devices of the tensors allow is the same for each call, so nobody needs to look at them twice.
    None: somebody watches, or backend "torch" was asked for.
    """
    if not (nobody_watches() and x is not None and _PLAIN.issuperset(map(type, (x, *others)))):
        return None
    name = get_backend()
    if name == "torch" or not (x.is_cuda or x.is_cpu) or torch.is_autocast_enabled(x.device.type):
        return None
    if x.is_cuda:
        return "triton" if _triton_installed else None
    if name == "triton":
        return "triton" if _kernels_take_cpu() else None
    return "torch"


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
