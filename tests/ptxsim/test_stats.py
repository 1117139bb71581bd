"""Counts: sectors and bank conflicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptxsim import bank_wavefronts, run_triton
from tests.ptxsim.samples.elementwise import k_add

pytestmark = pytest.mark.execute


def test_bank_conflicts_and_sectors() -> None:
    a = np.arange(32) * 4
    bw = bank_wavefronts
    assert bw(a, 4) == (1, 1, 0)
    assert bw(a * 2, 4) == (1, 2, 1)  # stride 2 words
    assert bw(a * 32, 4) == (1, 32, 31)  # one bank
    assert bw(a * 0, 4) == (1, 1, 0)  # broadcast
    assert bw(a * 2, 8) == (1, 2, 0)
    assert bw(a * 4, 16) == (1, 4, 0)
    assert bw(a * 8, 16) == (1, 8, 4)
    x = torch.randn(32 * 33)
    o = torch.zeros(512)
    st = run_triton(k_add, {"x": x[:512], "y": x[:512], "o": o, "n": 512}, {"B": 512}, (1,))
    assert st.global_load["sectors"] == st.global_load["min_sectors"] == 2 * 512 * 4 // 32
    assert st.warp_instructions > 0
    assert st.by_class["ld.global"] == 2 * 4
