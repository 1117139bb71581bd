"""Programmatic dependent launch: a kernel may start while the kernel before it still runs, and then waits for it.

Off by default, because no GPU has measured yet what it saves. ``dependent_launch(True)`` launches all kernels so, on
NVIDIA GPUs from sm_90 on:

- The GPU may start the programs of a kernel as soon as every program of the kernel before has begun (and passed its own
  wait) or ended. Without the option the programs start when the kernel before has ended and its memory is written.
- Every kernel begins with ``wait_for_previous``. ``griddepcontrol.wait`` returns when the kernel before has ended and
  everything that it stored is visible. No load and no store comes before the wait, so nothing is read too early, and
  nothing is overwritten that the kernel before still reads.
- ``griddepcontrol.launch_dependents`` allows the next kernel to start. It comes after the wait. While a kernel runs,
  the kernel two places before it has therefore ended: programs of at most two kernels that follow each other are in
  flight, and waiting for the last one is enough.

A kernel of anybody else starts, as ever, after all kernels before it. A kernel of this folder that comes after somebody
else's kernel may start when that kernel allows it or when its last programs end, and waits for its end too.

What overlaps is the launch itself, and the start of the programs. Weights are not loaded before the wait. The loop over
the reduction loads W and X together, and in front of it there would have to be a second copy of the first steps' loads.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .device import Device, current_device, interpreting

__all__ = ["dependent_launch", "launch_options", "launches_dependent", "wait_for_previous"]

_wanted = False

_INTERPRETING: tl.constexpr = tl.constexpr(interpreting())


def _able(device: Device) -> bool:
    return device.backend == "cuda" and int(device.arch) >= 90


def dependent_launch(enabled: bool) -> None:
    """Launch all kernels of this process as dependent ones from now on, or no longer.

    Devices that are not able to do this, beside the current one, launch as ever.

    Raises:
        RuntimeError: the current device is not able to do this.
    """
    global _wanted
    if enabled and not _able(device := current_device()):
        raise RuntimeError(
            "programmatic dependent launch needs an NVIDIA GPU of compute capability 9.0 or later; the current device "
            f"is {device.backend} {device.arch}"
        )
    _wanted = bool(enabled)


def launches_dependent() -> bool:
    """What ``dependent_launch`` set last; part of the key of remembered launches and of captured graphs."""
    return _wanted


def launch_options() -> dict[str, Any]:
    """Triton's options of a launch on the current device; ``wait_for_previous`` reads them in the compiler."""
    return {"launch_pdl": True} if _wanted and _able(current_device()) else {}


@tl.core.builtin
def _launched_dependent(_semantic: Any = None) -> tl.constexpr:
    """Whether the kernel that is being compiled was launched with ``launch_pdl``; AMD has no such option."""
    return tl.constexpr(bool(getattr(_semantic.builder.options, "launch_pdl", False)))


@triton.jit
def wait_for_previous():
    """The first statement of every kernel: wait for the kernel before, then allow the next one to start.

    Without the option this is no code.
    """
    if not _INTERPRETING:
        if _launched_dependent():
            tl.inline_asm_elementwise(
                "griddepcontrol.wait; griddepcontrol.launch_dependents; // dummy $0",
                "=r", [], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
