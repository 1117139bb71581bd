"""How many kernels `fastmlp doctor` compiles on a GPU, which takes nearly all of its time there."""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from fastmlp.cli.selfcheck import FULL, SHORT, run_checks
from tests.compile.targets import TARGETS

pytestmark = pytest.mark.launch

BY_DEFAULT = (torch.float32, torch.bfloat16)
ALL = (*BY_DEFAULT, torch.float16)


@pytest.mark.parametrize(
    ("dtypes", "sizes", "most"), [(BY_DEFAULT, SHORT, 210), (ALL, FULL, 410)], ids=["short", "all"]
)
def test_kernels_to_compile(monkeypatch, dtypes, sizes, most):
    kernels = set()

    def instead_of_compiling(*, key, fn, **_):
        kernels.add((fn.name, key))
        return True

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", instead_of_compiling)
    with TARGETS["sm_90"].simulated():
        run_checks("cpu", "triton", dtypes, sizes)
    assert 0.9 * most < len(kernels) <= most
