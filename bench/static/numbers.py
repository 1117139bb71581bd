"""Numbers as the report prints them: with few digits, so that the file changes only where the kernels change."""

from __future__ import annotations

import math

__all__ = ["bytes_text", "compact", "significant"]


def significant(x: float, digits: int = 3) -> float:
    """``x`` rounded to ``digits`` significant digits."""
    if x == 0 or not math.isfinite(x):
        return x
    return round(x, digits - 1 - math.floor(math.log10(abs(x))))


def compact(x: float | None) -> str:
    """Three digits and a unit prefix: 1.23 k, 4.56 M; small numbers as they are."""
    if x is None:
        return "-"
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(x) >= size:
            return f"{significant(x / (1e3 if size == 1e4 else size)):g}{prefix}"
    return f"{significant(x):g}"


def bytes_text(n: float) -> str:
    """Bytes in the unit (of 1000) that fits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{significant(n / size):g} {unit}"
    return f"{n:g} B"
