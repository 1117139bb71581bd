"""kernels/device.py: how float32 is multiplied under each of torch's settings."""

from __future__ import annotations

import pytest
import torch

from fastmlp.kernels.device import Device, input_precision, tf32_allowed
from tests.support.precision import SETTINGS


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_float32(name):
    steps, allowed = SETTINGS[name]
    for set_to, value in steps:
        set_to(value)
    assert tf32_allowed() == allowed == (torch.backends.cuda.matmul.fp32_precision == "tf32")
    for arch, exact in ((75, "ieee"), (80, "tf32x3"), (90, "tf32x3"), (120, "tf32x3")):
        expected = "tf32" if allowed and arch >= 80 else exact
        assert input_precision(Device("cuda", arch, 80, 1 << 16), torch.float32) == expected
    assert input_precision(Device("hip", "gfx942", 304, 1 << 16), torch.float32) == "ieee"
    assert input_precision(Device("cuda", 80, 108, 1 << 16), torch.bfloat16) == "ieee"
