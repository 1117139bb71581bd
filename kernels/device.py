"""What the launchers must know of the device: architecture, number of multiprocessors, how float32 is multiplied.

Triton's driver is asked, not torch.cuda, so that AMD GPUs, the interpreter and a simulated driver answer alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
from triton.runtime import driver

__all__ = ["DTYPES", "Device", "current_device", "input_precision", "interpreting", "tf32_allowed"]

#: What the kernels compute in, beside uint8 pixels as the first layer's input.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Device:
    """One GPU as the tile tables see it."""

    backend: str  #: "cuda", "hip" or "interpreter"
    arch: int | str  #: 80 for sm_80, "gfx942", or 0 for the interpreter
    multiprocessors: int  #: streaming multiprocessors (compute units on AMD)
    shared_limit: int  #: bytes of shared memory (LDS) a program may use

    @property
    def has_tf32(self) -> bool:
        """Whether float32 products can run on tensor cores (Ampere and later)."""
        return self.backend == "cuda" and int(self.arch) >= 80

    @property
    def has_wide_fma(self) -> bool:
        """Whether float32 multiply-adds outside of the tensor cores are faster than three tf32 ones inside.

        They are on GeForce-class multiprocessors (Ampere's sm_86 to sm_88, Ada, consumer Blackwell). These do 128
        float32 multiply-adds per cycle outside of the tensor cores, and 128 (GeForce) or 256 (workstation boards) tf32
        ones inside.
        """
        return self.backend == "cuda" and int(self.arch) in (86, 87, 88, 89, 120, 121)


INTERPRETER = Device("interpreter", 0, 4, 1 << 20)
_devices: WeakKeyDictionary[Any, dict[int, Device]] = WeakKeyDictionary()


def interpreting() -> bool:
    """True when Triton runs kernels in its interpreter (TRITON_INTERPRET=1 before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def current_device() -> Device:
    """The device that the next launch goes to; looked up once per driver and device."""
    if interpreting():
        return INTERPRETER
    active = driver.active
    index = active.get_current_device()
    known = _devices.setdefault(active, {})
    device = known.get(index)
    if device is None:
        target = active.get_current_target()
        properties = active.utils.get_device_properties(index)
        device = known[index] = Device(
            target.backend, target.arch, properties["multiprocessor_count"], properties["max_shared_mem"]
        )
    return device


def tf32_allowed() -> bool:
    """Whether torch lets float32 products on CUDA devices round their operands to tf32.

    Torch has two settings. The newer one is ``torch.backends.cuda.matmul.fp32_precision``, which falls back to
    ``torch.backends.fp32_precision``. The older ones, ``torch.set_float32_matmul_precision`` and ``allow_tf32``, change
    the newer one too, so the newer one always knows. ``torch.get_float32_matmul_precision`` does not: it raises once
    the newer one is used. Every launch asks, and the function called here takes an eighth of the attribute's time.
    """
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def input_precision(device: Device, dtype: torch.dtype, fma: bool = False) -> str:
    """How ``tiling.dot`` multiplies operands of ``dtype`` here.

    float32 is "tf32x3" on tensor cores (three products of the split operands: as accurate as float32 FMA with half the
    instructions), or "tf32", one product, where torch allows that. tcgen05 needs an accumulator per product, which is
    "tf32x3 apart" (see ``tiling.dot``). All else is "ieee", and so is float32 in tiles with ``fma`` unless tf32 is
    allowed.
    """
    if dtype != torch.float32 or not device.has_tf32:
        return "ieee"
    if tf32_allowed():
        return "tf32"
    if fma:
        return "ieee"
    return "tf32x3 apart" if 100 <= int(device.arch) < 120 else "tf32x3"
