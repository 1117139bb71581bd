"""The choices that were measured on this machine, in a file of the user's cache.

Two libraries round differently, so the choice between them changes results. A choice that is kept is made once per
machine: later runs with the same seed give the same bits, and only the first run spends time on measuring.

    {"AMD EPYC 9654, AVX512, torch 2.14.1, fastmlp 0.1.0": {
        "linear sigmoid 64x784x512 float32, 2 threads": "onednn", ...}, ...}

Without the file everything is measured anew. Where the file cannot be read or written, every process measures for
itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..base.atomic import atomic_write, cache_folder
from ..base.version import __version__
from .processor import instruction_set, processor_name


def choices_path() -> Path:
    """The file, which need not exist."""
    return cache_folder() / "cpu-gemm.json"


@functools.cache
def _machine() -> str:
    """What the choices hold for."""
    return f"{processor_name()}, {instruction_set()}, torch {torch.__version__}, fastmlp {__version__}"


def _read() -> dict[str, dict[str, str]]:
    """The whole file; empty where the file is missing or is not what ``keep`` writes."""
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
    """Add choices to the file. A choice that another process has added meanwhile stays, and wins."""
    content = _read()
    content[_machine()] = {**choices, **content.get(_machine(), {})}
    with contextlib.suppress(OSError):
        atomic_write(choices_path(), json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def about_choices() -> dict[str, Any]:
    """How many choices are kept for this machine ("measured_shapes"), and in which "file"."""
    return {"measured_shapes": len(kept()), "file": str(choices_path())}
