"""What was measured about the CPU's libraries, kept in the user's cache from one process to the next.

A choice between two libraries that round differently is part of a result. Kept in a file, it is made once for a
machine, so that a seed gives the same bits in every later run, and only the first run spends time on measuring.

    {"AMD EPYC 9654, AVX512, torch 2.14.1, fastmlp 0.1.0": {
        "linear sigmoid 64x784x512 float32, 2 threads": "onednn", ...}, ...}

Deleting the file has everything measured anew. A file that cannot be read or written is as good as none: every process
then measures for itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from ..base.atomic import atomic_write, cache_folder
from ..base.version import __version__

__all__ = ["choices_path", "instruction_set", "keep", "kept", "processor_name"]


def choices_path() -> Path:
    """The file, which need not exist."""
    return cache_folder() / "cpu-gemm.json"


def processor_name() -> str:
    """The processor's name as the operating system gives it; where that names a whole series ("AMD EPYC", in virtual
    machines), followed by the CPUID family and model, which tell its generations apart.
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
    """The vector instructions that torch computes with, such as AVX2 or AVX512: one name may stand for processors with
    either, above all on virtual machines.
    """
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def _machine() -> str:
    """What the choices hold for."""
    return f"{processor_name()}, {instruction_set()}, torch {torch.__version__}, fastmlp {__version__}"


def _read() -> dict[str, dict[str, str]]:
    """The whole file; empty where it is missing or not what ``keep`` writes."""
    try:
        content = json.loads(choices_path().read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        machine: {name: choice for name, choice in choices.items() if isinstance(choice, str)}
        for machine, choices in content.items()
        if isinstance(choices, dict)
    }


@functools.cache
def kept() -> Mapping[str, str]:
    """The choices that earlier processes made on this machine with this torch; read once."""
    return _read().get(_machine(), {})


def keep(choices: Mapping[str, str]) -> None:
    """Add choices to the file; what another process has added meanwhile stays, and wins."""
    content = _read()
    content[_machine()] = {**choices, **content.get(_machine(), {})}
    with contextlib.suppress(OSError):
        atomic_write(choices_path(), json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
