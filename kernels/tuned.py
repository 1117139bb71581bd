"""Tiles that were measured on this machine: a table in the user's cache, which ``configs.gemm_tile`` prefers.

``fastmlp bench tune`` writes the table: one JSON file per device, for one version of Triton. An entry serves all shapes
whose three sizes, rounded up to powers of two, are those of the measured shape, as long as ``configs`` lists its tile.

    {"device": ..., "triton": ..., "entries": [{"kind": "fwd", "dtype": "float32", "rows": 64, "cols": 512,
     "depth": 784, "tile": [rows, cols, depth, num_warps, num_stages], "seconds": ..., "rule": [...],
     "rule_seconds": ...}, ...]}
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from ..base.atomic import cache_folder, read_file
from .device import Device

__all__ = ["MALFORMED", "MOST_BYTES", "device_key", "parsed", "read_table", "table_path", "tuned_tile"]

#: What reading a table raises where the file has something else.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

#: A larger file is not what ``fastmlp bench tune`` writes.
MOST_BYTES = 16 << 20

Key = tuple[str, str, int, int, int]
T = TypeVar("T", bound=tuple[int, ...])


def device_key(device: Device) -> str:
    """The file's stem for a device: devices of one architecture and size share a table."""
    return f"{device.backend}-{device.arch}-{device.multiprocessors}"


def table_path(key: str) -> Path:
    """Where the table of the device of that ``device_key`` is, or would be."""
    return cache_folder() / "tiles" / f"{key}.json"


def _key(kind: str, dtype: str, rows: int, cols: int, depth: int) -> Key:
    return kind, dtype, (rows - 1).bit_length(), (cols - 1).bit_length(), (depth - 1).bit_length()


def parsed(entry: Any) -> tuple[Key, tuple[int, ...]]:
    """What an entry of a table serves, and its tile; an exception of `MALFORMED` if the entry is none."""
    key = _key(*(entry[name] for name in ("kind", "dtype", "rows", "cols", "depth")))
    hash(key)
    return key, tuple(int(n) for n in entry["tile"])


@lru_cache(maxsize=16)
def read_table(key: str) -> dict[Key, tuple[int, ...]]:
    """The measured tiles of the device of that ``device_key``; empty where there is no table that can be used."""
    path = table_path(key)
    try:
        found: dict[str, Any] = json.loads(read_file(path, MOST_BYTES))
        if found["triton"] != triton.__version__:
            return {}
        return dict(map(parsed, found["entries"]))
    except FileNotFoundError:
        return {}
    except (OSError, *MALFORMED) as error:
        warnings.warn(
            f"the tile table {path} cannot be used ({type(error).__name__}: {error}); delete it, or write it anew with "
            "'fastmlp bench tune'",
            stacklevel=2,
        )
        return {}


def tuned_tile(
    kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, device: Device, tiles: Sequence[T]
) -> T | None:
    """The tile among ``tiles`` that was measured to be the fastest on this device; None where nothing was measured."""
    if device.backend == "interpreter":
        return None
    measured = read_table(device_key(device)).get(_key(kind, str(dtype).removeprefix("torch."), rows, cols, depth))
    return next((tile for tile in tiles if tile[:5] == measured), None)
