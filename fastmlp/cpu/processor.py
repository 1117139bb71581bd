"""The processor: its name, its vector instructions, and the dtypes that it multiplies in."""

from __future__ import annotations

import contextlib
import functools
import itertools
import platform

import torch


def processor_name() -> str:
    """The processor's name as the operating system gives it.

    A virtual machine may name only a series ("AMD EPYC"). The CPUID family and model then follow the name, because they
    tell the generations apart.
    """
    about: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as stream:
        for line in itertools.takewhile(str.strip, stream):  # of the first core
            key, _, value = line.partition(":")
            about[key.strip()] = value.strip()
    name = about.get("model name") or platform.processor() or platform.machine()
    if any(c.isdigit() for c in name) or not {"cpu family", "model"} <= about.keys():
        return name
    return f"{name} family {about['cpu family']} model {about['model']}"


def instruction_set() -> str:
    """The vector instructions that torch computes with, such as AVX2 or AVX512.

    Processors of one name may have either, above all in virtual machines.
    """
    return torch.backends.cpu.get_cpu_capability()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of ``dtype`` run: float32 for 16 bits that a CPU cannot multiply, else ``dtype``.

    aten's own loops for 16 bits are slower than float32 by far.
    """
    return dtype if dtype.itemsize != 2 or device.type != "cpu" else _product_dtype_here(dtype)


@functools.cache
def _product_dtype_here(dtype: torch.dtype) -> torch.dtype:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    native = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    return dtype if native else torch.float32
