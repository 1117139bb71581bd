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

__all__ = ["DTYPES", "Device", "current_device", "input_precision", "interpreting"]

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


INTERPRETER = Device("interpreter", 0, 4, 1 << 20)
_devices: WeakKeyDictionary[Any, dict[int, Device]] = WeakKeyDictionary()


def interpreting() -> bool:
    """True when Triton runs kernels in its interpreter (TRITON_INTERPRET=1 before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def current_device() -> Device:
    """The device that the next launch goes to; looked up once a driver and device."""
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


def input_precision(device: Device) -> str:
    """How ``tl.dot`` multiplies float32 here, after ``torch.get_float32_matmul_precision()``.

    "highest" is tf32x3 on tensor cores (three products of the split operands: as accurate as float32 FMA with
    half the instructions) and ieee where there are none; "high" and "medium" are one tf32 product.
    """
    if not device.has_tf32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
