"""The choices that were measured on this machine, in a file of the user's cache.

Two libraries round differently, so the choice between them changes results. A choice that is kept is made once per
machine: later runs with the same seed give the same bits, and only the first run spends time on measuring.

    {"AMD EPYC 9654, AVX512, torch 2.14.1, fastmlp 0.1.0, ways 3": {
        "linear sigmoid 64x784x512 float32, 2 threads": "onednn", ...}, ...}

Without the file everything is measured anew. Where the file cannot be read or written, every process measures for
itself. Content of any other kind is ignored.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..base.atomic import cache_folder, read_file, update_file
from ..base.version import __version__
from .processor import instruction_set, processor_name

#: Changes whenever there are other ways, so that choices among the earlier ones are not followed.
_WAYS = 3
#: A choice takes about 70 bytes. A larger file is not what ``keep`` writes.
_MOST_BYTES = 16 << 20


def choices_path() -> Path:
    """The file, which need not exist."""
    return cache_folder() / "cpu-gemm.json"


@functools.cache
def _machine() -> str:
    """What the choices hold for."""
    return f"{processor_name()}, {instruction_set()}, torch {torch.__version__}, fastmlp {__version__}, ways {_WAYS}"


def _understood(text: bytes) -> dict[str, dict[str, str]]:
    """What ``keep`` wrote; empty where the text is anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
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
    try:
        return _understood(read_file(choices_path(), _MOST_BYTES)).get(_machine(), {})
    except OSError:
        return {}


def keep(choices: Mapping[str, str]) -> None:
    """Add choices to the file. A choice that another process has added meanwhile stays, and wins."""

    def added(text: bytes) -> bytes:
        content = _understood(text)
        content[_machine()] = {**choices, **content.get(_machine(), {})}
        return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"

    with contextlib.suppress(OSError):
        update_file(choices_path(), _MOST_BYTES, added)


def about_choices() -> dict[str, Any]:
    """How many choices are kept for this machine ("measured_shapes"), and in which "file"."""
    return {"measured_shapes": len(kept()), "file": str(choices_path())}
