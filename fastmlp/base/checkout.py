"""Finds ``fastmlp.kernels`` in a checkout that is not installed.

An installation has the kernels inside fastmlp/. In a checkout, the kernels are beside fastmlp/, where Python does not
look.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_BESIDE = Path(__file__).parents[2] / "kernels" / "__init__.py"


class _KernelsBeside:
    """An entry of ``sys.meta_path`` for ``fastmlp.kernels`` alone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package ``kernels`` beside fastmlp/, where there is one; else None."""
        return spec_from_file_location(name, _BESIDE) if name == "fastmlp.kernels" and _BESIDE.is_file() else None


sys.meta_path.insert(0, _KernelsBeside())
