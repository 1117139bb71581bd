"""What an error says of a name that does not exist: the names that do, and the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Other people's words for dtypes.
_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}


def unknown(kind: str, name: object, known: Iterable[str], others: str = "") -> str:
    """The message of an error: ``name`` is no ``kind``, the ``known`` names, what else is allowed, and a suggestion."""
    known = tuple(known)
    return f"unknown {kind} {name!r}; expected one of {', '.join(known)}{others}{did_you_mean(name, known)}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``. Did you mean 'relu'?`` where a known name is close to ``name``; else nothing."""
    if not isinstance(name, str):
        return ""
    plain = {_plain(candidate): candidate for candidate in known}
    wanted = _plain(_ALIASES.get(name.casefold(), name))
    close = difflib.get_close_matches(wanted[:100], plain, n=1)
    return f". Did you mean {plain[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")
