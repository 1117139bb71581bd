"""Fake GPUs where there are no real GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import HAS_GPU, INTERPRETING


@pytest.fixture
def machine() -> Iterator[object]:
    """Two GPUs on which nothing is computed."""
    if HAS_GPU or INTERPRETING:
        pytest.skip("fake GPUs need a process with neither a real GPU nor the interpreter")
    from tests.placement.machine import Machine

    with Machine() as machine:
        yield machine
