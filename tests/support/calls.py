"""The functions of Python that a call goes through."""

from __future__ import annotations

import sys
from collections.abc import Callable


def python_calls(function: Callable[[], object]) -> list[str]:
    """The Python functions that the function calls, by name."""
    names: list[str] = []

    def profile(frame, event, argument):
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]
