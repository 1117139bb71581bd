"""The interpreter lane rounds as GPUs do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True, scope="session")
def bfloat16_rounds_to_nearest() -> Iterator[None]:
    """Triton's interpreter cuts float32 off to bfloat16; every GPU (and torch) rounds to nearest, ties to even.

    Cut off, one conversion is twice as far off as rounded, always towards zero, and the errors of a chain of layers
    add up instead of cancelling: the budget of harness.py, set by torch's error, would have to hide that.
    """
    if not INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut_off = InterpreterBuilder.cast_impl

    def rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(bits.reshape(src.data.shape), dst_type.scalar)
        return cut_off(self, src, dst_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounded)
        yield
