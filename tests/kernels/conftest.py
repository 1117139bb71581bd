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
    """Make Triton's interpreter round float32 to bfloat16 to nearest, ties to even, as every GPU and torch do.

    By itself the interpreter cuts the digits off. A cut has twice the error of a rounding, always towards zero, so the
    errors of a chain of layers add up instead of cancelling. The error budget of tests/support/harness.py is set by
    torch's error and would have to allow for the sum.
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
