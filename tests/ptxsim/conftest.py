"""The executor compiles its kernels, so its tests need a process without Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        skip = pytest.mark.skip(reason="TRITON_INTERPRET=1: nothing is compiled in this process")
        for item in items:
            if _HERE in item.path.parents:
                item.add_marker(skip)
